"""Work lists of the TPU kernels: what each grid step does, as NumPy tables.

Every kernel runs over the grid (batch, rows, items, members). An item is one
visited tile; a row is what shares a list of items: a query head, or a KV head
with the `members` query heads whose gradients are summed into it. Lists that
differ from row to row are laid one after the other and name their row.

Packed queries have one row of the grid for each of their tiles, named by the
items, and tables that are made when the program runs.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels.head_attention.mosaic_tpu.edges import Edge
from pallas_kernels.head_attention.schedule import Visits

# What an item's flags say.
FIRST = 1  # of the items of its output tile
LAST = 2
FAR = 4
EDGE = 8  # needs a mask

_FLAG_BITS = 4
_TILE_BITS = 14
_PLACE_BITS = 16
MAX_KV_TILES = 1 << _TILE_BITS
MAX_Q_TILES = 1 << _PLACE_BITS
# Rows that an item can name.
MAX_ROWS = 1 << (31 - _PLACE_BITS)

# Scalar memory holds 1 MiB on every TPU so far; the pipeline needs some too.
_TABLE_WORDS = 1 << 16


Words = np.ndarray | jax.Array


class Tables(NamedTuple):
  """What is prefetched into scalar memory; int32.

  Attributes:
    place: Row and query tile of every item.
    tiles: Near tile, far tile and flags of every item. The tile that an item
      does not use repeats an earlier one, so that nothing is fetched for it.
    heads: Query head of every member of every row.
    kv_heads: KV head of the same.
    residues: Residue of the same; which table, if packed rows look it up.
    sequences: What to add to the grid's sequence for the keys' segment ids.
    firsts: Position of the first query of both halves of every member's tile
      of packed queries; if its rows look up what they see, the first row of
      words they look into, one a tile; else not read.
    lasts: The same of the last ones.
    pointers: Where in `bits` an item's words start; of strided heads, which of
      `Call.edges` an item is.
    bits: One word a key block of a tile; bit i is the i-th query block.
  """

  place: Words
  tiles: Words
  heads: Words
  kv_heads: Words
  residues: Words
  sequences: Words
  firsts: Words
  lasts: Words
  pointers: Words
  bits: Words


class Step(NamedTuple):
  """One grid step, as traced int32 scalars.

  Attributes:
    member: Index into `Tables.heads`.
    q_tile, near_tile, far_tile: Tiles.
    flags: FIRST, LAST, FAR and EDGE.
  """

  member: Any
  q_tile: Any
  near_tile: Any
  far_tile: Any
  flags: Any


def read_step(
  tables: Any, row: Any, item: Any, member: Any, members: int
) -> Step:
  """What the grid step (row, item, member) does.

  Args:
    tables: References to `Tables` in scalar memory.
    row, item, member: Grid indices.
    members: Query heads of a row.
  """
  place = tables.place[item]
  tiles = tables.tiles[item]
  row += place >> _PLACE_BITS
  return Step(
    member=row * members + member,
    q_tile=place & (MAX_Q_TILES - 1),
    near_tile=(tiles >> (_FLAG_BITS + _TILE_BITS)) & (MAX_KV_TILES - 1),
    far_tile=(tiles >> _FLAG_BITS) & (MAX_KV_TILES - 1),
    flags=tiles & ((1 << _FLAG_BITS) - 1),
  )


def pack_place(row: Any, q_tile: Any) -> Any:
  """A word of `Tables.place`."""
  return row << _PLACE_BITS | q_tile


def pack_tiles(near_tile: Any, far_tile: Any, flags: Any) -> Any:
  """A word of `Tables.tiles`."""
  return (near_tile << _TILE_BITS | far_tile) << _FLAG_BITS | flags


@dataclasses.dataclass(frozen=True)
class Call:
  """One kernel call.

  Attributes:
    tables: For the scalar memory.
    rows: Size of the grid's row axis; 1 if the items name their rows.
    members: Query heads of a row.
    kinds: The combinations of FAR and EDGE that occur.
    edges: How near edges lie, where that is static.
    count: How many items of the list there are, if that is known only when
      the program runs; None is all.
  """

  tables: Tables
  rows: int
  members: int
  kinds: tuple[int, ...]
  edges: tuple[Edge, ...] = ()
  count: Any = None

  @property
  def items(self) -> Any:
    """Items of the list."""
    return self.tables.place.size if self.count is None else self.count

  @property
  def has_far(self) -> bool:
    """Whether an item is from the far part."""
    return any(kind & FAR for kind in self.kinds)

  @property
  def has_near(self) -> bool:
    """Whether an item is from the near part."""
    return any(not kind & FAR for kind in self.kinds)


class Worklist(NamedTuple):
  """Items before they are packed.

  Attributes:
    visits: In the order of the kernel.
    rows: Row of every item; all 0 if every row has these items.
    outputs: Equal for neighbours that add to the same output tile.
    kept: Visible blocks of every visit, [items, q blocks, kv blocks], or None.
    edges: How near edges lie, if that is static.
    cases: Which of `edges` each visit is; 0 for those that are none.
  """

  visits: Visits
  rows: np.ndarray
  outputs: np.ndarray
  kept: np.ndarray | None = None
  edges: tuple[Edge, ...] = ()
  cases: np.ndarray | None = None

  def take(self, items: np.ndarray) -> "Worklist":
    """These items (indices, or a mask) only."""
    return Worklist(
      self.visits.take(items),
      self.rows[items],
      self.outputs[items],
      None if self.kept is None else self.kept[items],
      self.edges,
      None if self.cases is None else self.cases[items],
    )


def make_calls(
  work: Worklist,
  *,
  rows: int,
  heads: np.ndarray,
  kv_heads: np.ndarray,
  residues: np.ndarray,
) -> tuple[Call, ...]:
  """Calls whose tables fit into scalar memory, split between output tiles.

  Args:
    work: The items; none gives no call.
    rows: Size of the grid's row axis.
    heads: Query heads, [rows, members].
    kv_heads, residues: Of these heads.
  """
  visits = work.visits
  count = visits.q_tile.size
  if not count:
    return ()
  starts = np.ones(count, bool)
  starts[1:] = work.outputs[1:] != work.outputs[:-1]
  words = np.full(count, 2)
  if work.kept is not None:
    words += 1 + np.where(visits.is_full, 0, work.kept.shape[2])
  if work.edges:
    words += 1
  return tuple(
    _pack(work, starts, part, rows, heads, kv_heads, residues)
    for part in _parts(starts, words)
  )


def _parts(starts: np.ndarray, words: np.ndarray) -> list[slice]:
  """Cuts the items at `starts` into parts of at most `_TABLE_WORDS`."""
  ends = np.append(np.flatnonzero(starts)[1:], starts.size)
  total = np.cumsum(words)[ends - 1]
  parts = []
  begin = used = 0
  while begin < starts.size:
    fits = np.searchsorted(total, used + _TABLE_WORDS, side="right")
    # One output tile alone is taken whole.
    cut = max(fits - 1, np.searchsorted(ends, begin, side="right"))
    parts.append(slice(begin, int(ends[cut])))
    begin, used = int(ends[cut]), int(total[cut])
  return parts


def _pack(
  work: Worklist,
  starts: np.ndarray,
  part: slice,
  rows: int,
  heads: np.ndarray,
  kv_heads: np.ndarray,
  residues: np.ndarray,
) -> Call:
  visits = Visits(*(array[part] for array in work.visits))
  first = starts[part]
  last = np.append(first[1:], True)
  kind = FAR * visits.is_far + EDGE * ~visits.is_full
  flags = FIRST * first + LAST * last + kind
  near = _carry(visits.kv_tile, ~visits.is_far)
  far = _carry(visits.kv_tile, visits.is_far)
  pointers = bits = np.zeros(1, np.int32)
  if work.kept is not None:
    pointers, bits = _pack_bits(work.kept[part], visits.is_full)
  if work.cases is not None:
    pointers = work.cases[part]
  tables = Tables(
    place=pack_place(work.rows[part], visits.q_tile),
    tiles=pack_tiles(near, far, flags),
    heads=heads.reshape(-1),
    kv_heads=kv_heads.reshape(-1),
    residues=residues.reshape(-1),
    sequences=np.zeros(heads.size),
    firsts=np.zeros(1),
    lasts=np.zeros(1),
    pointers=pointers,
    bits=bits,
  )
  return Call(
    # The top bits may be set, and int32 is what scalar memory takes.
    tables=Tables(
      *(array.astype(np.uint32).view(np.int32) for array in tables)
    ),
    rows=rows,
    members=heads.shape[1],
    kinds=tuple(int(each) for each in np.unique(kind)),
    edges=work.edges,
  )


def _carry(tiles: np.ndarray, used: np.ndarray) -> np.ndarray:
  """The tile last used, item by item; before the first one, that one."""
  if not used.any():
    return np.zeros(tiles.size, np.int64)
  source = np.where(used, np.arange(tiles.size), -1)
  source = np.maximum.accumulate(source)
  return tiles[np.where(source < 0, np.argmax(used), source)].astype(np.int64)


def _pack_bits(
  kept: np.ndarray, is_full: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Where each item's words start, and the words; full items have none."""
  weights = np.left_shift(np.int64(1), np.arange(kept.shape[1]))
  words = np.einsum("eij,i->ej", kept[~is_full].astype(np.int64), weights)
  pointers = np.zeros(kept.shape[0], np.int64)
  if not words.size:
    return pointers, np.zeros(1, np.int64)
  # Equal tiles, such as those along the diagonal, share their words.
  distinct, index = np.unique(words, axis=0, return_inverse=True)
  pointers[~is_full] = index.reshape(-1) * words.shape[1]
  return pointers, distinct.reshape(-1)
