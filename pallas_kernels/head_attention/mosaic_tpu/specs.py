"""How the TPU kernels fetch their operands: layouts, index maps, grid.

Inside, queries are [B, N, T, H] and keys [B, K, S, H], padded to whole tiles.
A far tile is a block of the shard view: keys as [B, K, S / (stride b), stride,
b, H], so that a slice at the head's residue is one large tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.head_attention.mosaic_tpu.items import (
  Call,
  Step,
  read_step,
)
from pallas_kernels.head_attention.mosaic_tpu.lookup import (
  tile_words,
  words_index,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout

_LANES = 128
_SUBLANES = 8


class Keys(NamedTuple):
  """One view of the keys.

  Attributes:
    k, v: [B, K, S, H], or the shard view of it.
    segment_ids: [B, S, 128], or the shard view of it.
  """

  k: Any
  v: Any
  segment_ids: Any


class Queries(NamedTuple):
  """What a query tile brings.

  Attributes:
    q: [B, N, T, H].
    segment_ids: [B, 8, T].
    positions: Of packed queries among the keys, int32 [B, 8, T]. The second of
      the eight rows says where in `words` to look, negative for nowhere.
    d_out: Cotangent of the output, [B, N, T, Hv]; backward only.
    lse: In base 2, float32 [B, N, 1, T]; backward only.
    delta: Row sums of out * d_out, less the cotangent of the log-sum-exp;
      float32 [B, N, 1, T]; backward only.
    words: Tables of packed queries, int32 [tables, words, rows, 128]; see
      `lookup`.
  """

  q: Any
  segment_ids: Any
  positions: Any = None
  d_out: Any = None
  lse: Any = None
  delta: Any = None
  words: Any = None


class Inputs(NamedTuple):
  """What a kernel reads; a view that it does not need is None."""

  queries: Queries
  near: Keys | None
  far: Keys | None


IndexMap = Callable[..., tuple[Any, ...]]


def _index_map(
  members: int, place: Callable[[Any, Step, Any], tuple[Any, ...]]
) -> IndexMap:
  def index_map(
    batch: Any, row: Any, item: Any, member: Any, tables: Any
  ) -> tuple[Any, ...]:
    step = read_step(tables, row, item, member, members)
    return place(batch, step, tables)

  return index_map


def pad_tokens(x: jax.Array, axis: int, length: int) -> jax.Array:
  """Zeros up to `length` tokens."""
  missing = length - x.shape[axis]
  if not missing:
    return x
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, missing)
  return jnp.pad(x, widths)


def near_keys(
  layout: Layout, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None
) -> Keys:
  """Keys as the kernels want them, from the public layout."""
  if segment_ids is not None:
    segment_ids = pad_tokens(segment_ids, 1, layout.kv_padded)
    segment_ids = jnp.broadcast_to(
      segment_ids[..., None], (*segment_ids.shape, _LANES)
    )
  k, v = (pad_tokens(x.swapaxes(1, 2), 2, layout.kv_padded) for x in (k, v))
  return Keys(k, v, segment_ids)


def shard_shape(
  layout: Layout, shape: tuple[int, ...], axis: int
) -> tuple[int, ...]:
  """The shape with the tokens of an axis as [S / (stride b), stride, b]."""
  tokens = layout.stride * layout.block
  split = (shape[axis] // tokens, layout.stride, layout.block)
  return (*shape[:axis], *split, *shape[axis + 1 :])


def shard_view(layout: Layout, x: jax.Array, axis: int) -> jax.Array:
  """The array in that shape; costs nothing."""
  return x.reshape(shard_shape(layout, x.shape, axis))


def views(layout: Layout, call: Call, keys: Keys) -> dict[str, Keys | None]:
  """The views of the keys that a call reads."""
  far = None
  if call.has_far:
    ids = keys.segment_ids
    far = Keys(
      shard_view(layout, keys.k, 2),
      shard_view(layout, keys.v, 2),
      None if ids is None else shard_view(layout, ids, 1),
    )
  return {"near": keys if call.has_near else None, "far": far}


def on_sublanes(numbers: jax.Array) -> jax.Array:
  """One number a query, [B, T], as the kernels read them: [B, 8, T]."""
  batch, length = numbers.shape
  return jnp.broadcast_to(numbers[:, None], (batch, _SUBLANES, length))


def make_queries(
  q: jax.Array, segment_ids: jax.Array | None, q_padded: int
) -> Queries:
  """Queries as the kernels want them, from the public layout."""
  if segment_ids is not None:
    segment_ids = on_sublanes(pad_tokens(segment_ids, 1, q_padded))
  return Queries(pad_tokens(q.swapaxes(1, 2), 2, q_padded), segment_ids)


def query_spec(layout: Layout, members: int, size: int) -> pl.BlockSpec:
  """A query tile of an array [B, N, T, size]."""
  return pl.BlockSpec(
    (None, None, layout.tiling.block_q, size),
    _index_map(
      members,
      lambda batch, step, tables: (
        batch,
        tables.heads[step.member],
        step.q_tile,
        0,
      ),
    ),
  )


def row_spec(layout: Layout, members: int) -> pl.BlockSpec:
  """A query tile's statistics, of an array [B, N, 1, T]."""
  return pl.BlockSpec(
    (None, None, 1, layout.tiling.block_q),
    _index_map(
      members,
      lambda batch, step, tables: (
        batch,
        tables.heads[step.member],
        0,
        step.q_tile,
      ),
    ),
  )


