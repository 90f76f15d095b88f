"""What a query tile sees of a key tile, inside the TPU kernels.

Masks have keys down and queries across, as the logits. Whatever belongs to a
block of keys is a scalar, spread over the block's rows.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.head_attention.mosaic_tpu.edges import (
  Chunk,
  Edge,
  Segment,
)
from pallas_kernels.head_attention.mosaic_tpu.items import (
  EDGE,
  FAR,
  Step,
)
from pallas_kernels.head_attention.mosaic_tpu.lookup import seen_by_rows
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.schedule import StridedHeads

# Last query of a key that stays visible.
_ALWAYS = np.int32(2**31 - 1)


class MaskedRows(NamedTuple):
  """Some keys of a chunk.

  Attributes:
    size: How many.
    mask: Bool [keys, queries]; None if every query sees every key.
  """

  size: int
  mask: jax.Array | None


Mask = list[MaskedRows]


def hide(values: jax.Array, mask: Mask, hidden: float) -> jax.Array:
  """[keys, queries] with `hidden` where the mask is False."""
  parts, first = [], 0
  for rows in mask:
    part = values[first : first + rows.size]
    first += rows.size
    if rows.mask is not None:
      part = jnp.where(rows.mask, part, hidden)
    parts.append(part)
  return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def tile_mask(
  layout: Layout,
  tables: Any,
  item: Any,
  step: Step,
  kind: int,
  edge: Edge | None,
  chunk: Chunk,
  positions: jax.Array | None,
  words: tuple[jax.Array, ...] | None = None,
) -> Mask:
  """Which keys of a chunk its queries see.

  Args:
    layout: Static sizes.
    tables: References to `Tables` in scalar memory.
    item: The item.
    step: The same, read.
    kind: The static part of the flags: FAR and EDGE.
    edge: How the tile lies, if that is static.
    chunk: Queries of the tile.
    positions: Of packed queries, int32 [1, queries].
    words: What such queries looked up, int32 [1, queries] each.
  """
  if edge is not None:
    segments = edge.segments(layout.tiling.block_kv, chunk)
    return [
      MaskedRows(segment.size, _segment(edge, segment, chunk))
      for segment in segments
    ]
  if not kind & EDGE:
    mask = None
  elif kind & FAR:
    mask = _far(layout, tables, step, chunk, positions)
  elif isinstance(layout.run, StridedHeads):
    mask = _window(layout, tables, step, chunk, positions)
  elif words is not None:
    assert positions is not None
    mask = seen_by_rows(layout, step, words, positions)
  else:
    mask = _table(layout, tables, item, step, chunk)
  return [MaskedRows(chunk.keys, mask)]


def with_segments(mask: Mask, q_ids: jax.Array, kv_ids: jax.Array) -> Mask:
  """Also hides other segments; ids [8, queries] and [keys, 128]."""
  result, first = [], 0
  for rows in mask:
    same = same_segment(q_ids, kv_ids[first : first + rows.size])
    first += rows.size
    result.append(
      MaskedRows(rows.size, same if rows.mask is None else rows.mask & same)
    )
  return result


def same_segment(q_ids: jax.Array, kv_ids: jax.Array) -> jax.Array:
  """Bool [keys, queries] from ids [8, queries] and [keys, 128]."""
  queries, lanes = q_ids.shape[1], kv_ids.shape[1]
  if queries < lanes:
    return q_ids[:1] == kv_ids[:, :queries]
  return q_ids[:1] == jnp.tile(kv_ids, (1, queries // lanes))


def _whole(tokens: Any, size: int) -> Any:
  """`tokens // size`, for a power of two; the TPU has no integer division."""
  return tokens >> (size.bit_length() - 1)


def _rows_of(
  values: Callable[[int], Any], blocks: int, block: int, queries: int
) -> jax.Array:
  """Int32 [blocks * block, queries]: a scalar for every block of keys."""
  return jnp.concatenate(
    [jnp.full((block, queries), values(at), jnp.int32) for at in range(blocks)]
  )


def _q_positions(
  layout: Layout, step: Step, chunk: Chunk, positions: jax.Array | None
) -> jax.Array:
  """Int32 [keys, queries]."""
  shape = (chunk.keys, chunk.size)
  if positions is not None:
    return jnp.broadcast_to(positions, shape)
  first = layout.q_offset + step.q_tile * layout.tiling.block_q + chunk.start
  return first + lax.broadcasted_iota(jnp.int32, shape, 1)


def _k_positions(layout: Layout, step: Step, chunk: Chunk) -> jax.Array:
  rows = lax.broadcasted_iota(jnp.int32, (chunk.keys, chunk.size), 0)
  return step.near_tile * layout.tiling.block_kv + chunk.first_key + rows


def _segment(edge: Edge, segment: Segment, chunk: Chunk) -> jax.Array | None:
  """Of keys that lie as an edge says; None if every query sees every key."""
  shape = (segment.size, chunk.size)
  key = lax.broadcasted_iota(jnp.int32, shape, 0)
  query = lax.broadcasted_iota(jnp.int32, shape, 1)
  masks = []
  if segment.causal:
    masks.append(key - query <= chunk.start + edge.offset - segment.first)
  if segment.window:
    rows = min(edge.block, segment.size)
    last = _rows_of(
      lambda at: edge.last_query(segment.first + at * rows) - chunk.start,
      segment.size // rows,
      rows,
      chunk.size,
    )
    masks.append(query <= last)
  if segment.tail:
    masks.append(key < edge.keys - segment.first)
  return functools.reduce(operator.and_, masks) if masks else None


def far_key_block(layout: Layout, tables: Any, step: Step, at: int) -> Any:
  """Number among all blocks of the `at`-th block of a far tile."""
  first = step.far_tile * layout.far_blocks * layout.stride
  return first + tables.residues[step.member] + at * layout.stride


def last_block(layout: Layout, tables: Any, step: Step) -> Any:
  """Block of the last query of a tile."""
  if layout.packed:
    first, second = (tables.lasts[2 * step.member + half] for half in (0, 1))
    last = jnp.maximum(first, second)
  else:
    block_q = layout.tiling.block_q
    last = layout.q_offset + (step.q_tile + 1) * block_q - 1
  return _whole(last, layout.block)


def halves_seen(layout: Layout, tables: Any, step: Step) -> Any:
  """`Halves.word` of packed queries and a contiguous tile."""
  assert isinstance(layout.run, StridedHeads)
  block, half = layout.block, layout.tiling.block_kv // 2
  word = 0
  for part in (0, 1):
    first, last = (
      each[2 * step.member + part] for each in (tables.firsts, tables.lasts)
    )
    window = (_whole(first, block) - layout.run.local + 1) * block
    for at in (0, 1):
      begin = (2 * step.near_tile + at) * half
      seen = window < begin + half
      if layout.run.sinks:
        seen |= begin < layout.run.sinks * block
      seen &= last >= begin
      word += seen.astype(jnp.int32) << (2 * part + at)
  return word


def _far(
  layout: Layout,
  tables: Any,
  step: Step,
  chunk: Chunk,
  positions: jax.Array | None,
) -> jax.Array:
  """Keys of the shard that the windows of the queries have left behind."""
  assert isinstance(layout.run, StridedHeads)
  block, local = layout.block, layout.run.local
  blocks = chunk.keys // block

  def rows_of(value: Callable[[Any], Any]) -> jax.Array:
    return _rows_of(
      lambda at: value(far_key_block(layout, tables, step, at)),
      blocks,
      block,
      chunk.size,
    )

  seen = _q_positions(layout, step, chunk, positions) >= rows_of(
    lambda number: (number + local) * block
  )
  if layout.kv_length < layout.kv_padded:
    inside = lax.broadcasted_iota(jnp.int32, seen.shape, 0) & (block - 1)
    seen &= inside < rows_of(lambda number: layout.kv_length - number * block)
  return seen


def _window(
  layout: Layout,
  tables: Any,
  step: Step,
  chunk: Chunk,
  positions: jax.Array | None,
) -> jax.Array:
  """Each key is seen from its own position to its last query's."""
  run = layout.run
  assert isinstance(run, StridedHeads)
  block_kv = layout.tiling.block_kv
  rows = min(layout.block, chunk.keys)
  first = _whole(step.near_tile * block_kv + chunk.first_key, layout.block)
  q_positions = _q_positions(layout, step, chunk, positions)
  k_positions = _k_positions(layout, step, chunk)
  seen = k_positions <= q_positions
  if layout.window is not None:
    if run.sinks and run.stride:
      # One division a tile: the head owns block `first + at` where `phase` is
      # minus `at`.
      residue = tables.residues[step.member]
      phase = lax.rem(first + run.stride - residue, run.stride)

    def last_query(at: int) -> Any:
      last = (first + at + run.local) * layout.block - 1
      if not run.sinks:
        return last
      is_sink = first + at < run.sinks
      if run.stride:
        # What the head owns is read with its shard.
        is_sink &= phase != -at % run.stride
      return jnp.where(is_sink, _ALWAYS, last)

    seen &= q_positions <= _rows_of(
      last_query,
      chunk.keys // rows,
      rows,
      chunk.size,
    )
  if layout.kv_length % block_kv:
    seen &= k_positions < layout.kv_length
  return seen


def _table(
  layout: Layout, tables: Any, item: Any, step: Step, chunk: Chunk
) -> jax.Array:
  """The blocks that the item's bits name."""
  block, block_kv = layout.block, layout.tiling.block_kv
  pointer = tables.pointers[item]
  words = _rows_of(
    lambda at: tables.bits[pointer + at], block_kv // block, block, chunk.size
  )
  first = layout.q_offset + step.q_tile * layout.tiling.block_q
  q_positions = _q_positions(layout, step, chunk, None)
  q_blocks = _whole(q_positions, block) - _whole(first, block)
  seen = (words & (jnp.int32(1) << q_blocks)) != 0
  k_positions = _k_positions(layout, step, chunk)
  if layout.is_causal:
    seen &= k_positions <= q_positions
  if layout.kv_length % block_kv:
    seen &= k_positions < layout.kv_length
  return seen
