"""What a query tile sees of a key tile, inside the TPU kernels.

Masks have keys down and queries across, as the logits. Whatever belongs to a
block of keys is a scalar, spread over the block's rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.head_attention.mosaic_tpu.items import (
  EDGE,
  FAR,
  Step,
)
from pallas_kernels.head_attention.mosaic_tpu.lookup import seen_by_rows
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.schedule import StridedHeads

_ALWAYS = np.int32(2**31 - 1)


class Chunk(NamedTuple):
  """Some queries of a tile."""

  start: int
  size: int


def tile_mask(
  layout: Layout,
  tables: Any,
  item: Any,
  step: Step,
  kind: int,
  chunk: Chunk,
  positions: jax.Array | None,
  words: tuple[jax.Array, ...] | None = None,
) -> jax.Array | None:
  """Bool [keys, queries]; None if every query sees every key.

  Args:
    layout: Static sizes.
    tables: References to `Tables` in scalar memory.
    item: The item.
    step: The same, read.
    kind: The static part of the flags: FAR and EDGE.
    chunk: Queries of the tile.
    positions: Of packed queries, int32 [1, queries].
    words: What such queries looked up, int32 [1, queries] each.
  """
  if not kind & EDGE:
    return None
  if kind & FAR:
    return _far(layout, tables, step, chunk)
  if isinstance(layout.run, StridedHeads):
    return _window(layout, tables, step, chunk, positions)
  if words is not None:
    assert positions is not None
    return seen_by_rows(layout, step, words, positions)
  return _table(layout, tables, item, step, chunk)


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


def _first_position(layout: Layout, tables: Any, step: Step) -> Any:
  """Of the queries of a tile."""
  if layout.packed:
    return tables.firsts[step.member]
  return layout.q_offset + step.q_tile * layout.tiling.block_q


def _near_start(layout: Layout, tables: Any, step: Step) -> Any:
  """First key of the near part of a query tile; see `schedule`."""
  assert isinstance(layout.run, StridedHeads)
  block, block_kv = layout.block, layout.tiling.block_kv
  first = _first_position(layout, tables, step)
  window = jnp.maximum(_whole(first, block) - layout.run.local + 1, 0) * block
  return _whole(window, block_kv) * block_kv


def _q_positions(
  layout: Layout, step: Step, keys: int, chunk: Chunk
) -> jax.Array:
  first = layout.q_offset + step.q_tile * layout.tiling.block_q + chunk.start
  return first + lax.broadcasted_iota(jnp.int32, (keys, chunk.size), 1)


def _k_positions(layout: Layout, step: Step, chunk: Chunk) -> jax.Array:
  block_kv = layout.tiling.block_kv
  rows = lax.broadcasted_iota(jnp.int32, (block_kv, chunk.size), 0)
  return step.near_tile * block_kv + rows


def _far(layout: Layout, tables: Any, step: Step, chunk: Chunk) -> jax.Array:
  """Keys of the shard before the near part: the same for all queries."""
  assert isinstance(layout.run, StridedHeads)
  block, blocks, stride = layout.block, layout.far_blocks, layout.stride
  limit = jnp.minimum(_near_start(layout, tables, step), layout.kv_length)
  start = step.far_tile * blocks * stride + tables.residues[step.member]
  left = _rows_of(
    lambda at: limit - (start + at * stride) * block, blocks, block, chunk.size
  )
  inside = lax.broadcasted_iota(jnp.int32, left.shape, 0) & (block - 1)
  return inside < left


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
  rows = min(layout.block, block_kv)
  first = _whole(step.near_tile * block_kv, layout.block)
  if positions is None:
    q_positions = _q_positions(layout, step, block_kv, chunk)
  else:
    q_positions = jnp.broadcast_to(positions, (block_kv, chunk.size))
  k_positions = _k_positions(layout, step, chunk)
  seen = k_positions <= q_positions
  if run.stride != 1:
    if run.stride:
      # One division a tile: block `first + at` is remote where `phase` is
      # minus `at`.
      residue = tables.residues[step.member]
      phase = lax.rem(first + run.stride - residue, run.stride)
      remote: Any = _ALWAYS
      if run.sinks:
        # Tiles before the near part are there for their sinks: what the head
        # owns of them is read with its shard.
        is_near = step.near_tile * block_kv >= _near_start(layout, tables, step)
        remote = jnp.where(is_near, _ALWAYS, np.int32(-1))

    def last_query(at: int) -> Any:
      last = (first + at + run.local) * layout.block - 1
      if run.sinks:
        last = jnp.where(first + at < run.sinks, _ALWAYS, last)
      if run.stride:
        last = jnp.where(phase == -at % run.stride, remote, last)
      return last

    seen &= q_positions <= _rows_of(
      last_query, block_kv // rows, rows, chunk.size
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
  q_positions = _q_positions(layout, step, block_kv, chunk)
  q_blocks = _whole(q_positions, block) - _whole(first, block)
  seen = (words & (jnp.int32(1) << q_blocks)) != 0
  k_positions = _k_positions(layout, step, chunk)
  if layout.is_causal:
    seen &= k_positions <= q_positions
  if layout.kv_length % block_kv:
    seen &= k_positions < layout.kv_length
  return seen