def near_spec(
  layout: Layout, members: int, size: int, first_head: int = 0
) -> pl.BlockSpec:
  """A contiguous key tile of an array [B, K, S, size].

  Args:
    layout: Static sizes.
    members: Query heads of a row.
    size: Of the last axis.
    first_head: KV head that the array starts with.
  """
  return pl.BlockSpec(
    (None, None, layout.tiling.block_kv, size),
    _index_map(
      members,
      lambda batch, step, tables: (
        batch,
        tables.kv_heads[step.member] - first_head,
        step.near_tile,
        0,
      ),
    ),
  )


def far_spec(
  layout: Layout, members: int, size: int, first_head: int = 0
) -> pl.BlockSpec:
  """A tile of the head's shard, of the shard view of such an array."""
  return pl.BlockSpec(
    (None, None, layout.far_blocks, None, layout.block, size),
    _index_map(
      members,
      lambda batch, step, tables: (
        batch,
        tables.kv_heads[step.member] - first_head,
        step.far_tile,
        tables.residues[step.member],
        0,
        0,
      ),
    ),
  )


def words_spec(
  layout: Layout, members: int, shape: tuple[int, ...]
) -> pl.BlockSpec:
  """The words of a contiguous key tile, of all packed queries."""
  return pl.BlockSpec(
    (None, tile_words(layout), *shape[2:]),
    _index_map(
      members,
      lambda _, step, tables: (
        tables.residues[step.member],
        words_index(layout, step.near_tile),
        0,
        0,
      ),
    ),
  )


def input_specs(layout: Layout, members: int, inputs: Inputs) -> Inputs:
  """Block specs of all inputs."""
  queries, near, far = inputs

  def if_given(array: Any, spec: pl.BlockSpec) -> pl.BlockSpec | None:
    return None if array is None else spec

  def of_queries(array: Any) -> pl.BlockSpec | None:
    return if_given(
      array,
      query_spec(layout, members, 0 if array is None else array.shape[-1]),
    )

  statistics = row_spec(layout, members)
  query_ids = pl.BlockSpec(
    (None, _SUBLANES, layout.tiling.block_q),
    _index_map(members, lambda batch, step, _: (batch, 0, step.q_tile)),
  )
  near_ids = pl.BlockSpec(
    (None, layout.tiling.block_kv, _LANES),
    _index_map(
      members,
      lambda batch, step, tables: (
        batch + tables.sequences[step.member],
        step.near_tile,
        0,
      ),
    ),
  )
  far_ids = pl.BlockSpec(
    (None, layout.far_blocks, None, layout.block, _LANES),
    _index_map(
      members,
      lambda batch, step, tables: (
        batch + tables.sequences[step.member],
        step.far_tile,
        tables.residues[step.member],
        0,
        0,
      ),
    ),
  )
  return Inputs(
    Queries(
      of_queries(queries.q),
      if_given(queries.segment_ids, query_ids),
      if_given(queries.positions, query_ids),
      of_queries(queries.d_out),
      if_given(queries.lse, statistics),
      if_given(queries.delta, statistics),
      None
      if queries.words is None
      else words_spec(layout, members, queries.words.shape),
    ),
    near
    and Keys(
      near_spec(layout, members, near.k.shape[-1]),
      near_spec(layout, members, near.v.shape[-1]),
      if_given(near.segment_ids, near_ids),
    ),
    far
    and Keys(
      far_spec(layout, members, far.k.shape[-1]),
      far_spec(layout, members, far.v.shape[-1]),
      if_given(far.segment_ids, far_ids),
    ),
  )


def run_call(
  kernel: Callable[..., None],
  layout: Layout,
  call: Call,
  inputs: Inputs,
  *,
  name: str,
  out_shapes: tuple[jax.ShapeDtypeStruct, ...],
  out_specs: tuple[pl.BlockSpec, ...],
  scratch: tuple[Any, ...],
  previous: tuple[jax.Array | None, ...],
  reads_previous: bool = False,
  vmem_bytes: int | None,
  interpret: Any,
) -> tuple[jax.Array, ...]:
  """Runs a kernel over the items of a call.

  Args:
    kernel: Takes the tables, the inputs, what was in the outputs, the outputs
      and the scratch buffers.
    layout: Static sizes.
    call: The items.
    inputs: What it reads.
    name: Of the kernel.
    out_shapes, out_specs: What it writes.
    scratch: Buffers.
    previous: Arrays to write into, one an output; None makes a new one, in
      which whatever the items do not write is undefined.
    reads_previous: The kernel gets the tiles of `previous`.
    vmem_bytes: Limit of the vector memory; None for the compiler's own.
    interpret: For `pallas_call`.
  """
  specs = input_specs(layout, call.members, inputs)
  untouched = pl.BlockSpec(memory_space=pl.ANY)
  previous_specs = tuple(
    array if array is None else spec if reads_previous else untouched
    for array, spec in zip(previous, out_specs, strict=True)
  )
  before = len(jax.tree.leaves((call.tables, inputs)))
  given = [at for at, array in enumerate(previous) if array is not None]
  aliases = {before + at: output for at, output in enumerate(given)}
  batch = inputs.queries.q.shape[0]
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(batch, call.rows, call.items, call.members),
      in_specs=(specs, previous_specs),
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    out_shape=out_shapes,
    input_output_aliases=aliases,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=vmem_bytes,
    ),
    interpret=interpret,
    name=name,
  )(call.tables, inputs, previous)
