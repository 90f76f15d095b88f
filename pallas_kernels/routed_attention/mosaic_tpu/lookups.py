"""Heads that packed rows look up: their words, and what blocks of rows visit.

A rule without a closed form for its visits is a table of bits; see
`head_attention.mosaic_tpu.lookup` for the words. They cover the blocks that the
queries may be in, whatever their offset, and each distinct rule has them once.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.head_attention.contexts import Rule, Table
from pallas_kernels.head_attention.mosaic_tpu.lookup import (
  LANES,
  WORD_BITS,
  tile_words,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.routed_attention.operands import Operands, row_positions


class Lookups(NamedTuple):
  """What the rows of some heads look up.

  Attributes:
    words: For the kernels, int32 [rules, words, sublanes, 128].
    lane: Which lane of all each row looks into; negative for none.
    first, last: Sublanes of each block's first and last row.
    rule: Of each block.
    visited: Whether a row of the block sees a key of the tile.
    full: Whether every row sees every key of the tile.
  """

  words: Int[Array, "rules words sublanes lanes"]
  lane: Int[Array, " rows"]
  first: Int[Array, " blocks"]
  last: Int[Array, " blocks"]
  rule: Int[Array, " blocks"]
  visited: Bool[Array, "blocks tiles"]
  full: Bool[Array, "blocks tiles"]


def make_lookups(
  layout: Layout,
  rules: tuple[Rule, ...],
  operands: Operands,
  inside: Bool[Array, " blocks"],
  rule: Int[Array, " blocks"],
) -> Lookups:
  """The lookups of the blocks inside a run of heads.

  Args:
    layout: Of the run.
    rules: Distinct ones.
    operands: The queries.
    inside: Whether a block belongs to the run.
    rule: Index of each such block's rule.
  """
  packing = operands.packing
  block = layout.block
  # Queries that start anywhere in a block touch so many.
  q_blocks = (packing.row_of.shape[1] + block - 2) // block + 1
  lanes = -(-q_blocks // LANES) * LANES
  start = jnp.maximum(operands.q_offset, 0) // block
  words = _words(layout, rules, start, lanes)
  position = row_positions(operands)
  lane = jnp.where(position < 0, -1, position // block - start)
  looks = lane.reshape(-1, packing.block_rows)
  looks = jnp.where(inside[:, None], looks, -1)
  seen, missed = _count(layout, words, looks, rule)
  first_looks = jnp.where(looks < 0, lanes - 1, looks).min(axis=1)
  return Lookups(
    words=words.reshape(*words.shape[:2], lanes // LANES, LANES),
    lane=lane,
    first=first_looks // LANES,
    last=jnp.maximum(looks.max(axis=1), 0) // LANES,
    rule=rule,
    visited=seen,
    full=~missed & _all_exist(layout, operands, position),
  )


def _all_exist(
  layout: Layout, operands: Operands, position: Int[Array, " rows"]
) -> Bool[Array, "blocks tiles"]:
  """Whether neither the end of the keys nor causality cuts a tile."""
  packing = operands.packing
  used = packing.row_valid
  first = jnp.where(used, position, layout.kv_length)
  first = first.reshape(-1, packing.block_rows).min(axis=1)[:, None]
  ends = (np.arange(layout.kv_tiles) + 1) * layout.tiling.block_kv
  whole = (first >= 0) & (ends <= layout.kv_length)
  return whole & (ends <= first + 1) if layout.is_causal else whole


def _words(
  layout: Layout, rules: tuple[Rule, ...], start: Int[Array, ""], lanes: int
) -> Int[Array, "rules words lanes"]:
  """Bits of the query blocks from `start` on.

  A bit says that a block is there and not hidden as a whole: then its first
  key is seen by all queries of the block.
  """
  block, block_kv = layout.block, layout.tiling.block_kv
  columns = -(-layout.kv_tiles * block_kv // block)
  count = -(-columns // WORD_BITS)
  count = -(-count // tile_words(layout)) * tile_words(layout)
  i = start + np.arange(lanes, dtype=np.int32)
  j = np.arange(count * WORD_BITS, dtype=np.int32)[:, None]
  exists = j * block < layout.kv_length
  visible = (exists & (j <= i)) if layout.is_causal else exists
  every = _pack(jnp.broadcast_to(visible, (j.size, lanes)))

  def of_rule(rule: Rule) -> Int[Array, "words lanes"]:
    if not isinstance(rule, Table):
      return _pack(rule.keep(i, j))
    static = _static_words(rule, count)
    # Queries after the table's end see nothing.
    padded = jnp.pad(static, ((0, 0), (0, lanes)))
    return lax.dynamic_slice_in_dim(padded, start, lanes, axis=1)

  return jnp.stack([of_rule(rule) & every for rule in rules])


def _pack(
  bits: Bool[Array, "columns lanes"],
) -> Int[Array, "words lanes"]:
  bits = bits.reshape(-1, WORD_BITS, bits.shape[1]).astype(jnp.uint32)
  places = np.arange(WORD_BITS, dtype=np.uint32)[:, None]
  words = jnp.left_shift(bits, places).sum(axis=1, dtype=jnp.uint32)
  return lax.bitcast_convert_type(words, jnp.int32)


def _static_words(rule: Table, count: int) -> np.ndarray:
  """Words of a table, int32 [count, rows]: constants of the program."""
  mask = rule.mask()[:, : count * WORD_BITS].T
  mask = np.pad(mask, ((0, count * WORD_BITS - mask.shape[0]), (0, 0)))
  mask = mask.reshape(count, WORD_BITS, -1)
  bytes_ = np.packbits(mask, axis=1, bitorder="little")  # [count, 4, rows]
  return bytes_.transpose(0, 2, 1).copy().view("<i4")[..., 0]


def _count(
  layout: Layout,
  words: Int[Array, "rules words lanes"],
  looks: Int[Array, "blocks block_q"],
  rule: Int[Array, " blocks"],
) -> tuple[Bool[Array, "blocks tiles"], Bool[Array, "blocks tiles"]]:
  """Whether a row sees a key block of a tile, and whether one misses one.

  Counts by a product of matrices: which query blocks have a row here, and what
  these see.
  """
  lanes = np.arange(words.shape[2], dtype=np.int32)
  has = (looks[:, :, None] == lanes).any(axis=1)  # [blocks, lanes]

  def add(
    counts: tuple[Array, Array], of: tuple[Array, Array]
  ) -> tuple[tuple[Array, Array], None]:
    number, rule_words = of
    own = (has & (rule == number)[:, None]).astype(jnp.bfloat16)
    bits = _tile_bits(layout, rule_words)
    seen, missed = (
      jnp.einsum(
        "bl,tl->bt",
        own,
        each.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
      )
      for each in (bits.any(axis=1), ~bits.all(axis=1))
    )
    return (counts[0] + seen, counts[1] + missed), None

  zero = jnp.zeros((looks.shape[0], layout.kv_tiles), jnp.float32)
  numbers = jnp.arange(words.shape[0], dtype=jnp.int32)
  (seen, missed), _ = lax.scan(add, (zero, zero), (numbers, words))
  return seen > 0, missed > 0


def _tile_bits(
  layout: Layout, words: Int[Array, "words lanes"]
) -> Bool[Array, "tiles columns lanes"]:
  """The bits of every key tile."""
  block, block_kv = layout.block, layout.tiling.block_kv
  places = np.arange(WORD_BITS, dtype=np.int32)[:, None]
  bits = (words[:, None] >> places) & 1
  bits = bits.reshape(-1, words.shape[1]) != 0
  if block > block_kv:
    bits = jnp.repeat(bits, block // block_kv, axis=0)
  columns = max(1, block_kv // block)
  bits = bits[: layout.kv_tiles * columns]
  return bits.reshape(layout.kv_tiles, columns, -1)
