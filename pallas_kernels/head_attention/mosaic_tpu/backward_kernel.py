"""Backward TPU kernels of head attention.

  p  = exp(logits - lse)         dv = p d_out
  ds = p (v d_out - delta)       dq = scale k ds,  dk = scale ds q

One kernel goes key tile by key tile, with the query heads of a KV head
innermost: five products a tile, and sums have one order. dk and dv stay in the
vector memory until their tile is done; dq is added to in HBM.
"""

import functools
from typing import Any, NamedTuple

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
from pallas_kernels.head_attention.mosaic_tpu.masks import hide
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.mosaic_tpu.query_sums import (
  Position,
  QuerySums,
)
from pallas_kernels.head_attention.mosaic_tpu.tile import (
  LOG2_E,
  Code,
  Logits,
  Overlap,
  Tile,
  TileContext,
  matmul,
  visit_tile,
)


def _products(
  context: TileContext, tile: Tile, code: Code, chunk: Chunk
) -> tuple[Logits, jax.Array]:
  """Logits of a chunk, and the gradient of its weights, [keys, queries]."""
  d_out = context.rows(context.inputs.queries.d_out, chunk)
  return context.logits(tile, code, chunk), matmul(tile.v, d_out, (1, 1))


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
  # The value of a hidden key may be so large that dp is infinite.
  ds = hide(ds, logits.mask, 0.0)
  return p.astype(queries.q.dtype), ds.astype(queries.q.dtype)


def _kernel(
  tables: Any,
  inputs: specs.Inputs,
  previous: Any,
  dk_ref: Any,
  dv_ref: Any,
  dq_ref: Any,
  dk_acc_ref: Any,
  dv_acc_ref: Any,
  *dq_scratch: Any,
  layout: Layout,
  call: Call,
  scale: float,
  soft_cap: float | None,
  overlap: Overlap,
  adds: bool,
) -> None:
  at = Position.here(tables, call)
  item, member = at.item, at.member
  step = read_step(tables, at.row, item, member, call.members)
  dq_sums = QuerySums(dq_ref, *dq_scratch)
  dq_sums.begin(at)

  @pl.when(((step.flags & FIRST) != 0) & (member == 0))
  def start() -> None:
    dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
    dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

  context = TileContext(layout, scale, soft_cap, tables, inputs, item, step)

  def add(
    tile: Tile, chunk: Chunk, weights: tuple[jax.Array, jax.Array]
  ) -> None:
    p, ds = weights
    # This order takes the fewest bundles where one chunk is all of the tile.
    dq_sums.add(at, pl.ds(chunk.start, chunk.size), matmul(tile.k, ds, (0, 0)))
    d_out = context.rows(inputs.queries.d_out, chunk)
    rows = pl.ds(chunk.first_key, chunk.keys)
    dv_acc_ref[rows] += matmul(p, d_out, (1, 0))
    q = context.rows(inputs.queries.q, chunk)
    dk_acc_ref[rows] += matmul(ds, q, (1, 0))

  visit_tile(
    context,
    call,
    overlap,
    functools.partial(_products, context),
    functools.partial(_weigh, context),
    add,
  )
  dq_sums.end(at)

  @pl.when(((step.flags & LAST) != 0) & (member == call.members - 1))
  def finish() -> None:
    dk = (dk_acc_ref[...] * scale).reshape(dk_ref.shape)
    dv = dv_acc_ref[...].reshape(dv_ref.shape)
    if adds:
      dk += previous[0][...]
      dv += previous[1][...]
    dk_ref[...] = dk.astype(dk_ref.dtype)
    dv_ref[...] = dv.astype(dv_ref.dtype)


class Gradients(NamedTuple):
  """What the calls of a run write, one after the other.

  Attributes:
    k: [B, K of the run, S, H]; None before the first call if that writes all.
    v: The same for Hv.
    q: Float32 [B, N, H, T], without the scale.
  """

  k: Any
  v: Any
  q: Any


def add_gradients(
  layout: Layout,
  call: Call,
  queries: specs.Queries,
  keys: specs.Keys,
  *,
  scale: float,
  soft_cap: float | None,
  overlap: Overlap,
  dtype: Any,
  previous: Gradients,
  adds: bool,
  vmem_bytes: int | None,
  interpret: Any,
) -> Gradients:
  """Gradients after a call.

  Args:
    layout: Static sizes.
    call: Items of the near part, or of the far part.
    queries, keys: What they read.
    scale, soft_cap: Of the logits.
    overlap: How query tiles are cut.
    dtype: Of the gradients of k and v.
    previous: The gradients before it; they are written into.
    adds: Adds to those of k and v instead of replacing them.
    vmem_bytes: Limit of the vector memory.
    interpret: For `pallas_call`.
  """
  batch, _, length, _ = keys.k.shape
  heads = layout.kv_stop - layout.kv_start
  sizes = (keys.k.shape[-1], keys.v.shape[-1])
  shapes = tuple((batch, heads, length, size) for size in sizes)
  far = call.has_far
  spec = specs.far_spec if far else specs.near_spec
  rows = layout.far_blocks * layout.block if far else layout.tiling.block_kv
  views: tuple[tuple[int, ...], ...] = shapes
  if far:
    views = tuple(specs.shard_shape(layout, shape, 2) for shape in shapes)
  dk, dv, dq = specs.run_call(
    functools.partial(
      _kernel,
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
    name="head_attention_backward",
    out_shapes=(
      *(jax.ShapeDtypeStruct(view, dtype) for view in views),
      jax.ShapeDtypeStruct(previous.q.shape, jnp.float32),
    ),
    out_specs=(
      *(spec(layout, call.members, size, layout.kv_start) for size in sizes),
      pl.BlockSpec(memory_space=pl.ANY),
    ),
    scratch=(
      *(pltpu.VMEM((rows, size), jnp.float32) for size in sizes),
      *QuerySums.scratch(sizes[0], layout.tiling.block_q),
    ),
    previous=(
      *(
        None if array is None else array.reshape(view)
        for array, view in zip(previous[:2], views, strict=True)
      ),
      previous.q,
    ),
    reads_previous=adds,
    vmem_bytes=vmem_bytes,
    interpret=interpret,
  )
  return Gradients(dk.reshape(shapes[0]), dv.reshape(shapes[1]), dq)
