"""Backward TPU kernels of head attention.

  p  = exp(logits - lse)         dv = p d_out
  ds = p (v d_out - delta)       dq = scale k ds,  dk = scale ds q

One kernel goes query tile by query tile for dq, one key tile by key tile for
dk and dv, with the query heads of a KV head innermost: sums have one order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.head_attention.mosaic_tpu import specs
from pallas_kernels.head_attention.mosaic_tpu.items import (
  EDGE,
  FAR,
  FIRST,
  LAST,
  Call,
  read_step,
)
from pallas_kernels.head_attention.mosaic_tpu.masks import Chunk
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.mosaic_tpu.tile import (
  LOG2_E,
  Logits,
  Overlap,
  Tile,
  TileContext,
  chunk_by_chunk,
  load_tile,
  matmul,
)


def _products(
  context: TileContext, tile: Tile, kind: int, chunk: Chunk
) -> tuple[Logits, jax.Array]:
  """Logits of a chunk, and the gradient of its weights, [keys, queries]."""
  d_out = context.rows(context.inputs.queries.d_out, chunk)
  return context.logits(tile, kind, chunk), matmul(tile.v, d_out, (1, 1))


def _weigh(
  context: TileContext, chunk: Chunk, products: tuple[Logits, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """P and ds of a chunk, [keys, queries] in the inputs' dtype."""
  logits, dp = products
  queries = context.inputs.queries
  base2 = logits.values * (context.unit * LOG2_E)
  p = jnp.exp2(base2 - context.columns(queries.lse, chunk))
  ds = p * (dp - context.columns(queries.delta, chunk))
  if logits.slope is not None:
    ds = ds * logits.slope
  if logits.mask is not None:
    # The value of a hidden key may be so large that dp is infinite.
    ds = jnp.where(logits.mask, ds, 0.0)
  return p.astype(queries.q.dtype), ds.astype(queries.q.dtype)


