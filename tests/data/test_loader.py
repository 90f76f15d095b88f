import itertools
import json
import threading

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads.data import make_loader
from jaxheads.errors import UserError

KEYS = ("tokens", "targets", "mask")


def _take(loader, count):
  return list(itertools.islice(loader, count))


def _assert_equal(left, right):
  assert len(left) == len(right)
  for one, other in zip(left, right, strict=True):
    for key in KEYS:
      np.testing.assert_array_equal(one[key], other[key])


def _firsts(batches):
  """First token of every real row: with tokens 0, 1, 2, ... its position."""
  return [
    int(batch["tokens"][row, 0])
    for batch in batches
    for row in range(len(batch["tokens"]))
    if batch["mask"][row].all()
  ]


@st.composite
def settings(draw):
  """Short corpora, so that a few steps cross several epochs."""
  seq_len = draw(st.integers(1, 5))
  return {
    "tokens": np.arange(draw(st.integers(seq_len + 1, 40)), dtype=np.uint16),
    "seq_len": seq_len,
    "batch_size": draw(st.sampled_from([4, 8])),
    "seed": draw(st.integers(0, 2**40)),
    "shuffle": draw(st.booleans()),
  }


@hypothesis.given(settings())
def test_targets_are_the_tokens_shifted_by_one(kw):
  [batch] = _take(make_loader(**kw), 1)
  shape = (kw["batch_size"], kw["seq_len"])
  for key, dtype in zip(KEYS, (np.int32, np.int32, np.bool_), strict=True):
    assert batch[key].shape == shape
    assert batch[key].dtype == dtype
  assert batch["mask"].all()
  # The text counts upward, so the next token is one more.
  np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
  np.testing.assert_array_equal(
    batch["tokens"], batch["tokens"][:, :1] + np.arange(kw["seq_len"])
  )


@hypothesis.given(settings(), st.integers(1, 3))
def test_each_epoch_has_each_window_once(kw, num_epochs):
  loader = make_loader(**kw, num_epochs=num_epochs)
  batches = list(loader)
  windows = (len(kw["tokens"]) - 1) // kw["seq_len"]
  assert loader.num_windows == windows
  assert loader.num_steps == len(batches)
  starts = _firsts(batches)
  assert len(starts) == num_epochs * windows
  expected = list(range(0, windows * kw["seq_len"], kw["seq_len"]))
  for epoch in range(num_epochs):
    assert sorted(starts[epoch * windows :][:windows]) == expected
  # Rows that fill up the last batch come last, count for nothing, are valid.
  padding = np.concatenate([~batch["mask"] for batch in batches])
  assert padding[len(starts) :].all()
  assert not padding[: len(starts)].any()
  assert not batches[-1]["tokens"][~batches[-1]["mask"]].any()


@hypothesis.settings(max_examples=10)
@hypothesis.given(settings(), st.data())
def test_resumes_at_every_position(kw, data):
  num_epochs = data.draw(st.sampled_from([None, 3]))
  whole = make_loader(**kw, num_epochs=num_epochs)
  states, batches = [whole.get_state()], []
  for batch in itertools.islice(whole, 9):
    batches.append(batch)
    states.append(whole.get_state())
  fresh = make_loader(**kw, num_epochs=num_epochs)
  _take(fresh, data.draw(st.integers(0, 3)))  # Wherever it stood before.
  for position, state in enumerate(states):
    state = json.loads(json.dumps(state))
    assert state["step"] == position
    fresh.set_state(state)
    _assert_equal(_take(fresh, len(batches) - position), batches[position:])


def test_resumes_after_the_last_batch_and_can_start_over():
  loader = make_loader(
    np.arange(30), seq_len=4, batch_size=4, shuffle=False, num_epochs=1
  )
  start = loader.get_state()
  first = list(loader)
  assert next(loader, None) is None
  end = loader.get_state()
  loader.set_state(start)
  _assert_equal(list(loader), first)
  loader.set_state(end)
  assert next(loader, None) is None


@hypothesis.given(settings(), st.data(), st.booleans())
def test_rows_are_those_of_the_global_batch(kw, data, endless):
  num_epochs = None if endless else 2
  rows = sorted(
    data.draw(st.sets(st.sampled_from(range(kw["batch_size"])), min_size=1))
  )
  whole = _take(make_loader(**kw, num_epochs=num_epochs), 12)
  some = _take(make_loader(**kw, num_epochs=num_epochs, rows=rows), 12)
  expected = [{key: batch[key][rows] for key in KEYS} for batch in whole]
  _assert_equal(some, expected)


def test_position_fits_other_rows():
  kw = {"tokens": np.arange(100), "seq_len": 3, "batch_size": 4, "seed": 1}
  one = make_loader(**kw)
  _take(one, 5)
  half = make_loader(**kw, rows=[2, 3])
  half.set_state(one.get_state())
  np.testing.assert_array_equal(next(half)["tokens"], next(one)["tokens"][2:])


