"""Parts of a key tile that a strided head's query tile sees.

Of a contiguous tile they depend only on where the tiles lie from each other: a
few cases, known when the kernel is compiled. Each has code of its own, which
leaves out the keys that no query of a chunk sees and masks those that some do
not see. Of packed queries, whose positions are known when the program runs,
each half sees some halves of the tile, and of a shard all queries see some of
the leading blocks; here too each case has its code.
"""

from typing import NamedTuple

import numpy as np

# Rows that are left out together: those of a register of bfloat16.
_LEAST_ROWS = 16
# Keys of a far tile that are left out together.
_LEAST_FAR = 256


class Chunk(NamedTuple):
  """Some queries of a tile, and the keys of it that they are held against."""

  start: int
  size: int
  first_key: int
  keys: int


class Segment(NamedTuple):
  """Keys of a chunk that need the same mask.

  Attributes:
    first, size: The keys.
    causal: Some come after a query.
    window: The window of a query has left some behind.
    tail: Some are after the last key.
  """

  first: int
  size: int
  causal: bool
  window: bool
  tail: bool


class Edge(NamedTuple):
  """How a key tile lies from a query tile; hashable.

  Attributes:
    offset: Position of the first query, less that of the first key.
    phase: Tokens from the start of a block to the first key.
    keys: How many keys of the tile exist.
    block: Tokens of a block.
    local: Blocks of the window; None if it holds all of the past.
  """

  offset: int
  phase: int
  keys: int
  block: int
  local: int | None

  def last_query(self, key: int) -> int:
    """The last query that still sees a key, counted from the first one."""
    assert self.local is not None
    end = (key + self.phase) // self.block + self.local
    return end * self.block - self.phase - self.offset - 1

  def chunks(self, block_q: int, block_kv: int, size: int) -> list[Chunk]:
    """A query tile in parts; those that see nothing are left out."""
    unit = self._unit(block_kv)
    found = []
    for start in range(0, block_q, size):
      seen = self._seen(block_kv, start, size).any(axis=1)
      units = np.flatnonzero(seen.reshape(-1, unit).any(axis=1))
      if units.size:
        first = int(units[0]) * unit
        found.append(
          Chunk(start, size, first, (int(units[-1]) + 1) * unit - first)
        )
    return found

  def segments(self, block_kv: int, chunk: Chunk) -> list[Segment]:
    """The keys of a chunk, those with equal masks together."""
    unit = self._unit(block_kv)
    last = chunk.start + chunk.size - 1
    found: list[Segment] = []
    for key in range(chunk.first_key, chunk.first_key + chunk.keys, unit):
      # Keys are seen from their own position to their last query's.
      each = Segment(
        first=key,
        size=unit,
        causal=key + unit - 1 > self.offset + chunk.start,
        window=self.local is not None and self.last_query(key) < last,
        tail=key + unit > self.keys,
      )
      if found and found[-1][2:] == each[2:]:
        each = each._replace(
          first=found[-1].first, size=found.pop().size + unit
        )
      found.append(each)
    return found

  def _unit(self, block_kv: int) -> int:
    return min(block_kv, max(self.block, _LEAST_ROWS))

  def _seen(self, block_kv: int, start: int, size: int) -> np.ndarray:
    """Bool [keys, queries]."""
    key = np.arange(block_kv)[:, None]
    query = start + np.arange(size)[None] + self.offset
    seen = (key <= query) & (key < self.keys)
    if self.local is None:
      return seen
    blocks = (query + self.phase) // self.block
    return seen & (blocks - (key + self.phase) // self.block < self.local)


class Halves(NamedTuple):
  """What the two halves of a tile of packed queries see: halves of the keys.

  Attributes:
    first, second: For a half of the queries, [begin, end).
  """

  first: tuple[int, int]
  second: tuple[int, int]

  @property
  def word(self) -> int:
    """Bit 2 i + j: the i-th half of the queries sees the j-th of the keys."""
    return sum(
      1 << (2 * half + at)
      for half, keys in enumerate(self)
      for at in range(*keys)
    )

  def chunks(self, block_q: int, block_kv: int, size: int) -> list[Chunk]:
    """A query tile in parts; those that see nothing are left out."""
    rows, keys = block_q // 2, block_kv // 2
    size = min(size, rows)
    return [
      Chunk(start, size, begin * keys, (end - begin) * keys)
      for half, (begin, end) in enumerate(self)
      if begin < end
      for start in range(half * rows, (half + 1) * rows, size)
    ]


# Queries come in the order of their positions: what they do not see are corners
# of the tile. Whatever else there is takes the code that leaves out nothing.
CORNERS = (
  Halves((0, 1), (0, 2)),
  Halves((0, 2), (1, 2)),
  Halves((0, 2), (0, 0)),
  Halves((0, 0), (0, 2)),
  Halves((0, 0), (0, 1)),
  Halves((1, 2), (0, 0)),
)
EVERYTHING = Halves((0, 2), (0, 2))


def far_parts(blocks: int, block: int) -> tuple[int, ...]:
  """So many leading blocks of a far tile have code of their own."""
  least = max(1, _LEAST_FAR // block)
  return (*range(least, blocks, least), blocks)
