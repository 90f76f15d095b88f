"""The eleven tasks: whoever reads the prompt alone finds the answer."""

import collections
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxheads.data import (
  EVALUATION_SEED,
  NEEDLE_VOCAB_SIZE,
  CopyTask,
  MixedTask,
  NeedleTask,
  needle_batch,
  retrieval_tasks,
)

PAD, BOS, SEP, QRY, ANS, EOS, ASSIGN, REF, LIST = range(9)
NAMES = tuple(retrieval_tasks(256))
# Answers to a prompt of 256 tokens.
ANSWERS = {
  "niah_single": 4,
  "niah_multikey": 4,
  "niah_multivalue": 16,
  "niah_multiquery": 16,
  "variables": 6,
  "frequent_words": 6,
  "common_words": 10,
  "kv_retrieval": 4,
  "copy": 64,
  "induction": 1,
  "sum": 1,
}


def kind(token):
  for first, last, letter in (
    (0, 9, "-BSQAE=RL"),
    (9, 73, "k"),
    (73, 137, "v"),
    (137, 393, "n"),
  ):
    if first <= token < last:
      return letter[token] if first == 0 else letter
  raise AssertionError(token)


def pieces(tokens, shape):
  """Every stretch of symbols of these kinds, as (start, tokens)."""
  text = "".join(map(kind, tokens))
  return [
    (found.start(), tuple(tokens[found.start() : found.end()]))
    for found in re.finditer(shape, text)
  ]


def split(prompt):
  """(context, query) of BOS context QRY query ANS."""
  assert prompt[0] == BOS
  assert prompt[-1] == ANS
  question = prompt.index(QRY)
  return prompt[1:question], prompt[question + 1 : -1]


def looked_up(key_tokens, value_tokens=4):
  """Values of the keys in the query, in their order."""

  def solve(context, query):
    shape = f"Sk{{{key_tokens}}}=v{{{value_tokens}}}"
    values = collections.defaultdict(list)
    for _, piece in pieces(context, shape):
      key = piece[1 : 1 + key_tokens]
      values[key] += piece[-value_tokens:]
    keys = [
      tuple(query[at : at + key_tokens])
      for at in range(0, len(query), key_tokens)
    ]
    return [value for key in keys for value in values[key]]

  return solve


def summed(context, query):
  first, second = looked_up(2, 1)(context, query)
  return [73 + (first - 73 + second - 73) % 10]


def chained(context, query):
  (start,) = [
    piece[1:3]
    for _, piece in pieces(context, "Skk=vvvv")
    if piece[4:] == tuple(query)
  ]
  follows = {
    piece[-2:]: (at, piece[1:3]) for at, piece in pieces(context, "Skk=Rkk")
  }
  names, at = [*start], -1
  while start in follows:
    # A name is there before another refers to it.
    assert follows[start][0] > at
    at, start = follows[start]
    names += start
  return names


def frequent(context, query):
  words = list(zip(context[0::2], context[1::2], strict=False))
  counts = collections.Counter(words).most_common(5)
  assert counts[0][0] == tuple(query)
  for rank in range(4):
    assert counts[rank][1] > counts[rank + 1][1]
  return [symbol for word, _ in counts[1:4] for symbol in word]


def common(context, query):
  assert not query
  words = [piece[1] for _, piece in pieces(context, "Ln")]
  counts = collections.Counter(words).most_common()
  assert counts[9][1] >= 6 * counts[10][1]
  return sorted(word for word, _ in counts[:10])


def copied(context, query):
  assert not query
  ((start, segment),) = pieces(context, "[kv]+")
  assert 16 <= len(segment) <= (len(context) + 3) // 4
  assert start <= len(context) // 2
  return list(segment)


def followed(context, query):
  assert context.count(query[0]) == 1
  return [context[context.index(query[0]) + 1]]


SOLVERS = {
  "niah_single": looked_up(2),
  "niah_multikey": looked_up(2),
  "niah_multivalue": looked_up(2),
  "niah_multiquery": looked_up(2),
  "variables": chained,
  "frequent_words": frequent,
  "common_words": common,
  "kv_retrieval": looked_up(4),
  "copy": copied,
  "induction": followed,
  "sum": summed,
}


@pytest.mark.parametrize("name", NAMES)
@given(
  length=st.sampled_from([128, 129, 200, 256, 511, 1500]),
  seed=st.integers(0, 2**32),
  index=st.integers(0, 2**40),
)
def test_the_prompt_alone_tells_the_answer(name, length, seed, index):
  task = retrieval_tasks(length)[name]
  example = task.draw(length, seed=seed, index=index)
  tokens = example.tokens.tolist()
  assert example.tokens.dtype == np.int32
  assert example.length == length
  assert tokens[-1] == EOS
  assert max(tokens) < NEEDLE_VOCAB_SIZE
  prompt, answer = tokens[:length], tokens[length:-1]
  context, query = split(prompt)
  assert example.questions_start == 1 + len(context)
  assert SOLVERS[name](context, query) == answer == example.answer.tolist()
  assert len(answer) <= task.answer_tokens(length)
  again = retrieval_tasks(length)[name].draw(length, seed=seed, index=index)
  np.testing.assert_array_equal(again.tokens, example.tokens)
  assert again.start == example.start


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_numbers_make_other_prompts_with_other_answers(name):
  task = retrieval_tasks(256)[name]
  assert task.answer_tokens(256) == ANSWERS[name]
  drawn = [
    task.draw(256, seed=seed, index=index)
    for seed in (0, 7, EVALUATION_SEED, EVALUATION_SEED + 7)
    for index in range(5)
  ]
  prompts = {tuple(example.tokens[:256]) for example in drawn}
  assert len(prompts) == len(drawn)
  answers = {tuple(example.answer) for example in drawn}
  assert len(answers) > (5 if name == "sum" else 15)


