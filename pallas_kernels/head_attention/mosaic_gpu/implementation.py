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
from jaxtyping import Array, Float

from pallas_kernels.head_attention import triton
from pallas_kernels.head_attention.mosaic_gpu import chips
from pallas_kernels.head_attention.mosaic_gpu.chips import Chip
from pallas_kernels.head_attention.mosaic_gpu.kernel import Scratch, kernel
from pallas_kernels.head_attention.mosaic_gpu.products import SWIZZLE_ROWS
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import StridedHeads, split_heads
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.problem import Problem, describe
from pallas_kernels.head_attention.triton.walks import Shards


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered, with the way out; None if they are."""
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
  if operands.q_segment_ids is not None:
    return "`q_segment_ids` and `kv_segment_ids` must be None."
  if settings.q_offset is None:
    return "`q_offset` must be a Python int."
  if block < SWIZZLE_ROWS:
    return (
      f"`pattern` must have blocks of at least {SWIZZLE_ROWS} tokens, got "
      f"{block}."
    )
  tiling = chip.tiling(settings.tiling, H)
  T, S = q.shape[1], v.shape[1]
  least = min(block, tiling.block_kv)
  if chip.rows > T or least > S:
    return (
      f"there must be at least {chip.rows} queries and {least} keys, got {T} "
      f"and {S}."
    )
  return chips.tiling_refusal(chip, tiling, H) or triton.refusal(
    # The backward pass is theirs, with their own tiles.
    _for_triton(settings),
    operands,
  )


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
  heads = run.stop - run.start
  q, k, v = map(_in_eights, operands[:3])
  # TMA stores whole rows of 16 bytes: lengths off the tile get room.
  rows = problem.q_tiles * problem.tiling.block_q
  out, lse = plgpu.kernel(
    functools.partial(
      kernel,
      chip,
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
    scratch_types=(Scratch.types(chip, problem),),
    grid=(heads, problem.q_tiles, problem.B),
    grid_names=("heads", "tiles", "batch"),
    num_threads=chip.groups(problem.tiling) + 1,
    thread_name="group",
    kernel_name="head_attention_forward",
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=settings.interpret or None,
  )(q, k, v, jnp.asarray(run.residues, jnp.int32))
  return out[:, : problem.T], lse[..., : problem.T]


def _in_eights(x: Array) -> Array:
  """Rows padded to a multiple of the swizzle's; most lengths are one."""
  missing = -x.shape[1] % SWIZZLE_ROWS
  return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x
