"""Head attention on Hopper GPUs by Pallas-Mosaic-GPU: the forward kernel.

Two warp groups compute, 64 queries each; a third fetches keys and values by
TMA, some visits ahead. A visit's keys come in boxes of at most `block` tokens,
each fetched from where it lies: of a far tile the boxes are `stride` blocks
apart, of a near one they are neighbours. Both fill the same buffer, so the
products (wgmma) do not know the difference.

Compiled for sm_90, not yet run on a GPU: asked for by name only. Gradients
are the Triton kernels'.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.head_attention import triton
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import StridedHeads, split_heads
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.problem import (
  LOG2_E,
  LOWEST,
  Problem,
  describe,
)
from pallas_kernels.head_attention.triton.walks import Shards

_GROUP_ROWS = 64  # Queries of one warp group: what one wgmma has.
_COMPUTE = 2  # Warp groups that compute.
_STEPS = 2  # Visits in flight.
# The 128-byte swizzle wants rows of 64 entries, in groups of 8.
_SWIZZLE_COLUMNS = 64
_SWIZZLE_ROWS = 8


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered, with the way out; None if they are."""
  q, v = operands.q, operands.v
  H, Hv = q.shape[3], v.shape[3]
  if settings.interpret:
    return "Mosaic-GPU kernels of this kind cannot be interpreted."
  if any(
    not isinstance(run, StridedHeads) for run in split_heads(settings.pattern)
  ):
    return "only strided heads without sinks have a schedule here."
  if q.dtype.name not in ("bfloat16", "float16"):
    return f"`q`, `k` and `v` must be bfloat16 or float16, got {q.dtype}."
  if H not in (64, 128, 256) or Hv != H:
    return (
      f"heads must have 64, 128 or 256 entries in `q` and `v`, got {H} and "
      f"{Hv}."
    )
  if operands.q_segment_ids is not None:
    return "`q_segment_ids` and `kv_segment_ids` must be None."
  if settings.q_offset is None:
    return "`q_offset` must be a Python int."
  if settings.pattern.block_size < _SWIZZLE_ROWS:
    return (
      f"`pattern` must have blocks of at least {_SWIZZLE_ROWS} tokens, got "
      f"{settings.pattern.block_size}."
    )
  T, S = q.shape[1], v.shape[1]
  least = min(settings.pattern.block_size, _tiling(settings, H).block_kv)
  if T < _GROUP_ROWS or least > S:
    return (
      f"there must be at least {_GROUP_ROWS} queries and {least} keys, got {T} "
      f"and {S}."
    )
  capability = launches.capability()
  if capability is not None and not capability.startswith("9."):
    return (
      "its products are Hopper's (wgmma, compute capability 9.0), and this "
      f"GPU has {capability}."
    )
  tiling = _tiling(settings, H)
  limit = 227 * 1024
  needed = _shared_bytes(tiling, H)
  if tiling.block_q != _COMPUTE * _GROUP_ROWS or tiling.block_kv % 64:
    return (
      f"`tiling` must be {_COMPUTE * _GROUP_ROWS} queries by a multiple of 64 "
      f"keys, got {tiling.block_q} x {tiling.block_kv}."
    )
  if needed > limit:
    return (
      f"`tiling` of {tiling.block_q} x {tiling.block_kv} needs {needed} bytes "
      f"of shared memory, of {limit}. `Tiling(block_q={tiling.block_q}, "
      f"block_kv={_default_keys(H)})` fits."
    )
  return triton.refusal(
    # The backward pass is theirs, with their own tiles.
    _for_triton(settings),
    operands,
  )


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Output in q's dtype and float32 log-sum-exp."""
  problem = describe(settings, operands, _tiling(settings, operands.q.shape[3]))
  outs, lses = [], []
  for run in split_heads(settings.pattern):
    assert isinstance(run, StridedHeads)
    out, lse = _forward_run(problem, run, operands)
    outs.append(out)
    lses.append(lse)
  if len(outs) == 1:
    return outs[0], lses[0]
  return jnp.concatenate(outs, 2), jnp.concatenate(lses, 1)


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
  """Gradients of q, k and v by the Triton kernels."""
  return triton.backward(
    _for_triton(settings), operands, out, lse, d_out, d_lse
  )


def _for_triton(settings: Settings) -> Settings:
  return dataclasses.replace(settings, tiling=None)


def _default_keys(H: int) -> int:
  return 64 if H > 128 else 128


def _tiling(settings: Settings, H: int) -> Tiling:
  if settings.tiling is not None:
    return settings.tiling
  return Tiling(block_q=_COMPUTE * _GROUP_ROWS, block_kv=_default_keys(H))


