"""What packed rows see of a key tile under a table, inside the TPU kernels.

The rows of a tile come from blocks of queries that need not be neighbours. A
table is given as words: bit j of word w says whether a block of queries sees
key block 32 w + j, and a block of queries has its word in a lane of its own,
[words, sublanes, 128]. The kernel gets the words of its key tile, of all blocks
of queries, and gathers along the lanes what its rows ask for.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.head_attention.mosaic_tpu.items import Step
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout

WORD_BITS = 32
LANES = 128
_SUBLANES = 8


def tile_blocks(layout: Layout) -> int:
  """Blocks of keys that a key tile has a part of."""
  return max(1, layout.tiling.block_kv // layout.block)


def tile_words(layout: Layout) -> int:
  """Words that name them."""
  return -(-tile_blocks(layout) // WORD_BITS)


def words_index(layout: Layout, near_tile: Any) -> Any:
  """Which words belong to a key tile, in units of `tile_words`."""
  keys = layout.block * WORD_BITS * tile_words(layout)
  return _whole(near_tile * layout.tiling.block_kv, keys)


def row_words(
  layout: Layout, tables: Any, step: Step, queries: Any
) -> tuple[jax.Array, ...]:
  """Words of every row of a tile, int32 [1, block_q] each.

  The lowest bit of the first is the tile's first block. Rows that see nothing
  have zeros.

  Args:
    layout: Static sizes.
    tables: References to `Tables` in scalar memory.
    step: What the grid step does.
    queries: References of `specs.Queries`.
  """
  # The second row of the positions says where to look.
  index = queries.positions[...][1:2]
  block_q = index.shape[1]
  width = min(LANES, block_q)
  index = jnp.broadcast_to(index, (_SUBLANES, block_q))
  lanes, sublanes = index & (LANES - 1), index >> (LANES.bit_length() - 1)
  count, rows, _ = queries.words.shape

  def look(row: Any, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(
      jnp.where(sublanes == row, _gather(queries, at, row, lanes, width), old)
      for at, old in enumerate(found)
    )

  found = (jnp.zeros_like(index),) * count
  if rows == 1:
    found = look(0, found)
  else:
    begin, end = tables.firsts[step.member], tables.lasts[step.member] + 1
    found = lax.fori_loop(begin, end, look, found)
  first = _whole(step.near_tile * layout.tiling.block_kv, layout.block)
  return tuple(words[:1] >> (first & (WORD_BITS - 1)) for words in found)


def _gather(
  queries: Any, at: int, row: Any, lanes: jax.Array, width: int
) -> jax.Array:
  """Of one row of words, the given lanes."""
  words = jnp.broadcast_to(
    queries.words[at, pl.ds(row, 1), :], (_SUBLANES, LANES)
  )
  return jnp.concatenate(
    [
      jnp.take_along_axis(
        words,
        lanes[:, start : start + width],
        axis=1,
        mode="promise_in_bounds",
      )
      for start in range(0, lanes.shape[1], width)
    ],
    axis=1,
  )


def seen_by_rows(
  layout: Layout,
  step: Step,
  words: tuple[jax.Array, ...],
  positions: jax.Array,
) -> jax.Array:
  """Bool [keys, queries].

  Args:
    layout: Static sizes.
    step: What the grid step does.
    words: Of some rows, int32 [1, queries] each.
    positions: Of the same rows, int32 [1, queries].
  """
  block_kv, queries = layout.tiling.block_kv, positions.shape[1]
  rows = min(layout.block, block_kv)
  bits = [
    words[at // WORD_BITS] & np.uint32(1 << at % WORD_BITS).view(np.int32)
    for at in range(tile_blocks(layout))
  ]
  seen = (
    jnp.concatenate([jnp.broadcast_to(each, (rows, queries)) for each in bits])
    != 0
  )
  k_positions = step.near_tile * block_kv + lax.broadcasted_iota(
    jnp.int32, seen.shape, 0
  )
  if layout.is_causal:
    seen &= k_positions <= positions
  if layout.kv_length % layout.block:
    # Blocks after the last key have no bits.
    seen &= k_positions < layout.kv_length
  return seen


def _whole(tokens: Any, size: int) -> Any:
  """`tokens // size`, for a power of two; the TPU has no integer division."""
  return tokens >> (size.bit_length() - 1)
