"""Work lists of packed rows: which tiles a kernel visits, made as it runs.

What a block of rows visits depends on the positions of its queries. Visits are
listed block by block; backward sorts them by key tile. A list may be longer
than the scalar memory: the kernel then runs several times, over parts that end
with an output tile.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.head_attention.mosaic_tpu.items import (
  EDGE,
  FAR,
  FIRST,
  LAST,
  Call,
  Tables,
  pack_place,
  pack_tiles,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout, has_far
from pallas_kernels.head_attention.schedule import StridedHeads
from pallas_kernels.routed_attention.visits import BlockVisits, sink_tiles

Carry = TypeVar("Carry")

# Items of one kernel call. Scalar memory holds 1 MiB on every TPU so far, and
# an item takes two words.
MOST_ITEMS = 1 << 16


class TileVisits(NamedTuple):
  """Tiles that have no order: bool [blocks, tiles].

  Attributes:
    visited: Whether a block visits a contiguous tile.
    full: Whether every query sees all of it.
  """

  visited: Bool[Array, "blocks tiles"]
  full: Bool[Array, "blocks tiles"]


class Blocks(NamedTuple):
  """Blocks of packed rows; int32 [blocks] but for positions.

  Attributes:
    kv_head: KV head of all sequences: sequence * K + KV head.
    sequence: Which one.
    residue: Of the head; the number of its rule, if rows look up what they see.
    first, last: As in `Tables`: [blocks, 2] of both halves, or [blocks].
    visits: Key tiles; none for blocks of other heads.
    segments: Pairs of a head and a sequence (static).
  """

  kv_head: Int[Array, " blocks"]
  sequence: Int[Array, " blocks"]
  residue: Int[Array, " blocks"]
  first: Int[Array, "blocks *halves"]
  last: Int[Array, "blocks *halves"]
  visits: BlockVisits | TileVisits
  segments: int

  @property
  def number(self) -> int:
    """Blocks (static)."""
    return self.kv_head.shape[0]


class Worklist(NamedTuple):
  """Items in the order of a kernel; those after `length` are none.

  Attributes:
    place, tiles: As in `Tables`.
    output_start: First item of the output tile of each.
    length: How many there are.
    kinds: As in `Call`.
  """

  place: Int[Array, " items"]
  tiles: Int[Array, " items"]
  output_start: Int[Array, " items"]
  length: Int[Array, ""]
  kinds: tuple[int, ...]


def far_tiles(layout: Layout) -> int:
  """Tiles of a shard; 0 if no key is read by shards."""
  if not has_far(layout):
    return 0
  return layout.kv_padded // (layout.far_blocks * layout.stride * layout.block)


def by_block(layout: Layout, blocks: Blocks) -> Worklist:
  """Block by block: its far tiles, those of its sinks, its near ones."""
  visits = blocks.visits
  if isinstance(visits, TileVisits):
    return _listed(visits, _rising(visits.visited))
  block, number, count = _enumerate(
    visits.far + visits.sinks + visits.end - visits.near,
    blocks.number * far_tiles(layout) + _most_near(layout, blocks),
  )
  far = visits.far[block]
  is_far = number < far
  tile = jnp.where(is_far, number, _near_tile(visits, block, number - far))
  kinds = (0, FAR, EDGE, FAR | EDGE) if far_tiles(layout) else (0, EDGE)
  return _worklist(layout, visits, block, tile, is_far, block, count, kinds)


def by_near_tile(layout: Layout, blocks: Blocks) -> Worklist:
  """Contiguous tile by contiguous tile, with all heads of a KV head."""
  visits = blocks.visits
  if isinstance(visits, TileVisits):
    order = _falling(blocks.kv_head, visits.visited)
    return _listed(visits, order)
  block, number, count = _enumerate(
    visits.sinks + visits.end - visits.near, _most_near(layout, blocks)
  )
  tile = _near_tile(visits, block, number)
  tiles = jnp.arange(layout.kv_tiles)
  sinks, near, end = (
    each[:, None] for each in (visits.sinks, visits.near, visits.end)
  )
  visited = (tiles < sinks) | (near <= tiles) & (tiles < end)
  order = _falling(blocks.kv_head, visited)
  return _by_tile(layout, visits, block, tile, order, count, is_far=False)


def by_far_tile(layout: Layout, blocks: Blocks) -> Worklist:
  """Tile by tile of every shard, with all heads of a KV head that own it."""
  tiles, visits = far_tiles(layout), blocks.visits
  assert isinstance(visits, BlockVisits)
  block, tile, count = _enumerate(visits.far, blocks.number * tiles)
  shard = blocks.kv_head * layout.stride + blocks.residue
  visited = visits.far[:, None] > np.arange(tiles)
  order = _falling(shard, visited)
  return _by_tile(layout, visits, block, tile, order, count, is_far=True)


def for_calls(
  blocks: Blocks,
  work: Worklist,
  step: Callable[[Call, Carry], Carry],
  carry: Carry,
) -> Carry:
  """Folds `step` over the calls that a list takes: none if it is empty."""
  size = min(work.place.shape[0], MOST_ITEMS)
  place, tiles = (jnp.pad(x, (0, size)) for x in (work.place, work.tiles))

  def call(state: tuple[Array, Carry]) -> tuple[Array, Carry]:
    begin, carry = state
    stop = begin + size
    end = jnp.where(
      stop < work.length,
      work.output_start[jnp.minimum(stop, work.place.shape[0] - 1)],
      work.length,
    )
    tables = tables_of(
      blocks,
      lax.dynamic_slice_in_dim(place, begin, size),
      lax.dynamic_slice_in_dim(tiles, begin, size),
    )
    part = Call(tables, rows=1, members=1, kinds=work.kinds, count=end - begin)
    return end, step(part, carry)

  return lax.while_loop(
    lambda state: state[0] < work.length, call, (jnp.int32(0), carry)
  )[1]


def _near_tile(
  visits: BlockVisits, block: Int[Array, " items"], number: Int[Array, " items"]
) -> Int[Array, " items"]:
  """A block's contiguous tile of that number: the sinks' come first."""
  sinks = visits.sinks[block]
  return jnp.where(number < sinks, number, number - sinks + visits.near[block])


def tables_of(
  blocks: Blocks, place: Int[Array, " items"], tiles: Int[Array, " items"]
) -> Tables:
  """What a kernel reads of these items."""
  return Tables(
    place=place,
    tiles=tiles,
    heads=np.zeros(blocks.number, np.int32),
    kv_heads=blocks.kv_head,
    residues=blocks.residue,
    sequences=blocks.sequence,
    firsts=blocks.first.reshape(-1),
    lasts=blocks.last.reshape(-1),
    pointers=np.zeros(1, np.int32),
    bits=np.zeros(1, np.int32),
  )


def _most_near(layout: Layout, blocks: Blocks) -> int:
  """Contiguous tiles that all blocks visit together, at most.

  The blocks of a head and a sequence do not overlap: together they span the
  keys once, and each has a window and sinks besides.
  """
  run, block_kv = layout.run, layout.tiling.block_kv
  assert isinstance(run, StridedHeads)
  window = -(-run.local * layout.block // block_kv)
  extra = window + 3 + sink_tiles(run, layout.block, block_kv, layout.kv_length)
  spanned = blocks.segments * layout.kv_tiles + blocks.number * extra
  return min(blocks.number * layout.kv_tiles, spanned)


def _enumerate(
  counts: Int[Array, " blocks"], size: int
) -> tuple[Int[Array, " items"], Int[Array, " items"], Int[Array, ""]]:
  """Block of each item and its number in the block; and how many there are.

  Args:
    counts: Items of every block.
    size: Items to make room for.
  """
  ends = jnp.cumsum(counts)
  numbers = jnp.arange(size, dtype=jnp.int32)
  block = jnp.repeat(
    jnp.arange(counts.shape[0], dtype=jnp.int32),
    counts,
    total_repeat_length=size,
  )
  # Blocks in the order of positions never need more room.
  return block, numbers - (ends - counts)[block], jnp.minimum(ends[-1], size)


class _Order(NamedTuple):
  """Where the visits of [blocks, tiles] go; int32 [blocks, tiles].

  Attributes:
    place: Of each visit in the list.
    output: A number that the visits of one output tile share.
  """

  place: Int[Array, "blocks tiles"]
  output: Int[Array, "blocks tiles"]


def _falling(
  owner: Int[Array, " blocks"], visited: Bool[Array, "blocks tiles"]
) -> _Order:
  """By the owner of the keys, the tile, and falling blocks: sorts by counting.

  Falling, no block comes twice in three items but for the last ones of an
  owner: the sums of its queries have time to be stored and fetched.
  """
  count, tiles = visited.shape
  rank = jnp.arange(count, dtype=jnp.int32)
  # By owner, and by falling numbers.
  order = jnp.argsort(owner[::-1], stable=True)
  order = count - 1 - order
  owner, visited = owner[order], visited[order]
  total = jnp.cumsum(visited, axis=0, dtype=jnp.int32)
  # Rows of one owner: [begin, end).
  begin = jnp.searchsorted(owner, owner, side="left", method="compare_all")
  end = jnp.searchsorted(owner, owner, side="right", method="compare_all")
  before = jnp.where(begin[:, None] > 0, total[begin - 1], 0)
  held = total[end - 1] - before
  # Tiles of earlier owners, then earlier tiles of this one.
  row_total = jnp.cumsum(visited.sum(axis=1, dtype=jnp.int32))
  earlier = jnp.where(begin > 0, row_total[begin - 1], 0)
  start = earlier[:, None] + jnp.cumsum(held, axis=1) - held
  place = start + total - before - 1
  output = begin[:, None] * tiles + np.arange(tiles)
  back = jnp.zeros_like(rank).at[order].set(rank)
  return _Order(place[back], output[back])


def _rising(visited: Bool[Array, "blocks tiles"]) -> _Order:
  """By the block, and by the tile."""
  count, tiles = visited.shape
  place = jnp.cumsum(visited.reshape(-1), dtype=jnp.int32) - 1
  output = np.broadcast_to(np.arange(count)[:, None], visited.shape)
  return _Order(place.reshape(count, tiles), jnp.asarray(output, jnp.int32))


def _listed(visits: TileVisits, order: _Order) -> Worklist:
  """The visits in their order."""
  size = visits.visited.size
  numbers = jnp.arange(size, dtype=jnp.int32).reshape(visits.visited.shape)
  # The others have places after the end, each its own.
  place = jnp.where(visits.visited, order.place, size + numbers)
  visit = (
    jnp.zeros((size,), jnp.int32)
    .at[place.reshape(-1)]
    .set(numbers.reshape(-1), mode="drop", unique_indices=True)
  )
  tiles = visits.visited.shape[1]
  block, tile = visit // tiles, visit % tiles
  return _packed(
    block,
    tile,
    jnp.zeros_like(tile),
    jnp.zeros((size,), bool),
    visits.full.reshape(-1)[visit],
    order.output.reshape(-1)[visit],
    visits.visited.sum(dtype=jnp.int32),
    (0, EDGE),
  )


def _by_tile(
  layout: Layout,
  visits: BlockVisits,
  block: Int[Array, " items"],
  tile: Int[Array, " items"],
  order: _Order,
  count: Int[Array, ""],
  *,
  is_far: bool,
) -> Worklist:
  size = block.shape[0]
  numbers = jnp.arange(size, dtype=jnp.int32)
  # Each place once, those after the last item too.
  place = jnp.where(numbers < count, order.place[block, tile], numbers)

  def placed(values: Int[Array, " items"]) -> Int[Array, " items"]:
    return jnp.zeros_like(values).at[place].set(values, unique_indices=True)

  kinds = (FAR, FAR | EDGE) if is_far else (0, EDGE)
  return _worklist(
    layout,
    visits,
    placed(block),
    placed(tile),
    jnp.full((size,), is_far),
    placed(order.output[block, tile]),
    count,
    kinds,
  )


def _worklist(
  layout: Layout,
  visits: BlockVisits,
  block: Int[Array, " items"],
  tile: Int[Array, " items"],
  is_far: Bool[Array, " items"],
  output: Int[Array, " items"],
  count: Int[Array, ""],
  kinds: tuple[int, ...],
) -> Worklist:
  visits = BlockVisits(*(each[block] for each in visits))
  is_full = jnp.where(
    is_far,
    tile < visits.far_full,
    (visits.low <= tile) & (tile < visits.high),
  )
  # The tile that an item does not use: the next near one, the last far one.
  # The near part of queries after the keys begins after them too.
  next_near = jnp.minimum(visits.near, layout.kv_tiles - 1)
  next_near = jnp.where(visits.sinks > 0, 0, next_near)
  near_tile = jnp.where(is_far, next_near, tile)
  far_tile = jnp.where(is_far, tile, jnp.maximum(visits.far - 1, 0))
  return _packed(
    block, near_tile, far_tile, is_far, is_full, output, count, kinds
  )


def _packed(
  block: Int[Array, " items"],
  near_tile: Int[Array, " items"],
  far_tile: Int[Array, " items"],
  is_far: Bool[Array, " items"],
  is_full: Bool[Array, " items"],
  output: Int[Array, " items"],
  count: Int[Array, ""],
  kinds: tuple[int, ...],
) -> Worklist:
  numbers = jnp.arange(block.shape[0], dtype=jnp.int32)
  first = (numbers == 0) | (output != jnp.roll(output, 1))
  last = (numbers == count - 1) | (output != jnp.roll(output, -1))
  flags = functools.reduce(
    operator.or_,
    (
      jnp.where(holds, flag, 0)
      for flag, holds in (
        (FIRST, first),
        (LAST, last),
        (FAR, is_far),
        (EDGE, ~is_full),
      )
    ),
  )
  return Worklist(
    pack_place(block, block),
    pack_tiles(near_tile, far_tile, flags),
    lax.cummax(jnp.where(first, numbers, 0)),
    count,
    kinds,
  )