def _shared_bytes(tiling: Tiling, H: int) -> int:
  return 2 * H * (tiling.block_q + 2 * _STEPS * tiling.block_kv) + 8 * 1024


def _forward_run(
  problem: Problem, run: StridedHeads, operands: Operands
) -> tuple[Array, Array]:
  heads = run.stop - run.start
  q, k, v = map(_in_eights, operands[:3])
  bq = problem.tiling.block_q
  bkv = problem.tiling.block_kv
  box = min(problem.block, bkv)
  transforms = (
    plgpu.TilingTransform((_SWIZZLE_ROWS, _SWIZZLE_COLUMNS)),
    plgpu.SwizzleTransform(128),
  )
  # TMA stores whole rows of 16 bytes: lengths off the tile get room.
  rows = problem.q_tiles * bq
  out, lse = plgpu.kernel(
    functools.partial(
      _kernel,
      problem,
      Shards.of(problem, run.local, run.stride),
      start=run.start,
    ),
    out_type=(
      jax.ShapeDtypeStruct(
        (problem.B, q.shape[1], heads, problem.Hv), problem.dtype
      ),
      jax.ShapeDtypeStruct((problem.B, heads, rows), jnp.float32),
    ),
    scratch_types=(
      plgpu.SMEM(
        (_COMPUTE, _GROUP_ROWS, problem.H), problem.dtype, transforms=transforms
      ),
      plgpu.SMEM(
        (_STEPS, bkv, problem.H), problem.dtype, transforms=transforms
      ),
      plgpu.SMEM(
        (_STEPS, bkv, problem.Hv), problem.dtype, transforms=transforms
      ),
      plgpu.SMEM((_COMPUTE, _GROUP_ROWS), jnp.float32),
      plgpu.Barrier(num_barriers=_COMPUTE),
      plgpu.Barrier(num_arrivals=bkv // box, num_barriers=_STEPS),
      plgpu.Barrier(num_arrivals=bkv // box, num_barriers=_STEPS),
      plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=_STEPS),
      plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=_STEPS),
    ),
    grid=(heads, problem.q_tiles, problem.B),
    grid_names=("heads", "tiles", "batch"),
    num_threads=_COMPUTE + 1,
    thread_name="group",
    compiler_params=plgpu.CompilerParams(approx_math=True),
  )(q, k, v, jnp.asarray(run.residues, jnp.int32))
  return out[:, : problem.T], lse[..., : problem.T]


