"""Needle prompts: the answer is in the text, where it should be, and once."""

import itertools
import json

import numpy as np
import pytest

from jaxheads.data import (
  EVALUATION_SEED,
  NEEDLE_VOCAB_SIZE,
  CopyTask,
  MixedTask,
  NeedleBatches,
  NeedleTask,
  Stage,
  needle_batch,
  retrieval_tasks,
)
from jaxheads.errors import UserError

BOS, SEP, QRY, ANS, EOS, ASSIGN = 1, 2, 3, 4, 5, 6
KEYS, VALUES, NOISE = range(9, 73), range(73, 137), range(137, 393)
TASKS = {
  "one": NeedleTask(),
  "cycle": NeedleTask(noise="cycle"),
  "many": NeedleTask(needles=5),
  "asked": NeedleTask(needles=4, questions=3),
}


def needles_in(context):
  """{key: (start, values)} of every needle, and what is left: the noise."""
  found, noise, at = {}, [], 0
  while at < len(context):
    if context[at] == SEP:
      _, k1, k2, assign, *values = context[at : at + 8]
      assert k1 in KEYS
      assert k2 in KEYS
      assert assign == ASSIGN
      assert all(value in VALUES for value in values)
      assert (k1, k2) not in found
      found[k1, k2] = (at, values)
      at += 8
    else:
      noise.append(context[at])
      at += 1
  return found, noise


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("depth", [None, 0.0, 0.37, 1.0])
@pytest.mark.parametrize("extra", [0, 1, 200])
def test_questions_are_answered_by_the_text(task, depth, extra):
  length = task.min_length() + extra
  for index in range(5):
    example = task.draw(length, seed=7, index=index, depth=depth)
    tokens = example.tokens.tolist()
    assert example.tokens.dtype == np.int32
    assert len(tokens) == length + 5
    assert tokens[0] == BOS
    assert tokens[-1] == EOS
    assert max(tokens) < NEEDLE_VOCAB_SIZE
    first = example.questions_start
    found, noise = needles_in(tokens[1:first])
    assert len(found) == task.needles
    assert all(token in NOISE for token in noise)
    rounds = np.array(tokens[first:-1]).reshape(-1, 8)
    assert len(rounds) == task.questions
    asked = set()
    for query, k1, k2, answer, *values in rounds.tolist():
      assert (query, answer) == (QRY, ANS)
      start, expected = found[k1, k2]
      assert values == expected
      asked.add((k1, k2))
    assert len(asked) == task.questions
    # The last question is the one whose depth was asked for.
    assert start + 1 == example.start
    assert values == example.answer.tolist()
    if depth is not None:
      context = first - 1
      assert start == round(depth * (context - 8))


def test_depths_are_drawn_over_the_whole_context():
  starts = [
    NeedleTask().draw(100, seed=0, index=index).start for index in range(300)
  ]
  assert min(starts) < 8
  assert max(starts) > 100 - 5 - 8 - 5
  assert np.histogram(starts, bins=4, range=(1, 88))[0].min() > 40


def test_examples_are_functions_of_seed_and_number():
  def draw(seed, index):
    return TASKS["many"].draw(90, seed=seed, index=index).tokens

  np.testing.assert_array_equal(draw(3, 4), draw(3, 4))
  for other in ((3, 5), (4, 4), (EVALUATION_SEED + 3, 4)):
    assert (draw(*other) != draw(3, 4)).any()


def test_the_cycle_repeats():
  example = TASKS["cycle"].draw(200, seed=0, index=0, depth=1.0)
  noise = example.tokens[1 : example.start]
  np.testing.assert_array_equal(noise[:-20], noise[20:])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: NeedleTask(needles=0), "`needles` must be at least 1, got 0"),
    (lambda: NeedleTask(questions=2), "`questions` must be in .1, 1."),
    (
      lambda: NeedleTask(needles=3, questions=2, asked=2),
      "`asked` must be at most `needles` / `questions`, got 2",
    ),
    (lambda: NeedleTask(noise="white"), "`noise` must be"),
    (
      lambda: NeedleTask().draw(12, seed=0, index=0),
      r"`length` must be at least 13 for 1 needle.* got 12",
    ),
    (
      lambda: NeedleTask().draw(50, seed=0, index=0, depth=1.1),
      "`depth` must be in .0, 1., got 1.1",
    ),
    (
      lambda: NeedleBatches([], tokens_per_step=9, seed=0),
      "`stages` must hold at least one",
    ),
  ],
)
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_batches_count_what_follows_the_first_question():
  examples = [
    task.draw(80, seed=0, index=0) for task in (TASKS["one"], TASKS["asked"])
  ]
  batch = needle_batch(examples)
  for row, example in enumerate(examples):
    np.testing.assert_array_equal(batch["tokens"][row], example.tokens[:-1])
    np.testing.assert_array_equal(batch["targets"][row], example.tokens[1:])
    counted = batch["targets"][row][batch["mask"][row]]
    np.testing.assert_array_equal(
      counted, example.tokens[example.questions_start + 1 :]
    )


