"""Routed attention on GPUs from Hopper on: Pallas Mosaic GPU forward kernels.

Head attention's program on packed rows: which keys a tile of rows visits, and
the last key that each row may see, are read from global memory.

Compiled for sm_90 and sm_100, right in JAX's interpreter (which lacks wgmma
from registers, one of Hopper's two products), not yet run on a GPU: unmeasured,
its numbers not yet shown, asked for by name only.
Gradients are Triton's.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.head_attention import operands as head_operands
from pallas_kernels.head_attention.mosaic_gpu import chips
from pallas_kernels.head_attention.mosaic_gpu.chips import Chip
from pallas_kernels.head_attention.mosaic_gpu.implementation import (
  forward_refusal,
  in_eights,
  segment_ids,
)
from pallas_kernels.head_attention.mosaic_gpu.kernel import (
  Job,
  Scratch,
  attend,
  call,
)
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton.problem import (
  LOG2_E,
  Problem,
  describe,
)
from pallas_kernels.head_attention.triton.walks import Shards
from pallas_kernels.routed_attention import triton
from pallas_kernels.routed_attention.mosaic_gpu.tiles import (
  COLUMNS,
  Kind,
  Tile,
  kinds,
  tiles_of,
)
from pallas_kernels.routed_attention.operands import (
  Operands,
  Settings,
  of_heads,
  seen_up_to,
)

backward = triton.backward


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered; None if they are.

  Looks at shapes, dtypes and static settings only.
  """
  return forward_refusal(
    _head_settings(settings, operands), of_heads(operands)
  ) or triton.refusal(settings, operands)


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "rows H"], Float[Array, " rows"]]:
  """Output and log-sum-exp; see `operands.Implementation`."""
  chip = chips.find()
  assert chip is not None
  problem = make_problem(settings, operands)
  packing = operands.packing
  first, *others = kinds(settings, packing.num_heads)
  attend_kind = functools.partial(
    _forward_kind, chip, problem, settings, operands
  )
  out, lse = attend_kind(first)
  for kind in others:
    is_member = jnp.asarray(kind.is_member)[packing.row_head]
    other_out, other_lse = attend_kind(kind)
    out = jnp.where(is_member[:, None], other_out, out)
    lse = jnp.where(is_member, other_lse, lse)
  return out, lse * LOG2_E


def make_problem(settings: Settings, operands: Operands) -> Problem:
  """What head attention's program needs to know."""
  head_settings = _head_settings(settings, operands)
  assert head_settings.tiling is not None
  return describe(head_settings, of_heads(operands), head_settings.tiling)


def _forward_kind(
  chip: Chip,
  problem: Problem,
  settings: Settings,
  operands: Operands,
  kind: Kind,
) -> tuple[Array, Array]:
  """Output and natural log-sum-exp; rows of other heads see nothing."""
  tiles = tiles_of(kind, settings, operands, problem.tiling).table()
  return call(
    chip,
    problem,
    functools.partial(
      _kernel,
      chip,
      problem,
      Shards.of(problem, kind.run.local, kind.run.stride),
    ),
    grid={"tiles": tiles.shape[0]},
    inputs=(
      operands.q,
      in_eights(operands.k),
      in_eights(operands.v),
      seen_up_to(settings, operands),
      _row_segments(operands),
      segment_ids(operands.kv_segment_ids),
      tiles,
    ),
    out_type=(
      jax.ShapeDtypeStruct(operands.q.shape, operands.q.dtype),
      jax.ShapeDtypeStruct(operands.q.shape[:1], jnp.float32),
    ),
    interpret=settings.interpret,
    name="routed_attention_forward",
  )


def _row_segments(operands: Operands) -> Int[Array, " rows"] | None:
  ids = operands.q_segment_ids
  if ids is None:
    return None
  flat = ids.reshape(-1).astype(jnp.int32)
  return flat.at[operands.packing.row_token].get(mode="clip")


def _kernel(
  chip: Chip,
  problem: Problem,
  shards: Shards,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  limits_ref: Any,
  q_segments_ref: Any,
  kv_segments_ref: Any,
  tiles_ref: Any,
  out_ref: Any,
  lse_ref: Any,
  scratch: Scratch,
) -> None:
  # A segment's last rows see most: they go first, or the end has idle cores.
  index = tiles_ref.shape[0] - 1 - lax.axis_index("tiles")
  tile = Tile.read([tiles_ref[index, column] for column in range(COLUMNS)])
  job = Job(
    first_row=index * problem.tiling.block_q,
    q=q_ref,
    out=out_ref,
    lse=lse_ref,
    limits=limits_ref,
    q_segments=q_segments_ref,
    k=k_ref.at[tile.sequence, :, tile.kv_head],
    v=v_ref.at[tile.sequence, :, tile.kv_head],
    kv_segments=(
      kv_segments_ref.at[tile.sequence] if problem.has_segments else None
    ),
    visits=tile.places(shards),
    residue=tile.residue,
  )
  attend(chip, problem, shards, job, scratch)


def _head_settings(
  settings: Settings, operands: Operands
) -> head_operands.Settings:
  """What head attention would be asked for, with the kernel's tiles.

  Those are the chip's own, or smaller ones if the caller's are smaller.
  """
  chip, size = chips.find(), operands.q.shape[1]
  tiling = Tiling(
    block_q=settings.tiling.block_q, block_kv=settings.tiling.block_kv
  )
  if chip is not None and size in chip.tilings:
    own = chip.tilings[size]
    tiling = Tiling(
      block_q=min(own.block_q, tiling.block_q),
      block_kv=min(own.block_kv, tiling.block_kv),
    )
  heads = operands.packing.num_heads
  return dataclasses.replace(settings.of_heads(heads), tiling=tiling)