@pytest.mark.parametrize(
  ("name", "parts", "queried"),
  [
    ("niah_single", 1, 1),
    ("niah_multikey", 4, 1),
    ("niah_multivalue", 4, 1),
    ("niah_multiquery", 8, 4),
    ("kv_retrieval", 256 // 12, 1),
  ],
)
def test_as_many_needles_as_the_table_says(name, parts, queried):
  key = 4 if name == "kv_retrieval" else 2
  example = retrieval_tasks(256)[name].draw(256, seed=0, index=0)
  context, query = split(example.tokens[:256].tolist())
  found = pieces(context, f"Sk{{{key}}}=v{{4}}")
  assert len(found) == parts
  keys = {piece[1 : 1 + key] for _, piece in found}
  assert len(keys) == (1 if name == "niah_multivalue" else parts)
  assert len(query) == key * queried
  asked = [found[0][0] + 1, example.start][name != "niah_multivalue"]
  assert example.start == asked


@pytest.mark.parametrize("name", ["niah_multikey", "kv_retrieval"])
def test_every_needle_is_asked_for_about_as_often(name):
  task = retrieval_tasks(256)[name]
  ranks = []
  for index in range(400):
    example = task.draw(256, seed=3, index=index)
    context, _ = split(example.tokens[:256].tolist())
    starts = [at + 1 for at, _ in pieces(context, "Sk+=v{4}")]
    ranks.append(starts.index(example.start) / len(starts))
  quarters = np.histogram(ranks, bins=4, range=(0, 1))[0]
  assert quarters.min() > 60


def test_which_needles_a_question_names_does_not_hang_on_their_places():
  task = retrieval_tasks(256)["niah_multiquery"]
  places = []
  for index in range(300):
    context, query = split(
      task.draw(256, seed=1, index=index).tokens[:256].tolist()
    )
    keys = [piece[1:3] for _, piece in pieces(context, "Skk=v{4}")]
    places.append([keys.index(tuple(query[at : at + 2])) for at in (2, 4, 6)])
  assert abs(np.mean(places) - 3.5) < 0.35


def test_decoys_and_repeats_come_as_often_as_the_table_says():
  tasks = retrieval_tasks(1500)
  chains = collections.Counter()
  for index in range(40):
    example = tasks["variables"].draw(1500, seed=0, index=index)
    context, _ = split(example.tokens[:1500].tolist())
    started = len(pieces(context, "Skk=vvvv"))
    assert len(pieces(context, "Skk=Rkk")) == 2 * started
    chains[started] += 1
  assert set(chains) == {1, 2, 3, 4}
  for length, often, rarely in ((128, 6, 1), (1500, 30, 3)):
    example = tasks["common_words"].draw(length, seed=0, index=0)
    context, _ = split(example.tokens[:length].tolist())
    counts = collections.Counter(piece[1] for _, piece in pieces(context, "Ln"))
    assert sorted(counts.values())[-10:] == [often] * 10
    assert set(counts.values()) == {often, rarely}
  example = tasks["frequent_words"].draw(256, seed=0, index=0)
  context, _ = split(example.tokens[:256].tolist())
  counts = collections.Counter(zip(context[::2], context[1::2], strict=False))
  # 125 words: W = 138 gives 83 + 20 + 9 + 5 + 3 + 2 + 1 + 1, and one.
  assert [count for _, count in counts.most_common()][1:] == [
    *(20, 9, 5, 3, 2, 1, 1)
  ]


def test_a_mixture_takes_turns():
  tasks = (CopyTask(), NeedleTask(needles=2, questions=2))
  mixed = MixedTask(tasks)
  assert mixed.min_length() == 44 - 16 + 7 + 1
  assert [mixed.at_turn(index) for index in range(5)] == [
    tasks[0],
    NeedleTask(needles=1),
    tasks[0],
    NeedleTask(needles=2),
    tasks[0],
  ]
  once = mixed.asking_once()
  drawn = once.draw(64, seed=1, index=3)
  expected = NeedleTask(needles=2).draw(64, seed=1, index=3)
  np.testing.assert_array_equal(drawn.tokens, expected.tokens)
  with pytest.raises(ValueError, match="at least one task"):
    MixedTask(())


def test_answers_of_unequal_length_are_padded_and_do_not_count():
  tasks = retrieval_tasks(64)
  examples = [
    tasks[name].draw(64, seed=0, index=0) for name in ("copy", "induction")
  ]
  batch = needle_batch(examples, answer_tokens=20)
  assert batch["tokens"].shape == (2, 84)
  for row, example in enumerate(examples):
    counted = batch["targets"][row][batch["mask"][row]]
    np.testing.assert_array_equal(
      counted, example.tokens[example.questions_start + 1 :]
    )


@pytest.mark.parametrize("name", NAMES)
def test_prompts_that_are_too_short_are_refused(name):
  task = retrieval_tasks(128)[name]
  shortest = task.min_length()
  assert task.draw(shortest, seed=0, index=0).length == shortest
  with pytest.raises(ValueError, match=f"at least {shortest} for .* got"):
    task.draw(shortest - 1, seed=0, index=0)
  with pytest.raises(ValueError, match="`depth` must be in"):
    task.draw(128, seed=0, index=0, depth=-0.1)