@pytest.mark.parametrize("depth", [None, 0.0, 0.37, 1.0])
@pytest.mark.parametrize("length", [18, 64, 1500])
def test_a_stretch_is_to_be_copied(length, depth):
  sizes = set()
  for index in range(10):
    example = CopyTask().draw(length, seed=3, index=index, depth=depth)
    tokens = example.tokens.tolist()
    assert len(tokens) == length + 5
    assert (tokens[0], tokens[-1]) == (BOS, EOS)
    question = tokens.index(QRY)
    assert question == example.questions_start
    stretch = tokens[question + 1 : -1]
    start, size = example.start, len(stretch)
    sizes.add(size)
    assert tokens[start : start + size] == stretch
    assert set(stretch) <= {*KEYS, *VALUES, *NOISE}
    before, after = start - 1, question - start - size
    assert {*tokens[1:start], *tokens[start + size : question]} <= {*NOISE}
    if depth is not None:
      assert abs(before - depth * (before + after)) <= 0.5
    again = CopyTask().draw(length, seed=3, index=index, depth=depth)
    np.testing.assert_array_equal(again.tokens, example.tokens)
  assert len(sizes) > 1 or length == 18


STAGES = (Stage(TASKS["asked"], 60, 2), Stage(TASKS["many"], 120, 1))


def batches(**changes):
  settings = dict(tokens_per_step=480, seed=1) | changes
  return NeedleBatches(STAGES, **settings)


def test_stages_follow_each_other_with_equal_tokens():
  shapes = [batch["tokens"].shape for batch in itertools.islice(batches(), 5)]
  short, long = (8, 64), (4, 124)
  assert shapes == [short, short, long, long, short]
  stages = [batches().stage_at(step) for step in range(5)]
  assert stages == [STAGES[0]] * 2 + [STAGES[1]] * 3
  rows = next(batches(tokens_per_step=300, row_multiple=4))["tokens"]
  assert rows.shape == (4, 64)


def test_every_third_batch_goes_back_to_a_stage_before():
  stages = [Stage(TASKS["one"], length, 6) for length in (20, 30, 40)]
  running = NeedleBatches(stages, tokens_per_step=40, seed=0)
  lengths = [
    batch["tokens"].shape[1] + 1 - 5 for batch in itertools.islice(running, 24)
  ]
  assert lengths == [20] * 6 + [30, 30, 20] * 2 + [40, 40, 20, 40, 40, 30] * 2
  assert running.stage_at(8) == stages[1]
  assert running.stage_at(99) == stages[2]


def test_no_example_comes_twice():
  rows = [
    tuple(row[:60])
    for batch in itertools.islice(batches(), 5)
    for row in batch["tokens"].tolist()
  ]
  assert len(set(rows)) == len(rows)


def test_every_number_of_needles_comes():
  found = [
    len(needles_in(row[1 : row.index(QRY)])[0])
    for row in next(batches())["tokens"].tolist()
  ]
  assert found == [1, 2, 3, 4] * 2


def test_every_number_of_questions_comes():
  counts = {
    row.count(QRY)
    for batch in itertools.islice(batches(), 2)
    for row in batch["tokens"].tolist()
  }
  assert counts == {1, 2, 3}


def test_processes_share_the_rows():
  whole = next(batches())
  parts = [
    next(batches(rows_of=lambda rows, half=half: range(rows)[half]))
    for half in (slice(0, 2), slice(2, None))
  ]
  for name, rows in whole.items():
    np.testing.assert_array_equal(
      np.concatenate([part[name] for part in parts]), rows
    )


def test_a_position_can_be_resumed():
  running = batches()
  next(running)
  state = running.get_state()
  expected = [next(running)["tokens"] for _ in range(3)]
  resumed = batches()
  resumed.set_state(state)
  for tokens in expected:
    np.testing.assert_array_equal(next(resumed)["tokens"], tokens)
  with pytest.raises(UserError, match="`seed` was 1, is 2"):
    batches(seed=2).set_state(state)


def test_a_position_survives_json_and_names_its_tasks():
  def mixed(*tasks):
    stage = Stage(MixedTask(tasks), 64, 2)
    return NeedleBatches([stage], tokens_per_step=128, seed=1)

  running = mixed(CopyTask(), NeedleTask())
  next(running)
  state = json.loads(json.dumps(running.get_state()))
  resumed = mixed(CopyTask(), NeedleTask())
  resumed.set_state(state)
  np.testing.assert_array_equal(
    next(resumed)["tokens"], next(running)["tokens"]
  )
  with pytest.raises(UserError, match="`stages` was .*CopyTask"):
    mixed(retrieval_tasks(64)["copy"], NeedleTask()).set_state(state)


def test_stages_that_do_not_hold_the_needles_are_refused():
  with pytest.raises(UserError, match=r"4 needle\(s\) .* at least 60 tokens"):
    Stage(TASKS["asked"], 59, 1)
  with pytest.raises(UserError, match="stretch .* at least 18 tokens"):
    Stage(CopyTask(), 17, 1)
