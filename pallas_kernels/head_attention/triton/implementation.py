"""Head attention on GPUs by Pallas-Triton: forward and backward kernels.

A program has one query tile (or key tile, for the gradients of keys and
values) and walks over what it sees. Strided heads walk by closed forms: first
the tiles of their own shard, gathered by strided addresses, then the window.
Other heads walk over work lists.

JAX deprecated Pallas-Triton in 0.11; it stays for GPUs before Hopper, and
because its numbers can be shown without a GPU. It is met in
`problem.call` and in nothing outside these files.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  TableHeads,
  split_heads,
)
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.columns import (
  column_kernel,
  sum_kernel,
)
from pallas_kernels.head_attention.triton.keys import far_kernel, near_kernel
from pallas_kernels.head_attention.triton.launches import Launch
from pallas_kernels.head_attention.triton.lists import (
  WORD,
  deal_columns,
  key_lists,
  query_lists,
)
from pallas_kernels.head_attention.triton.problem import (
  FARTHEST,
  HIGHEST,
  LOG2_E,
  Problem,
  call,
  describe,
)
from pallas_kernels.head_attention.triton.query import (
  dq_kernel,
  forward_kernel,
)
from pallas_kernels.head_attention.triton.walks import (
  ListRefs,
  Shards,
  Walk,
  listed_walk,
)

# Query tiles that one program of a long column takes; a column of a shard is
# seen by all later queries.
_COLUMN = 64
_DTYPES = ("float32", "bfloat16", "float16")
# Programs along the second and third axis of a grid.
_GRID = 65535

Run = StridedHeads | TableHeads


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered, with the way out; None if they are."""
  q, k, v = operands.q, operands.k, operands.v
  if q.dtype.name not in _DTYPES:
    return f"`q`, `k` and `v` must be one of {_DTYPES}, got {q.dtype}."
  if not (q.size and k.size and v.size):
    return (
      f"`q`, `k` and `v` must not be empty, got {q.shape}, {k.shape} and "
      f"{v.shape}."
    )
  if max(q.shape[0], q.shape[2]) > _GRID:
    return f"`q` may have at most {_GRID} rows and heads, got {q.shape}."
  runs = split_heads(settings.pattern)
  has_lists = any(isinstance(run, TableHeads) for run in runs)
  if settings.q_offset is None and has_lists:
    return (
      "a traced `q_offset` goes with strided heads (no sinks) only, whose "
      "visits have closed forms. Pass it as a Python int."
    )
  block = settings.pattern.block_size
  for run in runs:
    if isinstance(run, StridedHeads) and run.stride * block > FARTHEST:
      return (
        f"`stride` may span at most {FARTHEST} tokens, got {run.stride} blocks "
        f"of {block}. `stride=0` shows as little of the past."
      )
  return launches.refusal(
    settings.tiling, H=q.shape[3], Hv=v.shape[3], dtype=q.dtype
  )


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Output in q's dtype and float32 log-sum-exp."""
  launch = _launches(settings, operands).forward
  outs, lses = [], []
  for run in split_heads(settings.pattern):
    problem = _problem(settings, operands, launch, run)
    make_walk, arrays = _walks(run, problem)
    heads = run.stop - run.start
    out, lse = call(
      functools.partial(
        forward_kernel,
        start=run.start,
        make_walk=make_walk,
        run_refs=len(arrays),
      ),
      problem,
      grid=(problem.q_tiles, heads, problem.B),
      inputs=(*_inputs(operands), *arrays),
      out_shape=(
        jax.ShapeDtypeStruct(
          (problem.B, problem.T, heads, problem.Hv), problem.dtype
        ),
        jax.ShapeDtypeStruct((problem.B, heads, problem.T), jnp.float32),
      ),
      num_warps=launch.num_warps,
      num_stages=launch.num_stages,
      interpret=settings.interpret,
      name="head_attention_forward",
    )
    outs.append(out)
    lses.append(lse)
  return _joined(outs, 2), _joined(lses, 1)


def backward(
  settings: Settings,
  operands: Operands,
  out: Float[Array, "B T N Hv"],
  lse: Float[Array, "B N T"],
  d_out: Float[Array, "B T N Hv"],
  d_lse: Float[Array, "B N T"],
) -> tuple[
  Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]
]:
  """Gradients of q, k and v in their dtypes; rows with lse -inf give 0."""
  empty = jnp.isneginf(lse)
  # d logits = weights (d_out . v - delta), for output and log-sum-exp alike.
  delta = jnp.einsum(
    "btnh,btnh->bnt", out.astype(jnp.float32), d_out.astype(jnp.float32)
  )
  delta = jnp.where(empty, 0.0, delta - d_lse)
  lse = jnp.where(empty, HIGHEST, lse * LOG2_E)
  d_out = d_out.astype(operands.q.dtype)
  residuals = (d_out, lse, delta)
  launches = _launches(settings, operands)
  runs = split_heads(settings.pattern)
  dqs = [_dq(settings, operands, residuals, launches.dq, run) for run in runs]
  dks, dvs = [], []
  for run in runs:
    problem = _problem(settings, operands, launches.dkv, run)
    # Runs may share a KV head: their sums meet in float32.
    dtype = operands.k.dtype if len(runs) == 1 else jnp.dtype(jnp.float32)
    rest = (launches.dkv, problem, dtype)
    if isinstance(run, StridedHeads):
      dk, dv = _strided_keys(settings, operands, residuals, run, *rest)
    else:
      dk, dv = _listed_keys(settings, operands, residuals, run, *rest)
    first, last = _kv_heads(run, problem)
    if last - first + 1 < problem.K:
      pad = ((0, 0), (0, 0), (first, problem.K - 1 - last), (0, 0))
      dk, dv = jnp.pad(dk, pad), jnp.pad(dv, pad)
    dks.append(dk)
    dvs.append(dv)
  return (
    _joined(dqs, 2),
    functools.reduce(jnp.add, dks).astype(operands.k.dtype),
    functools.reduce(jnp.add, dvs).astype(operands.v.dtype),
  )


