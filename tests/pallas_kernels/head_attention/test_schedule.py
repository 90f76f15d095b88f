"""Visits cover what the mask keeps: each visible pair once, and no other.

The tests replay the visits of a pattern as a kernel would, counting for each
(query, key) pair how often it is let through, and compare the counts with the
oracle's mask. They know of a schedule only what its docstrings promise.
"""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pallas_kernels.head_attention import (
  HeadContexts,
  Ranged,
  Strided,
  Table,
  Tiling,
  schedule,
)
from tests import oracles_s2

SWEEP = hypothesis.settings(max_examples=150)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """Sizes of one call."""

  block: int
  block_q: int
  block_kv: int
  T: int
  S: int
  q_offset: int

  @property
  def tiling(self):
    return Tiling(block_q=self.block_q, block_kv=self.block_kv)

  @property
  def sizes(self):
    return {
      "block": self.block,
      "tiling": self.tiling,
      "q_length": self.T,
      "kv_length": self.S,
      "q_offset": self.q_offset,
    }

  def blocks_of(self, rule_mask):
    """Block mask [1, rows, columns] of a function of (rows, columns)."""
    rows = (self.q_offset + self.T - 1) // self.block + 1
    columns = (self.S - 1) // self.block + 1
    return rule_mask(rows, columns)

  def tokens(self, blocks, is_causal=True):
    """The oracle's mask [T, S] for a block mask [rows, columns]."""
    return oracles_s2.token_mask(
      blocks[None],
      self.block,
      q_length=self.T,
      kv_length=self.S,
      q_offset=self.q_offset,
      is_causal=is_causal,
    )[0]


@st.composite
def problems(draw, *, table=False):
  block = draw(st.sampled_from([1, 2, 4, 8]))
  block_kv = draw(st.sampled_from([1, 2, 4, 8, 16, 32]))
  if table:
    block_kv = max(block_kv, block)
  return Problem(
    block=block,
    block_q=draw(st.sampled_from([1, 2, 4, 8, 16, 32])),
    block_kv=block_kv,
    T=draw(st.integers(1, 60)),
    S=draw(st.integers(1, 70)),
    q_offset=draw(st.integers(0, 40)),
  )


def strided_heads(local, stride, residues):
  return schedule.StridedHeads(
    0, len(residues), local=local, stride=stride, residues=residues
  )


def far_keys(problem, heads, kv_tile, residue):
  """Key positions of a tile of a head's shard, in order."""
  n = schedule.far_blocks(heads, problem.block, problem.tiling, problem.S)
  shard_blocks = kv_tile * n + np.arange(n)
  starts = (shard_blocks * heads.stride + residue) * problem.block
  return (starts[:, None] + np.arange(problem.block)).ravel()


def replay(problem, heads, residue, visits):
  """How often each pair [T, S] is let through for a head of this residue."""
  p = problem
  counts = np.zeros((p.T, p.S), int)
  positions = p.q_offset + np.arange(p.T)
  for q_tile, kv_tile, is_far, is_full in zip(*visits, strict=True):
    rows = np.arange(q_tile * p.block_q, min((q_tile + 1) * p.block_q, p.T))
    assert rows.size, "a tile without queries"
    start = schedule.near_start(
      p.q_offset + q_tile * p.block_q,
      block=p.block,
      local=heads.local,
      block_kv=p.block_kv,
    )
    if is_far:
      keys = far_keys(p, heads, kv_tile, residue)
      seen = np.broadcast_to(keys < min(start, p.S), (rows.size, keys.size))
    else:
      keys = kv_tile * p.block_kv + np.arange(p.block_kv)
      assert (keys >= start).all(), "a near tile before the near part"
      # One run of query blocks a key: from its own to the end of the window,
      # or for ever.
      i, j = positions[rows, None] // p.block, keys[None] // p.block
      last = j + heads.local - 1
      if heads.stride:
        last = np.where(j % heads.stride == residue, np.inf, last)
      seen = (keys[None] <= positions[rows, None]) & (i <= last)
      seen = seen & (keys[None] < p.S)
    if is_full:
      assert (keys < p.S).all(), "a full tile that hangs over the keys' end"
      seen = np.ones((rows.size, keys.size), bool)
    line, column = np.nonzero(seen)
    np.add.at(counts, (rows[line], keys[column]), 1)
  return counts


