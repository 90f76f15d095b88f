"""Work lists of heads whose visits are looked up, in compressed rows.

A list holds what is visited and nothing else: row r of it is
`tiles[starts[r] : starts[r + 1]]`, as long as that row needs. Heads with the
same rule share their rows. Only tiles that are partly seen carry bits.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.head_attention.contexts import Rule
from pallas_kernels.head_attention.schedule import (
  TableHeads,
  Visits,
  table_visits,
)
from pallas_kernels.head_attention.triton.problem import Problem

# Key blocks of a tile: bits of a word.
WORD = 32


class Lists(NamedTuple):
  """Visits of a run's heads, int32.

  Row (rule, query tile) is rule * q_tiles + query tile.

  Attributes:
    rules: Which distinct rule each head of the run has, [heads].
    full_starts, full_tiles: Key tiles that are seen whole.
    edge_starts, edge_tiles: Key tiles that are seen in part.
    edge_bits: A word per edge item and query block of the tile.
  """

  rules: np.ndarray
  full_starts: np.ndarray
  full_tiles: np.ndarray
  edge_starts: np.ndarray
  edge_tiles: np.ndarray
  edge_bits: np.ndarray


class KeyLists(NamedTuple):
  """The same visits from the keys' side, int32.

  Row (rule, key tile) is rule * kv_tiles + key tile.

  Attributes:
    rules: As in `Lists`.
    full_starts, full_tiles: Query tiles that see the key tile whole.
    edge_starts, edge_tiles: Query tiles that see it in part.
    edge_items: Where their bits are: row of `edge_bits`.
    edge_bits: As in `Lists`.
  """

  rules: np.ndarray
  full_starts: np.ndarray
  full_tiles: np.ndarray
  edge_starts: np.ndarray
  edge_tiles: np.ndarray
  edge_items: np.ndarray
  edge_bits: np.ndarray


class Columns(NamedTuple):
  """How the columns of a run are dealt to programs, int32.

  A column is a key tile of a KV head. One that many query tiles see (an
  attention sink) is cut, so that no program works much longer than others.

  Attributes:
    tile, kv_head: Of each program; heads count from the run's first.
    begin, end: The program's share of the column's visits.
    starts: Programs of column (KV head, tile), by kv_head * kv_tiles + tile.
  """

  tile: np.ndarray
  kv_head: np.ndarray
  begin: np.ndarray
  end: np.ndarray
  starts: np.ndarray

  @property
  def is_split(self) -> bool:
    """Whether any column has more than one program."""
    return self.tile.size + 1 > self.starts.size


def query_lists(heads: TableHeads, problem: Problem) -> Lists:
  """What each query tile of a run visits."""
  rules, order = _distinct(heads)
  visits, bits = _joined(rules, problem)
  rows = visits.rule.astype(np.int64) * problem.q_tiles + visits.q_tile
  full, edge = visits.is_full, ~visits.is_full
  count = len(rules) * problem.q_tiles
  return Lists(
    order,
    _starts(rows[full], count),
    _at_least_one(visits.kv_tile[full]),
    _starts(rows[edge], count),
    _at_least_one(visits.kv_tile[edge]),
    bits,
  )


def key_lists(heads: TableHeads, problem: Problem) -> KeyLists:
  """What each key tile of a run is visited by."""
  rules, order = _distinct(heads)
  visits, bits = _joined(rules, problem)
  rows = visits.rule.astype(np.int64) * problem.kv_tiles + visits.kv_tile
  count = len(rules) * problem.kv_tiles
  full = np.nonzero(visits.is_full)[0]
  edge = np.nonzero(~visits.is_full)[0]
  # Stable: queries stay in ascending order within a row.
  full = full[np.argsort(rows[full], kind="stable")]
  items = np.argsort(rows[edge], kind="stable")
  edge = edge[items]
  return KeyLists(
    order,
    _starts(rows[full], count),
    _at_least_one(visits.q_tile[full]),
    _starts(rows[edge], count),
    _at_least_one(visits.q_tile[edge]),
    _at_least_one(items.astype(np.int32)),
    bits,
  )


def deal_columns(
  heads: TableHeads, lists: KeyLists, problem: Problem, *, at_most: int
) -> Columns:
  """Cuts long columns.

  Args:
    heads: The run.
    lists: Its lists.
    problem: What is computed.
    at_most: Visits that a program should have. More if there are so many
      that the pieces would outnumber the columns: each holds a partial sum.
  """
  tiles = problem.kv_tiles
  visits = np.diff(lists.full_starts) + np.diff(lists.edge_starts)
  by_head = visits.reshape(-1, tiles)[lists.rules]
  group = np.arange(heads.start, heads.stop) // problem.groups
  group -= group[0]
  by_group = np.zeros((int(group[-1]) + 1, tiles), np.int64)
  np.add.at(by_group, group, by_head)
  counts = by_group.reshape(-1)
  at_most = max(at_most, -(-int(counts.sum()) // counts.size))
  pieces = np.maximum(1, -(-counts // at_most))
  column = np.repeat(np.arange(counts.size), pieces)
  starts = np.concatenate([[0], np.cumsum(pieces)])
  piece = np.arange(column.size) - starts[column]
  return Columns(
    *(
      array.astype(np.int32)
      for array in (
        column % tiles,
        column // tiles,
        piece * counts[column] // pieces[column],
        (piece + 1) * counts[column] // pieces[column],
        starts,
      )
    )
  )


@dataclasses.dataclass(frozen=True)
class _Finer:
  """A rule over blocks that are `factor` times as small."""

  rule: Rule
  factor: int

  def keep(self, i: Any, j: Any) -> Any:
    return self.rule.keep(i // self.factor, j // self.factor)


class _Joined(NamedTuple):
  """Visits of several rules, one after the other."""

  rule: np.ndarray
  q_tile: np.ndarray
  kv_tile: np.ndarray
  is_full: np.ndarray


def _distinct(heads: TableHeads) -> tuple[tuple[Rule, ...], np.ndarray]:
  rules = tuple(dict.fromkeys(heads.rules))
  index = {rule: i for i, rule in enumerate(rules)}
  return rules, np.array([index[rule] for rule in heads.rules], np.int32)


@functools.lru_cache(maxsize=16)
def _joined(
  rules: tuple[Rule, ...], problem: Problem
) -> tuple[_Joined, np.ndarray]:
  """Visits of some rules, and the words of those that are not full."""
  assert problem.q_offset is not None
  found: list[Visits] = []
  words: list[np.ndarray] = []
  for rule in rules:
    visits, keep = table_visits(
      _Finer(rule, problem.block // problem.list_block),
      block=problem.list_block,
      is_causal=problem.is_causal,
      tiling=problem.tiling,
      q_length=problem.T,
      kv_length=problem.S,
      q_offset=problem.q_offset,
    )
    found.append(visits)
    weights = np.left_shift(
      np.uint32(1), np.arange(keep.shape[-1], dtype=np.uint32)
    )
    partly = keep[~visits.is_full]
    words.append((partly * weights).sum(-1, dtype=np.uint32).view(np.int32))
  bits = np.concatenate(words)
  if not bits.size:
    bits = np.zeros((1, bits.shape[1]), np.int32)
  sizes = [visits.q_tile.size for visits in found]
  return _Joined(
    np.repeat(np.arange(len(rules), dtype=np.int32), sizes),
    np.concatenate([visits.q_tile for visits in found]),
    np.concatenate([visits.kv_tile for visits in found]),
    np.concatenate([visits.is_full for visits in found]),
  ), bits


def _starts(rows: np.ndarray, count: int) -> np.ndarray:
  sizes = np.bincount(rows, minlength=count)
  return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


def _at_least_one(array: np.ndarray) -> np.ndarray:
  # Kernels cannot take an array of nothing.
  return array if array.size else np.zeros(1, array.dtype)
