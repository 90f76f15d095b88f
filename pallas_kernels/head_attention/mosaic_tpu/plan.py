"""Which kernel calls a run of heads takes, forward and backward."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from pallas_kernels.head_attention.contexts import Rule
from pallas_kernels.head_attention.mosaic_tpu.edges import Edge
from pallas_kernels.head_attention.mosaic_tpu.items import (
  Call,
  Worklist,
  make_calls,
)
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  TableHeads,
  Visits,
  far_blocks,
  table_visits,
)
from pallas_kernels.head_attention.tiling import Tiling

# More cases than these share one code, which masks every tile wholly.
_MOST_EDGES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Everything static about one run of heads; hashable.

  Attributes:
    run: The heads.
    block: Tokens of a block.
    is_causal: Hide keys after the query inside a block.
    tiling: Tile sizes.
    q_length, kv_length: Queries and keys, without padding.
    q_offset: Position of the first query.
    groups: Query heads of a KV head.
    packed: Queries are packed rows, and `run` is of the KV heads of all
      sequences: their residues, or which rule they have, are in the tables.
  """

  run: StridedHeads | TableHeads
  block: int
  is_causal: bool
  tiling: Tiling
  q_length: int
  kv_length: int
  q_offset: int
  groups: int
  packed: bool = False

  @property
  def num_heads(self) -> int:
    """Query heads of the run."""
    return self.run.stop - self.run.start

  @property
  def kv_start(self) -> int:
    """First KV head that the run reads."""
    return self.run.start // self.groups

  @property
  def kv_stop(self) -> int:
    """KV head after the last one."""
    return -(-self.run.stop // self.groups)

  @property
  def q_tiles(self) -> int:
    """Query tiles."""
    return -(-self.q_length // self.tiling.block_q)

  @property
  def kv_tiles(self) -> int:
    """Contiguous key tiles."""
    return -(-self.kv_length // self.tiling.block_kv)

  @property
  def window(self) -> int | None:
    """Blocks of the window; None if a strided head sees all of the past."""
    assert isinstance(self.run, StridedHeads)
    return None if self.run.stride == 1 else self.run.local

  @property
  def stride(self) -> int:
    """Blocks from one of a far tile to the next."""
    return self.run.stride if isinstance(self.run, StridedHeads) else 1

  @property
  def far_blocks(self) -> int:
    """Blocks of a far tile."""
    if isinstance(self.run, TableHeads):
      return 1
    return far_blocks(self.run, self.block, self.tiling, self.kv_length)

  @property
  def kv_padded(self) -> int:
    """Keys after padding: whole tiles, near and far."""
    multiple = self.tiling.block_kv
    if has_far(self):
      multiple = int(
        np.lcm(multiple, self.far_blocks * self.stride * self.block)
      )
    return -(-self.kv_length // multiple) * multiple


class Plan(NamedTuple):
  """Calls, and whether together they write all of the output."""

  calls: tuple[Call, ...]
  covers_all: bool


@functools.lru_cache(maxsize=256)
def strided_worklist(layout: Layout) -> Worklist:
  """What every head of a strided run visits, query tile by query tile.

  Far tiles come first, then near ones, each in ascending order. Near tiles
  hold the window, far ones what a query's window has left behind of the shard.
  A far tile is full only if it is so for every residue.
  """
  run, block = layout.run, layout.block
  assert isinstance(run, StridedHeads)
  bq, bkv = layout.tiling.block_q, layout.tiling.block_kv
  shards = layout.far_blocks * max(run.stride, 1)
  items: list[tuple[int, int, bool, bool]] = []
  cases: list[int] = []
  edges: dict[Edge, int] = {}
  for tile in range(-(-layout.q_length // bq)):
    first = layout.q_offset + tile * bq
    last = layout.q_offset + min((tile + 1) * bq, layout.q_length) - 1
    past = last // block - run.local + 1
    if layout.window is not None and run.stride:
      held = min(max(past, 0), -(-layout.kv_length // block))
      # Of the residue that has the most of them.
      for far in range(-(-held // shards)):
        end = (far + 1) * shards
        full = end <= first // block - run.local + 1
        full = full and end * block <= layout.kv_length
        items.append((tile, far, True, full))
        cases.append(0)
    start = 0
    if layout.window is not None:
      start = max(first // block - run.local + 1, 0) * block // bkv
    for near in range(start, min(last, layout.kv_length - 1) // bkv + 1):
      begin = near * bkv
      full = begin + bkv <= min(first + 1, layout.kv_length)
      if layout.window is not None:
        full = full and begin >= past * block
      items.append((tile, near, False, full))
      edge = Edge(
        offset=first - begin,
        phase=begin % block,
        keys=min(bkv, layout.kv_length - begin),
        block=block,
        local=layout.window,
      )
      cases.append(0 if full else edges.setdefault(edge, len(edges)))
  columns = np.asarray(items, np.int32).reshape(-1, 4).T
  visits = Visits(
    columns[0], columns[1], columns[2].astype(bool), columns[3].astype(bool)
  )
  work = Worklist(visits, np.zeros_like(visits.q_tile), visits.q_tile)
  if len(edges) > _MOST_EDGES:
    return work
  return work._replace(edges=tuple(edges), cases=np.asarray(cases))


@functools.lru_cache(maxsize=256)
def has_far(layout: Layout) -> bool:
  """Whether keys are read through the shard view."""
  if isinstance(layout.run, TableHeads) or layout.window is None:
    return False
  if layout.packed:
    return layout.run.stride > 0
  return bool(strided_worklist(layout).visits.is_far.any())


@functools.lru_cache(maxsize=256)
def forward_plan(layout: Layout) -> Plan:
  """Calls of the kernels that go query tile by query tile."""
  run = layout.run
  heads = np.arange(run.start, run.stop)[:, None]
  if isinstance(run, StridedHeads):
    residues = np.asarray(run.residues)[:, None]
    work = strided_worklist(layout)
    shared = True
  else:
    residues = np.zeros_like(heads)
    shared = len(set(run.rules)) == 1
    work = _concatenate(layout, run.rules[:1] if shared else run.rules)
    work = work._replace(
      outputs=work.rows * layout.q_tiles + work.visits.q_tile
    )
  calls = make_calls(
    work,
    rows=layout.num_heads if shared else 1,
    heads=heads,
    kv_heads=heads // layout.groups,
    residues=residues,
  )
  lists = 1 if shared else layout.num_heads
  covered = np.unique(work.outputs).size == lists * layout.q_tiles
  return Plan(calls, covered)


class KeyPlan(NamedTuple):
  """Calls that go key tile by key tile.

  Attributes:
    near: They write contiguous key tiles, each at most once.
    far: They add to tiles of shards, after the near ones.
  """

  near: Plan
  far: Plan


@functools.lru_cache(maxsize=256)
def key_plan(layout: Layout) -> KeyPlan:
  """Calls of the kernels that go key tile by key tile."""
  run = layout.run
  if isinstance(run, TableHeads):
    return KeyPlan(_table_key_plan(layout, run), Plan((), True))
  work = strided_worklist(layout)
  work = work.take(work.visits.key_order())
  near = work.take(~work.visits.is_far)
  far = work.take(work.visits.is_far)._replace(edges=())
  covered = np.unique(near.visits.kv_tile).size == layout.kv_tiles
  # Members of a row add to the same output tiles.
  groups: dict[int, list[int]] = {}
  shards: dict[tuple[int, int], list[int]] = {}
  for head in range(run.start, run.stop):
    kv_head = head // layout.groups
    residue = run.residues[head - run.start]
    groups.setdefault(kv_head, []).append(head)
    shards.setdefault((kv_head, residue), []).append(head)
  return KeyPlan(
    Plan(_row_calls(layout, near, list(groups.values())), covered),
    Plan(_row_calls(layout, far, list(shards.values())), False),
  )


def _row_calls(
  layout: Layout, work: Worklist, rows: list[list[int]]
) -> tuple[Call, ...]:
  """Calls over rows that share their visits, rows of one size at a time."""
  assert isinstance(layout.run, StridedHeads)
  work = work._replace(outputs=work.visits.kv_tile)
  residues = np.asarray(layout.run.residues)
  calls: list[Call] = []
  for members in sorted({len(row) for row in rows}):
    heads = np.asarray([row for row in rows if len(row) == members])
    calls += make_calls(
      work,
      rows=heads.shape[0],
      heads=heads,
      kv_heads=heads // layout.groups,
      residues=residues[heads - layout.run.start],
    )
  return tuple(calls)


def _table_key_plan(layout: Layout, run: TableHeads) -> Plan:
  members = layout.groups
  heads = np.arange(run.start, run.stop)
  rules = run.rules
  whole = run.start % members == 0 and run.stop % members == 0
  if not whole or any(
    rule != rules[at - at % members] for at, rule in enumerate(rules)
  ):
    members = 1
  rules = rules[::members]
  # Rows with a KV head of their own may share the list.
  shared = len(set(rules)) == 1 and members == layout.groups
  work = _concatenate(layout, rules[:1] if shared else rules)
  visits = work.visits
  kv_heads = heads.reshape(-1, members) // layout.groups
  kv_head = kv_heads[work.rows, 0] - layout.kv_start
  outputs = kv_head * layout.kv_tiles + visits.kv_tile
  order = np.lexsort((-visits.q_tile, work.rows, outputs))
  calls = make_calls(
    work._replace(outputs=outputs).take(order),
    rows=len(rules) if shared else 1,
    heads=heads.reshape(-1, members),
    kv_heads=kv_heads,
    residues=np.zeros_like(kv_heads),
  )
  lists = 1 if shared else layout.kv_stop - layout.kv_start
  covered = np.unique(outputs).size == lists * layout.kv_tiles
  return Plan(calls, covered)


def _concatenate(layout: Layout, rules: tuple[Rule, ...]) -> Worklist:
  """The visits of one row after the other."""
  found = [
    table_visits(
      rule,
      block=layout.block,
      is_causal=layout.is_causal,
      tiling=layout.tiling,
      q_length=layout.q_length,
      kv_length=layout.kv_length,
      q_offset=layout.q_offset,
    )
    for rule in rules
  ]
  counts = [visits.q_tile.size for visits, _ in found]
  visits = Visits(
    *(
      np.concatenate(arrays)
      for arrays in zip(*(visits for visits, _ in found), strict=True)
    )
  )
  rows = np.repeat(np.arange(len(rules)), counts)
  return Worklist(
    visits, rows, rows, np.concatenate([kept for _, kept in found])
  )