def assert_covers(problem, heads, visits):
  """Every pair that the formula keeps is let through once, and no other.

  `heads` must own residues 0 .. V - 1 in order: residue r is head -r mod V
  of the paper's formula.
  """
  stride = max(heads.stride, 1)
  assert heads.residues == tuple(range(stride))
  rows = (problem.q_offset + problem.T - 1) // problem.block + 1
  columns = (problem.S - 1) // problem.block + 1
  for residue in heads.residues:
    if heads.stride:
      blocks = oracles_s2.strided_blocks(
        1,
        rows,
        columns,
        local=heads.local,
        stride=heads.stride,
        offset=-residue,
      )
    else:
      blocks = oracles_s2.window_blocks(1, rows, columns, local=heads.local)
    np.testing.assert_array_equal(
      replay(problem, heads, residue, visits),
      problem.tokens(blocks[0]).astype(int),
      f"{problem}, residue {residue} of {heads.stride}, local {heads.local}",
    )


def assert_in_order(visits):
  """Query tile by query tile, far before near, keys ascending."""
  order = np.lexsort((visits.kv_tile, ~visits.is_far, visits.q_tile))
  np.testing.assert_array_equal(order, np.arange(len(order)))


@SWEEP
@hypothesis.given(
  problem=problems(), local=st.integers(1, 5), stride=st.integers(0, 9)
)
def test_strided_visits_let_each_visible_pair_through_once(
  problem, local, stride
):
  heads = strided_heads(local, stride, tuple(range(max(stride, 1))))
  visits = schedule.strided_visits(heads, **problem.sizes)
  assert_covers(problem, heads, visits)
  assert_in_order(visits)


@pytest.mark.parametrize("stride", [1, 2, 3, 8])
@pytest.mark.parametrize("local", [1, 2, 16])
@pytest.mark.parametrize(
  "problem",
  [
    Problem(block=16, block_q=64, block_kv=128, T=515, S=515, q_offset=0),
    Problem(block=64, block_q=32, block_kv=16, T=129, S=515, q_offset=386),
    Problem(block=16, block_q=128, block_kv=64, T=97, S=400, q_offset=71),
  ],
  ids=["whole", "small tiles", "in the middle"],
)
def test_strided_visits_of_larger_problems(problem, local, stride):
  heads = strided_heads(local, stride, tuple(range(stride)))
  assert_covers(problem, heads, schedule.strided_visits(heads, **problem.sizes))


@pytest.mark.parametrize("block_q", [16, 64, 256])
def test_merged_query_tiles_let_the_same_pairs_through(block_q):
  # A query tile of many blocks must not see more than its queries do.
  heads = strided_heads(3, 4, tuple(range(4)))
  problem = Problem(
    block=16, block_q=block_q, block_kv=32, T=300, S=300, q_offset=0
  )
  assert_covers(problem, heads, schedule.strided_visits(heads, **problem.sizes))


def test_decoding_sees_the_same_at_every_length():
  # One query at every position, whatever the tile: the released code's merged
  # tiles were wrong here.
  heads = strided_heads(2, 3, (0, 1, 2))
  for past in range(70):
    problem = Problem(
      block=4, block_q=16, block_kv=8, T=1, S=past + 1, q_offset=past
    )
    assert_covers(
      problem, heads, schedule.strided_visits(heads, **problem.sizes)
    )


@SWEEP
@hypothesis.given(
  problem=problems(), local=st.integers(1, 5), stride=st.integers(0, 9)
)
def test_by_key_is_the_same_visits_sorted(problem, local, stride):
  heads = strided_heads(local, stride, (0,))
  visits = schedule.strided_visits(heads, **problem.sizes)
  turned = visits.take(visits.key_order())
  assert sorted(zip(*visits, strict=True)) == sorted(zip(*turned, strict=True))
  # A key tile's visits lie together, the last queries first.
  items = list(zip(turned.is_far, turned.kv_tile, -turned.q_tile, strict=True))
  assert items == sorted(items)