def _kv_heads(run: Run, problem: Problem) -> tuple[int, int]:
  """First and last KV head of a run."""
  return run.start // problem.groups, (run.stop - 1) // problem.groups


def _dq(
  settings: Settings,
  operands: Operands,
  residuals: tuple[Array, Array, Array],
  launch: Launch,
  run: Run,
) -> Array:
  problem = _problem(settings, operands, launch, run)
  make_walk, arrays = _walks(run, problem)
  heads = run.stop - run.start
  (dq,) = call(
    functools.partial(
      dq_kernel,
      start=run.start,
      make_walk=make_walk,
      run_refs=len(arrays),
    ),
    problem,
    grid=(problem.q_tiles, heads, problem.B),
    inputs=(*_inputs(operands), *arrays, *residuals),
    out_shape=(
      jax.ShapeDtypeStruct(
        (problem.B, problem.T, heads, problem.H), problem.dtype
      ),
    ),
    num_warps=launch.num_warps,
    num_stages=launch.num_stages,
    interpret=settings.interpret,
    name="head_attention_dq",
  )
  return dq


def _strided_keys(
  settings: Settings,
  operands: Operands,
  residuals: tuple[Array, Array, Array],
  run: StridedHeads,
  launch: Launch,
  problem: Problem,
  dtype: Any,
) -> tuple[Array, Array]:
  """Dk and dv [B, S, KV heads of the run, H] of strided heads."""
  shards = Shards.of(problem, run.local, run.stride)
  options: dict[str, Any] = dict(
    num_warps=launch.num_warps,
    num_stages=launch.num_stages,
    interpret=settings.interpret,
  )
  reading = _key_inputs(operands, residuals)
  first, last = _kv_heads(run, problem)
  far: tuple[Array, ...] = ()
  pieces = 1
  if run.stride:
    heads_of: dict[tuple[int, int], list[int]] = {}
    for head, residue in enumerate(run.residues, run.start):
      pair = (head // problem.groups, residue)
      heads_of.setdefault(pair, []).append(head)
    # By KV head: heads of a group that have different residues interleave.
    pairs = sorted(heads_of)
    blocks = -(-problem.S // problem.block)
    tokens = min(-(-blocks // run.stride) * problem.block, problem.S)
    pieces = _pieces(problem, run.stride, len(pairs))
    shape = (problem.B * pieces, tokens, len(pairs))
    residues = _ints([residue for _, residue in pairs])
    dk, dv = call(
      functools.partial(far_kernel, shards=shards, pieces=pieces),
      problem,
      grid=(
        pl.cdiv(tokens, problem.tiling.block_kv) * pieces,
        len(pairs),
        problem.B,
      ),
      inputs=(
        *reading,
        operands.q_offset[None],
        residues,
        _ints([kv_head for kv_head, _ in pairs]),
        _ints(np.cumsum([0, *(len(heads_of[pair]) for pair in pairs)])),
        _ints([head for pair in pairs for head in heads_of[pair]]),
      ),
      out_shape=(
        jax.ShapeDtypeStruct((*shape, problem.H), jnp.float32),
        jax.ShapeDtypeStruct((*shape, problem.Hv), jnp.float32),
      ),
      name="head_attention_far_dkv",
      **options,
    )
    kv_heads = [kv_head for kv_head, _ in pairs]
    starts = np.searchsorted(kv_heads, np.arange(first, last + 2))
    far = (residues, _ints(starts), dk, dv)
  shape = (problem.B, problem.S, last - first + 1)
  dk, dv = call(
    functools.partial(
      near_kernel, shards=shards, start=run.start, stop=run.stop, pieces=pieces
    ),
    problem,
    grid=(problem.kv_tiles, last - first + 1, problem.B),
    inputs=(
      *reading,
      operands.q_offset[None],
      _ints(run.residues),
      *far,
    ),
    out_shape=(
      jax.ShapeDtypeStruct((*shape, problem.H), dtype),
      jax.ShapeDtypeStruct((*shape, problem.Hv), dtype),
    ),
    name="head_attention_near_dkv",
    **options,
  )
  return dk, dv


def _pieces(problem: Problem, stride: int, pairs: int) -> int:
  """Programs that share a far tile, so that long columns do not serialise.

  Each leaves a partial sum: together at most half a dk in float32, where the
  heads of a KV head share their residue.
  """
  most = max(1, stride * problem.K // (2 * pairs))
  return min(pl.cdiv(problem.q_tiles, _COLUMN), most)


def _listed_keys(
  settings: Settings,
  operands: Operands,
  residuals: tuple[Array, Array, Array],
  run: TableHeads,
  launch: Launch,
  problem: Problem,
  dtype: Any,
) -> tuple[Array, Array]:
  """Dk and dv [B, S, KV heads of the run, H] of heads with work lists."""
  options: dict[str, Any] = dict(
    num_warps=launch.num_warps,
    num_stages=launch.num_stages,
    interpret=settings.interpret,
  )
  lists = key_lists(run, problem)
  columns = deal_columns(run, lists, problem, at_most=_COLUMN)
  first, last = _kv_heads(run, problem)
  kv_heads = last - first + 1
  programs = columns.tile.size
  owned = (problem.B, problem.S, kv_heads)
  shape, out_dtype = owned, dtype
  if columns.is_split:
    shape = (problem.B, programs * problem.tiling.block_kv, 1)
    out_dtype = jnp.dtype(jnp.float32)
  dk, dv = call(
    functools.partial(
      column_kernel,
      start=run.start,
      stop=run.stop,
      is_split=columns.is_split,
    ),
    problem,
    grid=(programs, problem.B),
    inputs=(
      *_key_inputs(operands, residuals),
      *map(jnp.asarray, lists),
      *map(jnp.asarray, columns[:4]),
    ),
    out_shape=(
      jax.ShapeDtypeStruct((*shape, problem.H), out_dtype),
      jax.ShapeDtypeStruct((*shape, problem.Hv), out_dtype),
    ),
    name="head_attention_listed_dkv",
    **options,
  )
  if not columns.is_split:
    return dk, dv
  dk, dv = call(
    sum_kernel,
    problem,
    grid=(problem.kv_tiles, kv_heads, problem.B),
    inputs=(jnp.asarray(columns.starts), dk, dv),
    out_shape=(
      jax.ShapeDtypeStruct((*owned, problem.H), dtype),
      jax.ShapeDtypeStruct((*owned, problem.Hv), dtype),
    ),
    name="head_attention_sum_dkv",
    **options,
  )
  return dk, dv


def _launches(settings: Settings, operands: Operands) -> launches.Launches:
  q, v = operands.q, operands.v
  return launches.choose(
    settings.tiling,
    H=q.shape[3],
    Hv=v.shape[3],
    dtype=q.dtype,
    T=q.shape[1],
    S=v.shape[1],
  )


def _problem(
  settings: Settings, operands: Operands, launch: Launch, run: Run
) -> Problem:
  tiling = launch.tiling
  if isinstance(run, TableHeads):
    # A word of bits a query block: no more key blocks than it has bits.
    most = WORD * settings.pattern.block_size
    tiling = Tiling(block_q=tiling.block_q, block_kv=min(tiling.block_kv, most))
  return describe(settings, operands, tiling)


def _walks(
  run: Run, problem: Problem
) -> tuple[Callable[..., Walk], tuple[Array, ...]]:
  """How a kernel finds its visits, and the arrays it reads for that."""
  if isinstance(run, StridedHeads):
    local, stride = run.local, run.stride

    def strided(
      problem: Problem,
      refs: tuple[Any, ...],
      head: Array,
      tile: Array,
      positions: Array,
      offset: Any,
    ) -> Walk:
      residue = refs[0][head]
      shards = Shards.of(problem, local, stride)
      return shards.walk(tile, positions, residue, offset)

    return strided, (_ints(run.residues),)

  def listed(
    problem: Problem,
    refs: tuple[Any, ...],
    head: Array,
    tile: Array,
    positions: Array,
    offset: Any,
  ) -> Walk:
    return listed_walk(problem, ListRefs(*refs), head, tile, positions, offset)

  return listed, tuple(map(jnp.asarray, query_lists(run, problem)))


def _inputs(operands: Operands) -> tuple[Array, ...]:
  q, k, v, q_segment_ids, kv_segment_ids, q_offset = operands
  arrays = (q, k, v, q_offset[None])
  if q_segment_ids is None or kv_segment_ids is None:
    return arrays
  return (*arrays, q_segment_ids, kv_segment_ids)


def _key_inputs(
  operands: Operands, residuals: tuple[Array, Array, Array]
) -> tuple[Array, ...]:
  q, k, v, q_segment_ids, kv_segment_ids, _ = operands
  arrays = (q, k, v, *residuals)
  if q_segment_ids is None or kv_segment_ids is None:
    return arrays
  return (*arrays, q_segment_ids, kv_segment_ids)


def _ints(values: Any) -> Array:
  return jnp.asarray(np.asarray(values, np.int32))


def _joined(arrays: list[Array], axis: int) -> Array:
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)