def _in_eights(x: Array) -> Array:
  """Rows padded to a multiple of the swizzle's; most lengths are one."""
  missing = -x.shape[1] % _SWIZZLE_ROWS
  return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _kernel(
  problem: Problem,
  shards: Shards,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  residues_ref: Any,
  out_ref: Any,
  lse_ref: Any,
  q_smem: Any,
  k_smem: Any,
  v_smem: Any,
  lse_smem: Any,
  q_barriers: Any,
  k_barriers: Any,
  v_barriers: Any,
  k_free_barriers: Any,
  v_free_barriers: Any,
  *,
  start: int,
) -> None:
  """One query tile of one head; see the module's docstring."""
  group = lax.axis_index("group")
  head_of_run, batch = lax.axis_index("heads"), lax.axis_index("batch")
  # The last queries see most: they go first, or the end has idle cores.
  tile = problem.q_tiles - 1 - lax.axis_index("tiles")
  bkv = problem.tiling.block_kv
  residue = residues_ref[head_of_run]
  visits = shards.visits(tile, residue, problem.q_offset)
  total = visits.full_count + visits.edge_count

  @pl.when(group == _COMPUTE)
  def _fetch() -> None:
    plgpu.set_max_registers(40, action="decrease")
    kv_head = lax.div(start + head_of_run, jnp.int32(problem.groups))

    def fetch(visit: jax.Array, slot: Any) -> None:
      place = visits.place(visit)
      box = min(problem.block, bkv)
      for ref, smem, barriers, free in (
        (k_ref, k_smem, k_barriers, k_free_barriers),
        (v_ref, v_smem, v_barriers, v_free_barriers),
      ):

        @pl.when(visit >= _STEPS)
        def _wait(free: Any = free) -> None:
          plgpu.barrier_wait(free.at[slot])

        for row in range(0, bkv, box):
          # Past the last key, TMA fills in zeros.
          position = shards.position(
            place.token + row, place.stride, place.residue
          )
          plgpu.copy_gmem_to_smem(
            ref.at[batch, pl.ds(position, box), kv_head],
            smem.at[slot, pl.ds(row, box)],
            barriers.at[slot],
          )

    @pl.loop(0, total)
    def _each(visit: jax.Array) -> None:
      fetch(visit, lax.rem(visit, jnp.int32(_STEPS)))

  @pl.when(group < _COMPUTE)
  def _compute() -> None:
    plgpu.set_max_registers(232, action="increase")
    first_row = tile * problem.tiling.block_q + group * _GROUP_ROWS
    own_rows = pl.ds(first_row, _GROUP_ROWS)
    head = start + head_of_run
    own_q = q_smem.at[group]
    plgpu.copy_gmem_to_smem(
      q_ref.at[batch, own_rows, head], own_q, q_barriers.at[group]
    )
    plgpu.barrier_wait(q_barriers.at[group])
    column = plgpu.Layout.WGMMA.reduce(1)

    def visit_one(visit: jax.Array, carry: Any, *, is_edge: bool) -> Any:
      acc, m, l = carry
      slot = lax.rem(visit, jnp.int32(_STEPS))
      plgpu.barrier_wait(k_barriers.at[slot])

      def multiply(acc_ref: Any) -> jax.Array:
        plgpu.wgmma(acc_ref, own_q, k_smem.at[slot].transpose((1, 0)))
        return acc_ref[...]

      logits = pl.run_scoped(
        multiply, plgpu.WGMMAAccumulatorRef((_GROUP_ROWS, bkv), jnp.float32)
      )
      plgpu.barrier_arrive(k_free_barriers.at[slot])
      logits = _scaled(problem, logits)
      if is_edge:
        place = visits.edge(visit - visits.full_count)
        mask = _mask(problem, shards, place, residue, first_row)
        logits = jnp.where(mask, logits, -jnp.inf)
      top = jnp.maximum(m, logits.max(axis=1))
      shrink = jnp.exp2(m - top)
      weights = jnp.exp2(logits - lax.broadcast_in_dim(top, logits.shape, [0]))
      l = l * shrink + weights.sum(axis=1)
      acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
      weights = weights.astype(problem.dtype)
      plgpu.barrier_wait(v_barriers.at[slot])

      def add(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, weights, v_smem.at[slot])

      acc = pl.run_state(add)(plgpu.WGMMAAccumulatorRef.init(acc))
      plgpu.barrier_arrive(v_free_barriers.at[slot])
      return acc, top, l

    def numbers(value: float) -> jax.Array:
      return plgpu.layout_cast(
        jnp.full((_GROUP_ROWS,), value, jnp.float32), column
      )

    carry = (
      plgpu.layout_cast(
        jnp.zeros((_GROUP_ROWS, problem.Hv), jnp.float32), plgpu.Layout.WGMMA
      ),
      numbers(LOWEST),
      numbers(0.0),
    )
    carry = lax.fori_loop(
      0,
      visits.full_count,
      functools.partial(visit_one, is_edge=False),
      carry,
    )
    acc, m, l = lax.fori_loop(
      visits.full_count,
      total,
      functools.partial(visit_one, is_edge=True),
      carry,
    )
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    acc /= lax.broadcast_in_dim(l, acc.shape, [0])
    own_q[...] = acc.astype(problem.dtype)
    lse_smem.at[group][...] = jnp.where(
      empty, -jnp.inf, m * (1 / LOG2_E) + jnp.log(l)
    )
    plgpu.commit_smem()
    # Rows past the last query are not stored.
    plgpu.copy_smem_to_gmem(own_q, out_ref.at[batch, own_rows, head_of_run])
    plgpu.copy_smem_to_gmem(
      lse_smem.at[group], lse_ref.at[batch, head_of_run, own_rows]
    )
    plgpu.wait_smem_to_gmem(0)


def _scaled(problem: Problem, products: jax.Array) -> jax.Array:
  """Logits in base 2."""
  if problem.cap is None:
    return products * (problem.scale * LOG2_E)
  return jnp.tanh(products * (problem.scale / problem.cap)) * (
    problem.cap * LOG2_E
  )


def _mask(
  problem: Problem,
  shards: Shards,
  place: Any,
  residue: jax.Array,
  first_row: jax.Array,
) -> jax.Array:
  """What an edge visit shows the warp group's queries."""
  shape = (_GROUP_ROWS, problem.tiling.block_kv)
  rows, columns = (
    plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    for axis in (0, 1)
  )
  assert problem.q_offset is not None
  queries = rows + (first_row + problem.q_offset)
  keys = shards.position(columns + place.token, place.stride, place.residue)
  return shards.mask(place, queries, keys, residue)
