"""Forward TPU kernel of head attention."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.head_attention.mosaic_tpu import specs
from pallas_kernels.head_attention.mosaic_tpu.edges import Chunk
from pallas_kernels.head_attention.mosaic_tpu.items import (
  FIRST,
  LAST,
  Call,
  read_step,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.mosaic_tpu.tile import (
  LOG2_E,
  LOWEST,
  Logits,
  Overlap,
  Tile,
  TileContext,
  cut,
  matmul,
  visit_tile,
)


def _times(x: jax.Array, factor: float) -> jax.Array:
  return x if factor == 1 else x * factor


def _kernel(
  tables: Any,
  inputs: specs.Inputs,
  previous: Any,
  out_ref: Any,
  lse_ref: Any,
  m_ref: Any,
  l_ref: Any,
  acc_ref: Any,
  *,
  layout: Layout,
  call: Call,
  scale: float,
  soft_cap: float | None,
  overlap: Overlap,
) -> None:
  del previous  # The rest of the arrays that are written into.
  row, item, member = (pl.program_id(axis) for axis in (1, 2, 3))
  step = read_step(tables, row, item, member, call.members)

  @pl.when((step.flags & FIRST) != 0)
  def start() -> None:
    m_ref[...] = jnp.full_like(m_ref, LOWEST)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  context = TileContext(layout, scale, soft_cap, tables, inputs, item, step)

  def weigh(chunk: Chunk, logits: Logits) -> tuple[jax.Array, jax.Array]:
    """Weights [keys, queries], and what earlier sums shrink by."""
    m_old = context.columns(m_ref, chunk)
    values, base2 = logits.values, context.unit * LOG2_E
    if overlap.scales_first:
      values, base2 = values * base2, 1.0
    m_new = m_old
    for piece in cut(values, overlap.pieces):
      m_new = jnp.maximum(m_new, jnp.max(piece, axis=0, keepdims=True))
    p = jnp.exp2(_times(values - m_new, base2))
    shrink = jnp.exp2(_times(m_old - m_new, base2))
    at = pl.ds(chunk.start, chunk.size)
    total = jnp.sum(p, axis=0, keepdims=True)
    m_ref[:, at] = m_new
    l_ref[:, at] = l_ref[:, at] * shrink + total
    return p.astype(out_ref.dtype), shrink

  def add(
    tile: Tile, chunk: Chunk, weights: tuple[jax.Array, jax.Array]
  ) -> None:
    p, shrink = weights
    at = pl.ds(chunk.start, chunk.size)
    acc_ref[:, at] = acc_ref[:, at] * shrink + matmul(tile.v, p, (0, 0))

  multiply = functools.partial(context.logits, pieces=overlap.pieces)
  visit_tile(context, call, overlap, multiply, weigh, add)

  @pl.when((step.flags & LAST) != 0)
  def finish() -> None:
    l = l_ref[...]
    seen = l > 0
    safe = jnp.where(seen, l, 1.0)
    # Rows that see nothing have a zero accumulator.
    out_ref[...] = (acc_ref[...] / safe).T.astype(out_ref.dtype)
    unit = 1 / LOG2_E if overlap.scales_first else context.unit
    lse = m_ref[...] * unit + jnp.log(safe)
    lse_ref[...] = jnp.where(seen, lse, -jnp.inf)


def attend(
  layout: Layout,
  call: Call,
  queries: specs.Queries,
  keys: specs.Keys,
  *,
  scale: float,
  soft_cap: float | None,
  overlap: Overlap,
  previous: tuple[jax.Array | None, jax.Array | None],
  vmem_bytes: int | None,
  interpret: Any,
) -> tuple[jax.Array, jax.Array]:
  """Output [B, N, T, Hv] and log-sum-exp [B, N, 1, T] where the call writes."""
  batch, heads, length, _ = queries.q.shape
  v_size = keys.v.shape[-1]
  block_q = layout.tiling.block_q
  out, lse = specs.run_call(
    functools.partial(
      _kernel,
      layout=layout,
      call=call,
      scale=scale,
      soft_cap=soft_cap,
      overlap=overlap,
    ),
    layout,
    call,
    specs.Inputs(queries, **specs.views(layout, call, keys)),
    name="head_attention_forward",
    out_shapes=(
      jax.ShapeDtypeStruct((batch, heads, length, v_size), queries.q.dtype),
      jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32),
    ),
    out_specs=(
      specs.query_spec(layout, call.members, v_size),
      specs.row_spec(layout, call.members),
    ),
    scratch=(
      pltpu.VMEM((1, block_q), jnp.float32),
      pltpu.VMEM((1, block_q), jnp.float32),
      pltpu.VMEM((v_size, block_q), jnp.float32),
    ),
    previous=previous,
    vmem_bytes=vmem_bytes,
    interpret=interpret,
  )
  return out, lse
