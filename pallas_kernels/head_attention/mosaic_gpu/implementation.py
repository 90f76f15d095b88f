"""Head attention on GPUs from Hopper on by Pallas Mosaic GPU: forward kernels.

Compiled for sm_90 and sm_100, right in JAX's interpreter (which lacks wgmma
from registers, one of Hopper's two products), not yet run on a GPU: asked for
by name only.
Gradients are the Triton kernels'.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.head_attention import triton
from pallas_kernels.head_attention.mosaic_gpu import chips
from pallas_kernels.head_attention.mosaic_gpu.chips import Chip
from pallas_kernels.head_attention.mosaic_gpu.kernel import call, kernel
from pallas_kernels.head_attention.mosaic_gpu.products import (
  SEGMENT_IDS,
  SWIZZLE_ROWS,
)
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import StridedHeads, split_heads
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.problem import Problem, describe
from pallas_kernels.head_attention.triton.walks import Shards


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered, with the way out; None if they are."""
  return forward_refusal(settings, operands) or triton.refusal(
    # The backward pass is theirs, with their own tiles.
    _for_triton(settings),
    operands,
  )


def forward_refusal(settings: Settings, operands: Operands) -> str | None:
  """As `refusal`, but of the forward kernel only."""
  q, v = operands.q, operands.v
  H, Hv = q.shape[3], v.shape[3]
  block = settings.pattern.block_size
  chip = chips.find()
  if chip is None:
    return (
      "its products are Hopper's (wgmma, compute capability 9.0) and "
      f"Blackwell's (tcgen05, 10.0), and this GPU has {launches.capability()}."
    )
  if settings.interpret and not _can_interpret(settings.interpret):
    return (
      "Mosaic GPU kernels are interpreted by JAX from 0.12 on only, and by its "
      "`InterpretGPUParams` only."
    )
  if any(
    not isinstance(run, StridedHeads) for run in split_heads(settings.pattern)
  ):
    return "only strided heads without sinks have a schedule here."
  if q.dtype.name not in ("bfloat16", "float16"):
    return f"`q`, `k` and `v` must be bfloat16 or float16, got {q.dtype}."
  if H not in chip.tilings or Hv != H:
    return (
      f"heads must have 64, 128 or 256 entries in `q` and `v`, got {H} and "
      f"{Hv}."
    )
  if settings.q_offset is None:
    return "`q_offset` must be a Python int."
  least = SWIZZLE_ROWS if operands.q_segment_ids is None else SEGMENT_IDS
  if block < least:
    return (
      f"`pattern` must have blocks of at least {SWIZZLE_ROWS} tokens, with "
      f"segment ids of {SEGMENT_IDS}, got {block}."
    )
  tiling = chip.tiling(settings.tiling, H)
  T, S = q.shape[1], v.shape[1]
  least = min(block, tiling.block_kv)
  if chip.rows > T or least > S:
    return (
      f"there must be at least {chip.rows} queries and {least} keys, got {T} "
      f"and {S}."
    )
  return chips.tiling_refusal(chip, tiling, H)


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Output in q's dtype and float32 log-sum-exp."""
  chip = chips.find()
  assert chip is not None
  tiling = chip.tiling(settings.tiling, operands.q.shape[3])
  problem = describe(settings, operands, tiling)
  outs, lses = [], []
  for run in split_heads(settings.pattern):
    assert isinstance(run, StridedHeads)
    out, lse = _forward_run(chip, problem, run, settings, operands)
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
  return dataclasses.replace(
    settings, tiling=None, interpret=bool(settings.interpret)
  )


def _can_interpret(params: object) -> bool:
  # Public since its interpreter knows tensor memory.
  known = getattr(plgpu, "InterpretGPUParams", None)
  return known is not None and isinstance(params, known)


def _forward_run(
  chip: Chip,
  problem: Problem,
  run: StridedHeads,
  settings: Settings,
  operands: Operands,
) -> tuple[Array, Array]:
  assert problem.q_offset is not None
  heads = run.stop - run.start
  q, k, v = map(in_eights, operands[:3])
  # TMA stores whole rows of 16 bytes: lengths off the tile get room.
  rows = problem.q_tiles * problem.tiling.block_q
  out, lse = call(
    chip,
    problem,
    functools.partial(
      kernel,
      chip,
      problem,
      Shards.of(problem, run.local, run.stride),
      start=run.start,
    ),
    grid={"heads": heads, "tiles": problem.q_tiles, "batch": problem.B},
    inputs=(
      q,
      k,
      v,
      jnp.arange(rows, dtype=jnp.int32) + problem.q_offset,
      segment_ids(operands.q_segment_ids),
      segment_ids(operands.kv_segment_ids),
      jnp.asarray(run.residues, jnp.int32),
    ),
    out_type=(
      jax.ShapeDtypeStruct(
        (problem.B, q.shape[1], heads, problem.Hv), problem.dtype
      ),
      jax.ShapeDtypeStruct((problem.B, heads, rows), jnp.float32),
    ),
    interpret=settings.interpret,
    name="head_attention_forward",
  )
  return out[:, : problem.T], lse[..., : problem.T]


def segment_ids(ids: Int[Array, "B S"] | None) -> Int[Array, "B S"] | None:
  """As the kernel takes them: TMA wants rows of multiples of 16 bytes."""
  return None if ids is None else in_eights(ids.astype(jnp.int32))


def in_eights(x: Array) -> Array:
  """Tokens padded to a multiple of the swizzle's rows; most lengths are one."""
  missing = -x.shape[1] % SWIZZLE_ROWS
  widths = [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]
  return jnp.pad(x, widths) if missing else x
