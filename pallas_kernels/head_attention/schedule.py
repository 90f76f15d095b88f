"""Which tiles a kernel visits: what the pattern lets a query tile see.

A strided head reads its keys in two parts that share an online softmax:

  near   the contiguous tiles from `near_start` to the query's own. They hold
         the window; the head's remote blocks that lie there count as seen.
  far    the head's own shard before `near_start`: with the keys viewed as
         [S / (stride b), stride, b] a slice at the head's residue, which is
         one large tile however small the blocks are.

Everything a query tile sees of the far part, all of its queries see, so far
tiles need no mask but for the last one's tail. (The TPU kernels draw the line
query by query instead: `mosaic_tpu.plan.strided_worklist`.) Heads that differ
in their residue only have the same schedule.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.head_attention.contexts import (
  HeadContexts,
  Rule,
  Strided,
)
from pallas_kernels.head_attention.tiling import Tiling


@dataclasses.dataclass(frozen=True)
class StridedHeads:
  """Consecutive query heads whose rules differ in the residue only.

  Attributes:
    start, stop: The heads.
    local, stride: As in `Strided`.
    residues: One a head.
    sinks: As in `Strided`.
  """

  start: int
  stop: int
  local: int
  stride: int
  residues: tuple[int, ...]
  sinks: int = 0


@dataclasses.dataclass(frozen=True)
class TableHeads:
  """Consecutive query heads whose visits are looked up.

  Attributes:
    start, stop: The heads.
    rules: One a head.
  """

  start: int
  stop: int
  rules: tuple[Rule, ...]


def split_heads(
  pattern: HeadContexts, *, looks_up_sinks: bool = True
) -> tuple[StridedHeads | TableHeads, ...]:
  """The heads of a pattern in runs that one kernel call can serve.

  Args:
    pattern: What the heads see.
    looks_up_sinks: Strided heads with sinks count as those of a table.
  """
  runs: list[list[int]] = []
  kinds: list[object] = []
  for head, rule in enumerate(pattern.rules):
    kind: object = "table"
    looks_up = looks_up_sinks and isinstance(rule, Strided) and rule.sinks
    if isinstance(rule, Strided) and not looks_up and pattern.is_causal:
      kind = (rule.local, rule.stride, rule.sinks)
    if kinds and kinds[-1] == kind:
      runs[-1].append(head)
    else:
      runs.append([head])
      kinds.append(kind)
  result: list[StridedHeads | TableHeads] = []
  for heads, kind in zip(runs, kinds, strict=True):
    start, stop = heads[0], heads[-1] + 1
    rules = pattern.rules[start:stop]
    if kind == "table":
      result.append(TableHeads(start, stop, rules))
      continue
    strided = [rule for rule in rules if isinstance(rule, Strided)]
    result.append(
      StridedHeads(
        start,
        stop,
        local=strided[0].local,
        stride=strided[0].stride,
        residues=tuple(rule.residue for rule in strided),
        sinks=strided[0].sinks,
      )
    )
  return tuple(result)


def near_start(
  first_position: int, *, block: int, local: int, block_kv: int
) -> int:
  """First key of the near part of a query tile, a multiple of `block_kv`.

  Args:
    first_position: Position, among the keys, of the tile's first query.
    block: Tokens of a block.
    local: Blocks of the window.
    block_kv: Keys of a tile; a multiple of `block` or a divisor of it.
  """
  window = max(0, first_position // block - local + 1) * block
  return window // block_kv * block_kv


class Visits(NamedTuple):
  """Tiles in the order in which a kernel visits them; int32 or bool [items].

  Attributes:
    q_tile: Query tile.
    kv_tile: Key tile: contiguous if near, of the head's shard if far.
    is_far: From the far part.
    is_full: Every query of the tile sees every key: no mask is needed.
  """

  q_tile: np.ndarray
  kv_tile: np.ndarray
  is_far: np.ndarray
  is_full: np.ndarray

  def take(self, items: np.ndarray) -> "Visits":
    """These items (indices, or a mask) only."""
    return Visits(*(array[items] for array in self))

  def key_order(self) -> np.ndarray:
    """Indices: near ones first, key tile by key tile, queries descend.

    With causal keys and windows, no query tile then comes twice in three
    visits but for the last ones: a kernel that sums over key tiles has time to
    store and to fetch.
    """
    return np.lexsort((-self.q_tile, self.kv_tile, self.is_far))


def far_blocks(heads: StridedHeads, block: int, tiling: Tiling, S: int) -> int:
  """Blocks of one far tile; at most what a shard of S tokens holds."""
  held = _ceil(S, max(heads.stride, 1) * block)
  wanted = max(1, tiling.block_kv // block)
  while wanted > 1 and wanted // 2 >= held:
    wanted //= 2
  return wanted


@functools.lru_cache(maxsize=256)
def strided_visits(
  heads: StridedHeads,
  *,
  block: int,
  tiling: Tiling,
  q_length: int,
  kv_length: int,
  q_offset: int,
) -> Visits:
  """What the query tiles of strided heads visit, query tile by query tile.

  Far tiles come first, then near ones, each in ascending order. A far tile is
  full only if it is so for every residue; else the kernel hides the keys at
  and after the query tile's `near_start` (and after the last key).

  Query tiles that see nothing have no visit.
  """
  bq, bkv = tiling.block_q, tiling.block_kv
  n = far_blocks(heads, block, tiling, kv_length)
  items: list[np.ndarray] = []
  for tile in range(_ceil(q_length, bq)):
    first = q_offset + tile * bq
    last = q_offset + min((tile + 1) * bq, q_length) - 1
    start = near_start(first, block=block, local=heads.local, block_kv=bkv)
    # The part of [0, near_start) that exists, in blocks.
    past = min(start, kv_length)
    if heads.stride and past > 0:
      # Shard blocks before `past`, for the residue that has the most of them.
      held = _ceil(_ceil(past, block), heads.stride)
      far = np.arange(_ceil(held, n))
      full = (far + 1) * n * heads.stride * block <= past
      items.append(_items(tile, far, True, full))
    end = min(last, kv_length - 1)
    if end >= start:
      near = np.arange(start // bkv, end // bkv + 1)
      window = max(0, last // block - heads.local + 1) * block
      full = (near + 1) * bkv <= min(first + 1, kv_length)
      full &= near * bkv >= window
      items.append(_items(tile, near, False, full))
  if not items:
    items.append(_items(0, np.arange(0), False, np.zeros(0, bool)))
  stacked = np.concatenate(items, axis=1)
  return Visits(
    stacked[0].astype(np.int32),
    stacked[1].astype(np.int32),
    stacked[2].astype(bool),
    stacked[3].astype(bool),
  )


def _ceil(a: int, b: int) -> int:
  return -(-a // b)


def _items(
  q_tile: int, kv_tiles: np.ndarray, is_far: bool, is_full: np.ndarray
) -> np.ndarray:
  size = kv_tiles.size
  return np.stack(
    [
      np.full(size, q_tile),
      kv_tiles,
      np.full(size, int(is_far)),
      np.broadcast_to(is_full, (size,)).astype(int),
    ]
  )


@functools.lru_cache(maxsize=256)
def table_visits(
  rule: Rule,
  *,
  block: int,
  is_causal: bool,
  tiling: Tiling,
  q_length: int,
  kv_length: int,
  q_offset: int,
) -> tuple[Visits, np.ndarray]:
  """What the query tiles of one head visit under any rule.

  Args:
    rule: What the head sees.
    block: Tokens of a block; at most `tiling.block_kv`.
    is_causal: Hide keys after the query inside a block.
    tiling: Tile sizes.
    q_length, kv_length: Queries and keys.
    q_offset: Position of the first query.

  Returns:
    The visits, and which blocks of each visited tile are kept: bool
    [items, query blocks of a tile, key blocks of a tile]. The first query
    block is that of the tile's first query; if `q_offset` is not a multiple
    of `block`, a tile touches one more of them.
  """
  bq, bkv = tiling.block_q, tiling.block_kv
  q_blocks = max(1, bq // block) + bool(q_offset % block)
  kv_blocks = max(1, bkv // block)
  kv_tiles = _ceil(kv_length, bkv)
  visits: list[np.ndarray] = []
  kept: list[np.ndarray] = []
  j = np.arange(kv_tiles * kv_blocks)[None]
  exists = j * block < kv_length
  for tile in range(_ceil(q_length, bq)):
    first = q_offset + tile * bq
    last = q_offset + min((tile + 1) * bq, q_length) - 1
    i = np.minimum(first // block + np.arange(q_blocks), last // block)[:, None]
    # A rule need not be defined beyond the last key.
    keep = rule.keep(i, np.minimum(j, (kv_length - 1) // block)) & exists
    keep = keep.reshape(q_blocks, kv_tiles, kv_blocks).transpose(1, 0, 2)
    seen = keep.any(axis=(1, 2))
    # The last tiles may hang over the ends.
    tile_ids = np.nonzero(seen)[0]
    full = keep[seen].all(axis=(1, 2))
    full &= (tile_ids + 1) * bkv <= kv_length
    if is_causal:
      full &= (tile_ids + 1) * bkv <= first + 1
    visits.append(_items(tile, tile_ids, False, full))
    kept.append(keep[seen])
  stacked = np.concatenate(visits, axis=1)
  return Visits(
    stacked[0].astype(np.int32),
    stacked[1].astype(np.int32),
    stacked[2].astype(bool),
    stacked[3].astype(bool),
  ), np.concatenate(kept)
