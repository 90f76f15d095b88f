import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.kvcache import CacheShape
from jaxheads.kvcache.row_table import RowTable
from jaxheads.kvcache.rows import (
  check_drops,
  check_rows,
  drop_pages,
  most_pages,
  num_pages,
  row_step,
)
from tests.strategies import sweep


def int32(*numbers):
  return np.array(numbers, np.int32)


def test_one_step_of_each_kind():
  step = row_step(
    lengths=int32(0, 3, 4, 6, 6, 8),
    rings=int32(0, 0, 0, 3, 3, 0),
    written=int32(0, 0, 0, 0, 4, 0),
    dropped=int32(0, 0, 0, 0, 0, 1),
    page_size=4,
  )
  assert step.write.tolist() == [0, 3, 4, 3, 4, 4]
  assert step.new_page.tolist() == [1, 0, 1, 0, 0, 1]
  assert step.lengths.tolist() == [1, 4, 5, 6, 6, 5]


def row_cases():
  row = st.integers(0, 30).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(0, length))
  )
  return st.tuples(
    st.lists(row, min_size=1, max_size=8), st.integers(0, 40), st.integers(1, 9)
  )


@sweep(8)  # Each new length compiles a few operations.
@hypothesis.given(case=row_cases())
def test_steps_of_arrays_are_steps_of_rows(case):
  rows, written, page_size = case
  lengths, rings = (int32(*column) for column in zip(*rows, strict=True))
  step = row_step(lengths, rings, np.int32(written), 0, page_size)
  on_device = row_step(
    jnp.asarray(lengths), jnp.asarray(rings), jnp.int32(written), 0, page_size
  )
  for i, (length, ring) in enumerate(rows):
    if ring:
      expected = (length - ring + written % ring, 0, length)
    else:
      expected = (length, int(length % page_size == 0), length + 1)
    assert tuple(int(x[i]) for x in step) == expected
    assert tuple(int(x[i]) for x in on_device) == expected
  assert all(x.dtype == np.int32 for x in (*step, *on_device))


def test_a_ring_overwrites_its_oldest_token():
  row = list("abcdefg")
  for written, token in enumerate("hijklm"):
    at = row_step(int32(7), int32(3), np.int32(written), 0, 4).write[0]
    row[at] = token
    newest = sorted("abcdefghijklm"[: 8 + written])[-3:]
    assert sorted(row[4:]) == newest and row[:4] == list("abcd")


def test_dropped_pages_close_up():
  table = np.array([[5, 6, 7, 0], [8, 9, 0, 0], [1, 2, 3, 4]], np.int32)
  after = drop_pages(table, int32(1, -1, 3))
  assert after.tolist() == [[5, 7, 0, 0], [8, 9, 0, 0], [1, 2, 3, 0]]
  assert drop_pages(table, int32(0, 1, 0)).tolist() == [
    [6, 7, 0, 0],
    [8, 0, 0, 0],
    [2, 3, 4, 0],
  ]


@hypothesis.given(
  seed=st.integers(0, 2**32 - 1), drops=st.booleans(), ring=st.booleans()
)
def test_most_pages_is_the_most_of_all_steps(seed, drops, ring):
  rng = np.random.default_rng(seed)
  page_size, first = int(rng.integers(1, 6)), int(rng.integers(1, 20))
  count = int(rng.integers(0, 30))
  lengths = rng.integers(0, first + 1, (2, 3)).astype(np.int32)
  rings = np.where(ring, rng.integers(0, lengths + 1), 0).astype(np.int32)
  choices = {}  # Of a position; drawn from what the rows have then.
  now, most = lengths, num_pages(lengths, page_size).sum()
  for written in range(count):
    position = first + written
    gone = np.zeros_like(now)
    if drops and position % page_size == 0:
      can = (now - rings) // page_size > 0
      choices[position] = np.where(can & (rng.random(now.shape) < 0.5), 0, -1)
      gone = (choices[position] == 0).astype(np.int32)
    now = row_step(now, rings, np.int32(written), gone, page_size).lengths
    most = max(most, num_pages(now, page_size).sum())
  assert most == most_pages(
    lengths,
    rings,
    first=first,
    count=count,
    page_size=page_size,
    drops=lambda at: choices[at] if drops else None,
  )


@pytest.mark.parametrize(
  ("lengths", "rings", "message"),
  [
    ([[3, 2, 1]], [[0, 0]], r"must be \[1, 2\]"),
    ([[9, 2]], [[0, 0]], r"in \[0, 8\], got 2 to 9"),
    ([[2, -1]], [[0, 0]], r"in \[0, 8\], got -1 to 2"),
    ([[2, 3]], [[0, 0]], "descend"),
    ([[3, 2]], [[0, 3]], "at most their row's length"),
    ([[3, 2]], [[-1, 0]], "0 or more"),
  ],
)
def test_impossible_rows_are_refused(lengths, rings, message):
  with pytest.raises(ValueError, match=message):
    check_rows(np.array(lengths), np.array(rings), (1, 2), 8)


@pytest.mark.parametrize("drop", [1, 2])
def test_only_full_pages_before_the_ring_can_go(drop):
  check_drops(int32(0), int32(9), int32(2), 4)
  with pytest.raises(ValueError, match="full page"):
    check_drops(int32(drop), int32(9), int32(2), 4)


def test_a_slot_takes_and_gives_back_its_pages():
  table = RowTable(CacheShape(2, 2), num_slots=3, max_length=10, page_size=4)
  lengths = np.array([[9, 4], [5, 0]], np.int32)
  given = table.place(1, lengths, 0 * lengths, int32(1, 2, 3, 4, 5, 6))
  assert given.tolist() == [[[1, 2, 3], [4, 0, 0]], [[5, 6, 0], [0, 0, 0]]]
  active = np.array([False, True, False])
  assert table.listed(active) == 4
  step = table.next_step(int32(0, 0, 0))
  new = table.take_step(step, active, int32(7, 8))
  assert new[:, 1].tolist() == [[0, 7], [0, 8]]
  assert not new[:, [0, 2]].any()
  assert table.lengths[:, 1].tolist() == [[10, 5], [6, 1]]
  assert table.listed(active) == 5
  gone = table.drop(1, np.array([[0, -1], [0, -1]]))
  assert gone.tolist() == [1, 5]
  assert table.pages[:, 1].tolist() == [
    [[2, 3, 0], [4, 7, 0]],
    [[6, 0, 0], [8, 0, 0]],
  ]
  assert sorted(table.clear(1)) == [2, 3, 4, 6, 7, 8]
  assert not table.pages.any() and not table.lengths.any()