def _dq_kernel(
  tables: Any,
  inputs: specs.Inputs,
  previous: Any,
  dq_ref: Any,
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
    acc_ref[...] = jnp.zeros_like(acc_ref)

  context = TileContext(layout, scale, soft_cap, tables, inputs, item, step)

  def add_tile(kind: int) -> None:
    tile = load_tile(inputs, kind)

    def add(chunk: Chunk, weights: tuple[jax.Array, jax.Array]) -> None:
      at = pl.ds(chunk.start, chunk.size)
      acc_ref[:, at] += matmul(tile.k, weights[1], (0, 0))

    chunk_by_chunk(
      layout.tiling.block_q,
      overlap,
      functools.partial(_products, context, tile, kind),
      functools.partial(_weigh, context),
      add,
    )

  for kind in call.kinds:
    pl.when((step.flags & (FAR | EDGE)) == kind)(
      functools.partial(add_tile, kind)
    )

  @pl.when((step.flags & LAST) != 0)
  def finish() -> None:
    dq_ref[...] = (acc_ref[...] * scale).T.astype(dq_ref.dtype)


def _dkv_kernel(
  tables: Any,
  inputs: specs.Inputs,
  previous: Any,
  dk_ref: Any,
  dv_ref: Any,
  dk_acc_ref: Any,
  dv_acc_ref: Any,
  *,
  layout: Layout,
  call: Call,
  scale: float,
  soft_cap: float | None,
  overlap: Overlap,
  adds: bool,
) -> None:
  row, item, member = (pl.program_id(axis) for axis in (1, 2, 3))
  step = read_step(tables, row, item, member, call.members)

  @pl.when(((step.flags & FIRST) != 0) & (member == 0))
  def start() -> None:
    dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
    dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

  context = TileContext(layout, scale, soft_cap, tables, inputs, item, step)

  def add_tile(kind: int) -> None:
    tile = load_tile(inputs, kind)

    def add(chunk: Chunk, weights: tuple[jax.Array, jax.Array]) -> None:
      p, ds = weights
      d_out = context.rows(inputs.queries.d_out, chunk)
      dv_acc_ref[...] += matmul(p, d_out, (1, 0))
      q = context.rows(inputs.queries.q, chunk)
      dk_acc_ref[...] += matmul(ds, q, (1, 0))

    chunk_by_chunk(
      layout.tiling.block_q,
      overlap,
      functools.partial(_products, context, tile, kind),
      functools.partial(_weigh, context),
      add,
    )

  for kind in call.kinds:
    pl.when((step.flags & (FAR | EDGE)) == kind)(
      functools.partial(add_tile, kind)
    )

  @pl.when(((step.flags & LAST) != 0) & (member == call.members - 1))
  def finish() -> None:
    dk = (dk_acc_ref[...] * scale).reshape(dk_ref.shape)
    dv = dv_acc_ref[...].reshape(dv_ref.shape)
    if adds:
      dk += previous[0][...]
      dv += previous[1][...]
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


def query_gradient(
  layout: Layout,
  call: Call,
  queries: specs.Queries,
  keys: specs.Keys,
  *,
  scale: float,
  soft_cap: float | None,
  overlap: Overlap,
  previous: tuple[jax.Array] | None,
  vmem_bytes: int | None,
  interpret: Any,
) -> tuple[jax.Array]:
  """Gradient of q, [B, N, T, H], where the call writes."""
  size = queries.q.shape[-1]
  (dq,) = specs.run_call(
    functools.partial(
      _dq_kernel,
      layout=layout,
      call=call,
      scale=scale,
      soft_cap=soft_cap,
      overlap=overlap,
    ),
    layout,
    call,
    specs.Inputs(queries, **specs.views(layout, call, keys)),
    name="head_attention_dq",
    out_shapes=(jax.ShapeDtypeStruct(queries.q.shape, queries.q.dtype),),
    out_specs=(specs.query_spec(layout, call.members, size),),
    scratch=(pltpu.VMEM((size, layout.tiling.block_q), jnp.float32),),
    previous=previous,
    vmem_bytes=vmem_bytes,
    interpret=interpret,
  )
  return (dq,)


def key_gradients(
  layout: Layout,
  call: Call,
  queries: specs.Queries,
  keys: specs.Keys,
  *,
  scale: float,
  soft_cap: float | None,
  overlap: Overlap,
  dtype: Any,
  previous: tuple[jax.Array, ...] | None,
  adds: bool,
  vmem_bytes: int | None,
  interpret: Any,
) -> tuple[jax.Array, ...]:
  """Gradients of k and v where the call writes.

  Args:
    layout: Static sizes.
    call: Items of the near part, or of the far part.
    queries, keys: What they read.
    scale, soft_cap: Of the logits.
    overlap: How query tiles are cut.
    dtype: Of the gradients.
    previous: Arrays to write into, as what is returned.
    adds: Adds to what is in `previous` instead of replacing it.
    vmem_bytes: Limit of the vector memory.
    interpret: For `pallas_call`.

  Returns:
    [B, K of the run, S, H] and the same for Hv.
  """
  batch, _, length, _ = keys.k.shape
  heads = layout.kv_stop - layout.kv_start
  sizes = (keys.k.shape[-1], keys.v.shape[-1])
  shapes = [
    jax.ShapeDtypeStruct((batch, heads, length, size), dtype) for size in sizes
  ]
  far = call.has_far
  spec = specs.far_spec if far else specs.near_spec
  rows = layout.far_blocks * layout.block if far else layout.tiling.block_kv
  if far:
    shapes = [
      jax.ShapeDtypeStruct(
        jax.eval_shape(
          functools.partial(specs.shard_view, layout, axis=2), shape
        ).shape,
        dtype,
      )
      for shape in shapes
    ]
    if previous is not None:
      previous = tuple(specs.shard_view(layout, x, 2) for x in previous)
  results = specs.run_call(
    functools.partial(
      _dkv_kernel,
      layout=layout,
      call=call,
      scale=scale,
      soft_cap=soft_cap,
      overlap=overlap,
      adds=adds,
    ),
    layout,
    call,
    specs.Inputs(queries, **specs.views(layout, call, keys)),
    name="head_attention_dkv",
    out_shapes=tuple(shapes),
    out_specs=tuple(
      spec(layout, call.members, size, layout.kv_start) for size in sizes
    ),
    scratch=tuple(pltpu.VMEM((rows, size), jnp.float32) for size in sizes),
    previous=previous,
    reads_previous=adds,
    vmem_bytes=vmem_bytes,
    interpret=interpret,
  )
  return tuple(x.reshape(batch, heads, length, x.shape[-1]) for x in results)
