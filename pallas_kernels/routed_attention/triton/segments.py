"""Tiles of packed rows, and which of them meet a key tile.

The rows of one head and one sequence are a segment, in the order of positions.
So the tiles of a segment that have a key tile near them, or far from them, or
that see all of it, follow each other: a binary search finds where they begin.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.head_attention.schedule import StridedHeads
from pallas_kernels.head_attention.triton.strided import Pair, kv_heads_of
from pallas_kernels.head_attention.triton.walks import Shards
from pallas_kernels.packing import Packing
from pallas_kernels.routed_attention.operands import UNUSED

# After every position: what follows a segment's last tile.
_NEVER = 2**31 - 1


class Tiles(NamedTuple):
  """Tiles of a number of packed rows that divides `block_rows`.

  Attributes:
    first: Position of the first query, at least 0; int32 [tiles].
    last: Of the last one; negative if there is none that sees a key.
    sequence, head: Which ones.
    starts: First tile of each segment, head by head, and the one after the
      last; int32 [N B + 1].
    longest: The most tiles of a segment (static).
  """

  first: Int[Array, " tiles"]
  last: Int[Array, " tiles"]
  sequence: Int[Array, " tiles"]
  head: Int[Array, " tiles"]
  starts: Int[Array, " segments_and_1"]
  longest: int

  @property
  def number(self) -> int:
    """Tiles (static)."""
    return self.first.shape[0]


def make_tiles(
  packing: Packing, positions: Int[Array, " rows"], block_q: int
) -> Tiles:
  """Cuts blocks of rows into tiles of `block_q`.

  Args:
    packing: Which row is which.
    positions: The last key that each row may see, `UNUSED` without a query.
    block_q: Rows of a tile.
  """
  batch, length, heads = packing.row_of.shape
  pieces = packing.block_rows // block_q
  tiles = positions.reshape(-1, block_q)
  last = tiles.max(axis=1)
  first = jnp.where(tiles == UNUSED, _NEVER, tiles).min(axis=1)
  number = jnp.arange(packing.block_head.shape[0])
  segment = packing.block_head * batch + packing.block_batch
  segment = jnp.where(number < packing.num_blocks, segment, heads * batch)
  starts = jnp.searchsorted(segment, jnp.arange(heads * batch + 1))
  return Tiles(
    first=jnp.where(last == UNUSED, 0, jnp.maximum(first, 0)),
    last=last,
    # Whatever the packing says, nothing is read out of bounds.
    sequence=jnp.repeat(jnp.clip(packing.block_batch, 0, batch - 1), pieces),
    head=jnp.repeat(jnp.clip(packing.block_head, 0, heads - 1), pieces),
    starts=starts.astype(jnp.int32) * pieces,
    longest=-(-length // packing.block_rows) * pieces,
  )


def near_table(
  shards: Shards, run: StridedHeads, tiles: Tiles
) -> Int[Array, "B kv_heads kv_tiles G 4"]:
  """For each key tile, KV head of the run and query head of it, four tiles.

  The first that has the keys in its near part, the first of them that sees all
  keys, the next that does not, the first that has the keys in its far part.
  """
  problem = shards.problem
  block_kv = problem.tiling.block_kv
  begin = jnp.arange(problem.kv_tiles, dtype=jnp.int32) * block_kv
  end = begin + block_kv
  search = _Search(run, tiles, problem.B)
  some_end = search.first_from(shards.first_past(begin)[None])
  some = jnp.minimum(search.last_from(begin[None]), some_end)
  whole_end = search.last_from(shards.window_end(begin)[None])
  whole_end = jnp.clip(whole_end, some, some_end)
  whole = jnp.clip(search.first_from(end[None] - 1), some, whole_end)
  whole = jnp.where(end <= problem.S, whole, whole_end)
  groups = problem.groups
  first, last = kv_heads_of(run, problem)
  return _by_column(
    run,
    (some, whole, whole_end, some_end),
    [
      range(kv_head * groups, (kv_head + 1) * groups)
      for kv_head in range(first, last + 1)
    ],
  )


def far_table(
  shards: Shards, run: StridedHeads, tiles: Tiles, pairs: Sequence[Pair]
) -> Int[Array, "B pairs kv_tiles heads 3"]:
  """For each tile of a pair's shard and query head of the pair, three tiles.

  The first that has some of the keys in its far part, the first that has all
  of them there, the end of the segment. Pairs have as many heads as the pair
  that has most.
  """
  problem = shards.problem
  block_kv = problem.tiling.block_kv
  blocks = -(-problem.S // problem.block)
  most = min(-(-blocks // run.stride) * problem.block, problem.S)
  begin = jnp.arange(0, most, block_kv, dtype=jnp.int32)[None]
  residue = jnp.asarray(run.residues, jnp.int32)[:, None]
  length = shards.length(jnp.int32(problem.S), residue)
  first, last = (
    shards.position(token, shards.stride, residue)
    for token in (begin, jnp.minimum(begin + block_kv, length) - 1)
  )
  search = _Search(run, tiles, problem.B)
  stop = jnp.broadcast_to(search.stop, (*search.stop.shape[:2], begin.size))
  some = search.first_from(shards.first_past(first))
  some = jnp.where((begin < length)[:, None], some, stop)
  whole = search.first_from(shards.first_past(last))
  whole = jnp.where((begin + block_kv <= length)[:, None], whole, stop)
  whole = jnp.maximum(whole, some)
  return _by_column(run, (some, whole, stop), [pair.heads for pair in pairs])


class _Search:
  """Searches the segments of a run's heads; results are [heads, B, limits]."""

  def __init__(self, run: StridedHeads, tiles: Tiles, batch: int) -> None:
    heads = run.stop - run.start
    bounds = tiles.starts[run.start * batch : run.stop * batch + 1]
    start = bounds[:-1].reshape(heads, batch, 1)
    self.stop = bounds[1:].reshape(heads, batch, 1)
    number = start + jnp.arange(tiles.longest, dtype=jnp.int32)
    inside = number < self.stop
    self._start = start
    self._first, self._last = (
      jnp.where(inside, x.at[number].get(mode="clip"), _NEVER)
      for x in (tiles.first, tiles.last)
    )

  def first_from(self, limits: Int[Array, "heads tiles"]) -> Array:
    """First tile without a query before a limit; the heads may share it."""
    return self._find(self._first, limits)

  def last_from(self, limits: Int[Array, "heads tiles"]) -> Array:
    """First tile that has a query at or after a limit."""
    return self._find(self._last, limits)

  def _find(self, ascending: Array, limits: Array) -> Array:
    limits = jnp.broadcast_to(limits, (ascending.shape[0], limits.shape[1]))
    of_head = jax.vmap(jnp.searchsorted, in_axes=(0, None))
    found = jax.vmap(of_head)(ascending, limits)
    return self._start + found.astype(jnp.int32)


def _by_column(
  run: StridedHeads,
  numbers: Sequence[Int[Array, "heads B tiles"]],
  columns: Sequence[Sequence[int]],
) -> Int[Array, "B columns tiles most_heads numbers"]:
  """As kernels read them, from the query heads of every column.

  Heads that are not the run's, or that a column has not, have only zeros.
  """
  heads = np.full((len(columns), max(map(len, columns))), -1)
  for row, column in zip(heads, columns, strict=True):
    row[: len(column)] = column
  inside = (run.start <= heads) & (heads < run.stop)
  table = jnp.stack(numbers, axis=-1)[np.where(inside, heads - run.start, 0)]
  table = jnp.where(inside[:, :, None, None, None], table, 0)
  return table.transpose(2, 0, 3, 1, 4)