def test_by_key_of_a_table_is_the_same_visits_sorted():
  rule = Table.from_mask(np.random.default_rng(0).random((9, 9)) < 0.4)
  problem = Problem(block=4, block_q=8, block_kv=8, T=36, S=36, q_offset=0)
  visits, _ = schedule.table_visits(rule, is_causal=True, **problem.sizes)
  turned = visits.take(visits.key_order())
  assert sorted(zip(*visits, strict=True)) == sorted(zip(*turned, strict=True))
  assert (np.diff(turned.kv_tile) >= 0).all()


def test_take_keeps_the_columns_together():
  heads = strided_heads(2, 3, (0,))
  problem = Problem(block=4, block_q=8, block_kv=8, T=70, S=70, q_offset=0)
  visits = schedule.strided_visits(heads, **problem.sizes)
  far = visits.take(visits.is_far)
  assert far.is_far.all() and 0 < len(far.q_tile) < len(visits.q_tile)
  items = list(zip(*visits, strict=True))
  assert list(zip(*far, strict=True)) == [item for item in items if item[2]]


@SWEEP
@hypothesis.given(
  problem=problems(), local=st.integers(1, 5), stride=st.integers(1, 9)
)
def test_far_tiles_are_powers_of_two_that_fit(problem, local, stride):
  heads = strided_heads(local, stride, (0,))
  n = schedule.far_blocks(heads, problem.block, problem.tiling, problem.S)
  assert n & (n - 1) == 0
  assert n * problem.block <= max(problem.block_kv, problem.block)
  held = -(-problem.S // (stride * problem.block))
  assert n == 1 or n < 2 * held


def test_the_visits_do_not_depend_on_who_owns_the_residues():
  # Heads of other residues share one schedule: it must suit all of them.
  problem = Problem(block=4, block_q=8, block_kv=16, T=80, S=80, q_offset=0)
  visits = [
    schedule.strided_visits(strided_heads(2, 5, residues), **problem.sizes)
    for residues in ((0,), (4,), (2, 3), (0, 1, 2, 3, 4))
  ]
  for other in visits[1:]:
    for a, b in zip(visits[0], other, strict=True):
      np.testing.assert_array_equal(a, b)


def test_visits_grow_with_what_is_kept():
  """Tiles visited, times their size, stay near the pairs that are kept."""
  block, local, stride = 16, 4, 8
  heads = strided_heads(local, stride, (0,))
  for length in (1024, 2048, 4096):
    problem = Problem(
      block=block, block_q=32, block_kv=32, T=length, S=length, q_offset=0
    )
    visits = schedule.strided_visits(heads, **problem.sizes)
    kept = sum(
      len(oracles_s2.row_blocks(i, local=local, stride=stride, residue=0))
      for i in range(length // block)
    )
    visited = len(visits.q_tile) * 32 * 32
    # At most a near tile and a far tile too many for each query tile, and
    # the upper half of the diagonal ones.
    spare = 3 * (length // 32) * 32 * 32
    assert kept * block * block <= visited + spare
    assert visited <= kept * block * block + spare


def test_queries_without_a_key_have_no_visit():
  # A window that has moved past the last key.
  heads = strided_heads(1, 0, (0,))
  problem = Problem(block=4, block_q=8, block_kv=8, T=40, S=8, q_offset=0)
  visits = schedule.strided_visits(heads, **problem.sizes)
  assert set(visits.q_tile) == {0}
  nothing = Problem(block=4, block_q=8, block_kv=8, T=8, S=8, q_offset=64)
  visits = schedule.strided_visits(heads, **nothing.sizes)
  assert [len(column) for column in visits] == [0, 0, 0, 0]


def test_visits_have_the_promised_types():
  heads = strided_heads(2, 3, (0,))
  problem = Problem(block=4, block_q=8, block_kv=8, T=70, S=70, q_offset=0)
  rule = Strided(local=2, stride=3)
  for visits in (
    schedule.strided_visits(heads, **problem.sizes),
    schedule.table_visits(rule, is_causal=True, **problem.sizes)[0],
  ):
    assert visits.q_tile.dtype == visits.kv_tile.dtype == np.int32
    assert visits.is_far.dtype == visits.is_full.dtype == bool
    assert len({column.shape for column in visits}) == 1


def replay_table(problem, is_causal, visits, kept):
  """How often each pair [T, S] is let through, from the visits' bits."""
  p = problem
  counts = np.zeros((p.T, p.S), int)
  positions = p.q_offset + np.arange(p.T)
  assert len(kept) == len(visits.q_tile)
  assert not visits.is_far.any()
  for item, (q_tile, kv_tile, _, is_full) in enumerate(
    zip(*visits, strict=True)
  ):
    rows = np.arange(q_tile * p.block_q, min((q_tile + 1) * p.block_q, p.T))
    assert rows.size, "a tile without queries"
    assert kept[item].any(), "a visit for nothing"
    first_block = (p.q_offset + q_tile * p.block_q) // p.block
    keys = kv_tile * p.block_kv + np.arange(p.block_kv)
    for row in rows:
      i = positions[row] // p.block - first_block
      seen = kept[item][i, np.arange(p.block_kv) // p.block]
      seen = seen & (keys < p.S)
      if is_causal:
        seen = seen & (keys <= positions[row])
      if is_full:
        assert seen.all(), "a full tile with something to hide"
      np.add.at(counts[row], keys[seen], 1)
  return counts


def assert_table_covers(problem, rule, blocks, is_causal, visits, kept):
  np.testing.assert_array_equal(
    replay_table(problem, is_causal, visits, kept),
    problem.tokens(blocks, is_causal).astype(int),
    f"{problem}, {rule}",
  )


@SWEEP
@hypothesis.given(
  problem=problems(table=True),
  seed=st.integers(0, 10_000),
  density=st.sampled_from([0.05, 0.5, 0.95, 1.0]),
  is_causal=st.booleans(),
)
def test_table_visits_of_any_mask(problem, seed, density, is_causal):
  rng = np.random.default_rng(seed)
  rows = (problem.q_offset + problem.T - 1) // problem.block + 1
  columns = (problem.S - 1) // problem.block + 1
  blocks = rng.random((rows, columns)) < density
  rule = Table.from_mask(blocks)
  visits, kept = schedule.table_visits(
    rule, is_causal=is_causal, **problem.sizes
  )
  assert_table_covers(problem, rule, blocks, is_causal, visits, kept)
  assert_in_order(visits)


@SWEEP
@hypothesis.given(
  problem=problems(table=True),
  local=st.integers(1, 4),
  sinks=st.integers(0, 4),
  near=st.integers(0, 4),
  strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
  residues=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_table_visits_of_closed_forms(
  problem, local, sinks, near, strides, residues
):
  rows = (problem.q_offset + problem.T - 1) // problem.block + 1
  columns = (problem.S - 1) // problem.block + 1
  near_residue, far_residue = (
    residue % stride for residue, stride in zip(residues, strides, strict=True)
  )
  window = Strided(local=local, sinks=sinks)
  ranged = Ranged(
    near=near,
    near_stride=strides[0],
    near_residue=near_residue,
    far_stride=strides[1],
    far_residue=far_residue,
  )
  of_window = oracles_s2.window_blocks(
    1, rows, columns, local=local, sinks=sinks
  )
  of_ranged = oracles_s2.context_range_blocks(
    rows,
    columns,
    near=near,
    near_stride=strides[0],
    far_stride=strides[1],
    near_residues=(near_residue,),
    far_residues=(far_residue,),
  )
  for rule, blocks in ((window, of_window), (ranged, of_ranged)):
    visits, kept = schedule.table_visits(rule, is_causal=True, **problem.sizes)
    assert_table_covers(problem, rule, blocks[0], True, visits, kept)


def test_a_mask_without_a_block_has_no_visit():
  rule = Table.from_mask(np.zeros((4, 4), bool))
  problem = Problem(block=4, block_q=8, block_kv=8, T=16, S=16, q_offset=0)
  visits, kept = schedule.table_visits(rule, is_causal=True, **problem.sizes)
  assert len(visits.q_tile) == len(kept) == 0


def runs_of(rules, is_causal=True):
  return schedule.split_heads(HeadContexts(8, tuple(rules), is_causal))


def test_heads_are_split_where_the_kind_changes():
  near = Ranged(
    near=1, near_stride=2, near_residue=0, far_stride=2, far_residue=1
  )
  table = Table.from_mask(np.ones((2, 2), bool))
  rules = (
    Strided(local=2, stride=4, residue=3),
    Strided(local=2, stride=4, residue=1),
    Strided(local=3, stride=4, residue=1),
    Strided(local=1, stride=1),
    Strided(local=2, sinks=1),
    table,
    near,
    Strided(local=2),
  )
  runs = runs_of(rules)
  assert runs == (
    schedule.StridedHeads(0, 2, local=2, stride=4, residues=(3, 1)),
    schedule.StridedHeads(2, 3, local=3, stride=4, residues=(1,)),
    schedule.StridedHeads(3, 4, local=1, stride=1, residues=(0,)),
    schedule.TableHeads(4, 7, rules[4:7]),
    schedule.StridedHeads(7, 8, local=2, stride=0, residues=(0,)),
  )


@hypothesis.given(
  picks=st.lists(st.integers(0, 5), min_size=1, max_size=12),
  is_causal=st.booleans(),
)
def test_every_head_is_in_one_run(picks, is_causal):
  kinds = (
    Strided(local=2, stride=4, residue=0),
    Strided(local=2, stride=4, residue=1),
    Strided(local=2, stride=3, residue=1),
    Strided(local=2),
    Strided(local=2, sinks=3),
    Table.from_mask(np.eye(3, dtype=bool)),
  )
  rules = [kinds[pick] for pick in picks]
  runs = runs_of(rules, is_causal)
  assert [h for run in runs for h in range(run.start, run.stop)] == list(
    range(len(rules))
  )
  for run in runs:
    mine = rules[run.start : run.stop]
    if isinstance(run, schedule.TableHeads):
      assert list(run.rules) == mine
      continue
    assert is_causal, "the strided schedule is for causal patterns only"
    assert mine == [
      Strided(local=run.local, stride=run.stride, residue=residue)
      for residue in run.residues
    ]


# Defects that the checks above must notice, planted one by one. Each takes
# visits and gives wrong ones.
def _without_last_far(visits):
  return visits.take(np.arange(len(visits.q_tile)) != np.argmax(visits.is_far))


def _twice(visits):
  return visits.take(np.r_[0, np.arange(len(visits.q_tile))])


def _one_tile_later(visits):
  return visits._replace(kv_tile=visits.kv_tile + visits.is_far)


def _near_one_tile_later(visits):
  return visits._replace(kv_tile=visits.kv_tile + ~visits.is_far)


def _edges_full(visits):
  return visits._replace(is_full=np.ones_like(visits.is_full))


def _far_full(visits):
  return visits._replace(is_full=visits.is_full | visits.is_far)


def _no_far(visits):
  return visits.take(~visits.is_far)


def _no_diagonal(visits):
  last = np.r_[visits.q_tile[1:] != visits.q_tile[:-1], True]
  return visits.take(~last)


@pytest.mark.parametrize(
  "defect",
  [
    _without_last_far,
    _twice,
    _one_tile_later,
    _near_one_tile_later,
    _edges_full,
    _far_full,
    _no_far,
    _no_diagonal,
  ],
)
def test_the_check_notices(defect):
  heads = strided_heads(2, 3, (0, 1, 2))
  problem = Problem(block=4, block_q=8, block_kv=8, T=70, S=70, q_offset=0)
  visits = schedule.strided_visits(heads, **problem.sizes)
  assert_covers(problem, heads, visits)
  with pytest.raises(AssertionError):
    assert_covers(problem, heads, defect(visits))


def test_the_table_check_notices_wrong_bits():
  blocks = np.random.default_rng(0).random((9, 9)) < 0.5
  rule = Table.from_mask(blocks)
  problem = Problem(block=4, block_q=8, block_kv=8, T=36, S=36, q_offset=0)
  visits, kept = schedule.table_visits(rule, is_causal=True, **problem.sizes)
  wrong = kept.copy()
  wrong[0, 0, 0] ^= True
  for bad_visits, bad_kept in (
    (visits, wrong),
    (visits, kept.swapaxes(1, 2)),
    (visits, np.roll(kept, 1, axis=0)),
    (visits._replace(is_full=np.ones_like(visits.is_full)), kept),
    (visits._replace(kv_tile=visits.kv_tile[::-1]), kept),
  ):
    with pytest.raises((AssertionError, IndexError)):
      assert_table_covers(problem, rule, blocks, True, bad_visits, bad_kept)