def test_epochs_and_seeds_have_their_own_orders():
  windows = 64
  kw = {"seq_len": 1, "batch_size": windows, "num_epochs": 3}
  orders = {
    (seed, epoch): tuple(_firsts([batch]))
    for seed in range(4)
    for epoch, batch in enumerate(
      make_loader(np.arange(windows + 1), seed=seed, **kw)
    )
  }
  # All twelve: neighbouring seeds must not share epochs either.
  assert len(orders) == len(set(orders.values())) == 12
  assert tuple(range(windows)) not in orders.values()


def test_two_loaders_in_turn_do_not_disturb_each_other():
  kw = {"tokens": np.arange(50), "seq_len": 2, "batch_size": 4, "seed": 3}
  alone = _take(make_loader(**kw), 20)
  left, right = make_loader(**kw), make_loader(**kw)
  _take(right, 7)
  mixed = []
  for _ in range(20):
    mixed.append(next(left))
    next(right)
  _assert_equal(mixed, alone)


def test_without_shuffling_the_text_comes_in_order():
  batches = list(
    make_loader(
      np.arange(12), seq_len=3, batch_size=2, shuffle=False, num_epochs=1
    )
  )
  assert [b["tokens"].tolist() for b in batches] == [
    [[0, 1, 2], [3, 4, 5]],
    [[6, 7, 8], [0, 0, 0]],
  ]
  assert batches[1]["targets"].tolist() == [[7, 8, 9], [0, 0, 0]]
  assert batches[1]["mask"].tolist() == [[True] * 3, [False] * 3]


def test_defaults_shuffle_without_end_and_read_all_rows():
  loader = make_loader(np.arange(9), seq_len=2, batch_size=4)
  assert loader.num_steps is None
  starts = _firsts(_take(loader, 50))
  assert len(starts) == 200  # Four windows an epoch, hence fifty epochs.
  assert len({tuple(starts[i : i + 4]) for i in range(0, 200, 4)}) > 5
  asked = make_loader(
    np.arange(9), seq_len=2, batch_size=4, seed=0, rows=range(4)
  )
  assert _firsts(_take(asked, 50)) == starts


def test_one_thread_and_none_after_close():
  before = set(threading.enumerate())
  loader = make_loader(np.arange(100), seq_len=2, batch_size=4)
  _take(loader, 10)
  started = set(threading.enumerate()) - before
  assert len(started) == 1
  loader.close()
  for thread in started:
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_windows_are_cut_from_the_array_not_from_a_copy():
  tokens = np.arange(40, dtype=np.uint16)
  loader = make_loader(tokens, seq_len=4, batch_size=2, shuffle=False)
  tokens[:] = 7
  assert (next(loader)["tokens"] == 7).all()


# Bad input.

GOOD = {"tokens": np.arange(100), "seq_len": 4, "batch_size": 4, "seed": 0}


@pytest.mark.parametrize(
  ("change", "error", "message"),
  [
    (
      {"tokens": np.arange(4), "name": "validation"},
      UserError,
      "`seq_len` = 4 needs at least 5 tokens, but validation has 4",
    ),
    ({"tokens": np.zeros(0, np.int32)}, UserError, "but tokens has 0"),
    ({"tokens": np.zeros((2, 9), np.int32)}, ValueError, "one dimension"),
    ({"tokens": np.zeros(9)}, TypeError, "`tokens` must be integers"),
    ({"seq_len": 0}, UserError, "`seq_len` must be at least 1, got 0"),
    ({"batch_size": 0}, UserError, "`batch_size` must be at least 1"),
    ({"seed": -1}, UserError, "`seed` must be at least 0"),
    ({"num_epochs": 0}, UserError, "`num_epochs` must be at least 1"),
    ({"rows": [3, 4]}, ValueError, "`rows` must ascend and be in .0, 4.*3, 4"),
    ({"rows": [1, 0]}, ValueError, "`rows` must ascend"),
  ],
)
def test_bad_arguments(change, error, message):
  with pytest.raises(error, match=message):
    make_loader(**{**GOOD, **change})


def test_one_window_is_enough():
  loader = make_loader(np.arange(5), seq_len=4, batch_size=2)
  assert _firsts(_take(loader, 3)) == [0] * 6


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"seq_len": 5}, "`seq_len` was 4, is 5"),
    ({"batch_size": 8}, "`batch_size` was 4, is 8"),
    ({"seed": 1}, "`seed` was 0, is 1"),
    ({"shuffle": False}, "`shuffle` was True, is False"),
    ({"num_epochs": 2}, "`num_epochs` was None, is 2"),
    ({"tokens": np.arange(99)}, "`num_tokens` was 100, is 99"),
    ({"tokens": np.arange(100)[::-1]}, "the text has changed"),
  ],
)
def test_position_of_other_settings_is_refused(change, message):
  state = make_loader(**GOOD).get_state()
  with pytest.raises(UserError, match=message):
    make_loader(**{**GOOD, **change}).set_state(state)


@pytest.mark.parametrize("step", [-1, 99, "1", None])
def test_position_outside_the_data_is_refused(step):
  loader = make_loader(**GOOD, num_epochs=1)
  state = loader.get_state()
  with pytest.raises(UserError, match="no valid `step`"):
    loader.set_state({**state, "step": step})
