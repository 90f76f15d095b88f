"""Head attention on GPUs by Pallas-Triton: forward and backward kernels.

A program has one query tile (or key tile, for the gradients of keys and
values) and walks over what it sees. Strided heads walk by closed forms: first
the tiles of their own shard, gathered by strided addresses, then the window.
Other heads walk over work lists.

JAX deprecated Pallas-Triton in 0.11; it stays for GPUs before Hopper, and
because its numbers can be shown without a GPU. It is met in `problem.call`,
here and where routed attention finds its rows, and nowhere else.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
from pallas_kernels.head_attention.triton.queries import DenseQueries
from pallas_kernels.head_attention.triton.query import (
  Locate,
  dq_kernel,
  forward_kernel,
  locate_dense,
)
from pallas_kernels.head_attention.triton.strided import (
  COLUMN,
  Pair,
  Source,
  for_all_heads,
  ints,
  kv_heads_of,
  strided_keys,
)
from pallas_kernels.head_attention.triton.walks import (
  ListRefs,
  Shards,
  Walk,
  listed_walk,
)

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
    locate, arrays = _locate(run, problem, operands)
    heads = run.stop - run.start
    out, lse = call(
      functools.partial(forward_kernel, locate=locate, run_refs=len(arrays)),
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
    reading = _inputs(operands, residuals)
    if isinstance(run, StridedHeads):
      dk, dv = strided_keys(
        problem,
        run,
        reading,
        _source(operands, problem),
        launches.dkv,
        dtype=dtype,
        interpret=settings.interpret,
        name="head_attention",
      )
    else:
      dk, dv = _listed_keys(
        settings, reading, run, launches.dkv, problem, dtype
      )
    dks.append(for_all_heads(run, problem, dk))
    dvs.append(for_all_heads(run, problem, dv))
  return (
    _joined(dqs, 2),
    functools.reduce(jnp.add, dks).astype(operands.k.dtype),
    functools.reduce(jnp.add, dvs).astype(operands.v.dtype),
  )


def _dq(
  settings: Settings,
  operands: Operands,
  residuals: tuple[Array, Array, Array],
  launch: Launch,
  run: Run,
) -> Array:
  problem = _problem(settings, operands, launch, run)
  locate, arrays = _locate(run, problem, operands)
  heads = run.stop - run.start
  (dq,) = call(
    functools.partial(dq_kernel, locate=locate, run_refs=len(arrays)),
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


def _source(operands: Operands, problem: Problem) -> Source:
  """Where the keys' kernels find queries."""
  offset = operands.q_offset[None]

  def far(pairs: list[Pair]) -> tuple[Array, ...]:
    heads = [pair.heads for pair in pairs]
    starts = itertools.accumulate(map(len, heads), initial=0)
    return offset, ints(list(starts)), ints(list(itertools.chain(*heads)))

  return Source(DenseQueries, (offset,), far, problem.q_tiles)


def _listed_keys(
  settings: Settings,
  reading: tuple[Array, ...],
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
  columns = deal_columns(run, lists, problem, at_most=COLUMN)
  first, last = kv_heads_of(run, problem)
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
      *reading,
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


def _locate(
  run: Run, problem: Problem, operands: Operands
) -> tuple[Locate, tuple[Array, ...]]:
  """How a kernel finds its queries and visits, and what it reads for that."""
  make_walk: Callable[..., Walk]
  arrays: tuple[Array, ...]
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
      visits = shards.visits(tile, residue, offset)
      return shards.walk(visits, positions, residue)

    make_walk, arrays = strided, (ints(run.residues),)
  else:

    def listed(
      problem: Problem,
      refs: tuple[Any, ...],
      head: Array,
      tile: Array,
      positions: Array,
      offset: Any,
    ) -> Walk:
      lists = ListRefs(*refs)
      return listed_walk(problem, lists, head, tile, positions, offset)

    make_walk = listed
    arrays = tuple(map(jnp.asarray, query_lists(run, problem)))
  locate = functools.partial(locate_dense, start=run.start, make_walk=make_walk)
  return locate, (operands.q_offset[None], *arrays)


def _inputs(
  operands: Operands, residuals: tuple[Array, ...] = ()
) -> tuple[Array, ...]:
  q, k, v, q_segment_ids, kv_segment_ids, _ = operands
  arrays = (q, k, v, *residuals)
  if q_segment_ids is None or kv_segment_ids is None:
    return arrays
  return (*arrays, q_segment_ids, kv_segment_ids)


def _joined(arrays: list[Array], axis: int) -> Array:
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)
