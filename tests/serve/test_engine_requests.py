"""What happens to requests in the engine, whatever their neighbours do."""

import dataclasses

import numpy as np
import pytest

from jaxheads.serve.request import QueueFull
from tests.serve.engines import (
  ADA,
  SMALL,
  TASK_KV,
  VOCAB,
  Watched,
  model_of,
  prompt,
  request,
  tokens_of,
)

SAMPLED = dict(
  temperature=1.3,
  top_k=9,
  top_p=0.95,
  repetition_penalty=1.2,
  frequency_penalty=0.3,
  presence_penalty=0.2,
  logprobs=None,
)


@pytest.fixture(scope="module")
def model():
  return model_of(None, None)


def watched(model, policy=TASK_KV, **fields):
  config = dataclasses.replace(SMALL, **fields)
  return Watched(model, policy, config, budget=0.5)


def several(count=14):
  """Requests of all kinds."""
  return [
    request("greedy", prompt(40), count),
    request("seeded", prompt(40), count, seed=7, **SAMPLED),
    request("short", prompt(3), count, seed=2**40, **SAMPLED),
    request("whole", prompt(16), count, budget=1.0),
    request("least", prompt(45), count, budget=0.05),
    request("one", prompt(9), 1),
  ]


@pytest.fixture(scope="module")
def alone(model):
  """The answers of `several`, each in an engine that does nothing else."""
  engine = watched(model)
  return {one.id: tokens_of(engine.run(one)[0]) for one in several()}


def hoard(engine, left):
  """Leaves so many pages to an engine; no program knows of it."""
  allocator = engine.scheduler.allocator
  allocator.allocate(allocator.num_free - left)


def serve_short_of_pages(engine, requests, left):
  """As `run`, where the last word about pages is another one."""
  total = engine.scheduler.allocator.num_pages
  hoard(engine, left)
  engine.submit(*requests)
  while engine.engine.has_work():
    engine.step()
  stats = engine.engine.stats()
  assert stats.pages_used == total - left
  return {one.id: tokens_of(engine.events[one.id]) for one in requests}


def test_neighbours_do_not_matter(model, alone):
  engine = watched(model)
  answers = engine.run(*several())
  for one, events in zip(several(), answers, strict=True):
    assert tokens_of(events) == alone[one.id], one.id
    assert len(events) == one.params.max_tokens
    assert events[-1].finish == "length"


def growing(count=44):
  """Short prompts, whose answers are many pages."""
  return [
    request("greedy", prompt(9), count),
    request("seeded", prompt(14), count, seed=7, **SAMPLED),
    request("third", prompt(16), count, seed=1, **SAMPLED),
    request("late", prompt(2), 3, seed=1, **SAMPLED),
  ]


# One request takes 32 pages at its end.
@pytest.mark.parametrize("left", [34, 45])
def test_answers_do_not_depend_on_preemption(model, left):
  large = watched(model)
  want = [tokens_of(large.run(one)[0]) for one in growing()]
  engine = watched(model)
  got = serve_short_of_pages(engine, growing(), left)
  assert engine.engine.stats().preemptions > 0
  assert list(got.values()) == want


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("policy", "chunk", "sharing"),
  [(ADA, None, True), (ADA, 16, True), (TASK_KV, 16, True)],
)
def test_nor_when_prompts_are_read_in_parts(model, policy, chunk, sharing):
  requests = growing()
  requests.append(
    request("begins alike", prompt(33) + prompt(7), 20, seed=5, **SAMPLED)
  )
  requests.append(dataclasses.replace(requests[-1], id="twin"))
  requests.append(
    request("longer twin", prompt(33) + prompt(8), 20, seed=5, **SAMPLED)
  )
  large = watched(model, policy)
  want = [tokens_of(large.run(one)[0]) for one in requests]
  engine = watched(model, policy, chunk=chunk, prefix_sharing=sharing)
  got = serve_short_of_pages(engine, requests, 50)
  assert engine.engine.stats().preemptions > 0
  assert list(got.values()) == want


def test_cancellation_at_any_moment(model, alone):
  engine = watched(model)
  for moment in range(18):
    first, second = several()[:2]
    victim, other = (first, second) if moment % 2 else (second, first)
    engine.events.clear()
    engine.submit(victim, other)
    for _ in range(moment):
      engine.step()
    ended = any(e.finish for e in engine.events[victim.id])
    engine.engine.cancel(victim.id)
    engine.engine.cancel(victim.id)
    answers = engine.run()
    assert answers == []
    events = engine.events[victim.id]
    got = tokens_of(events)
    assert got == alone[victim.id][: len(got)]
    assert events[-1].finish == ("length" if ended else "cancelled")
    assert tokens_of(engine.events[other.id]) == alone[other.id]


def test_cancelled_while_it_waits(model, alone):
  engine = watched(model)
  engine.submit(*several())
  engine.engine.cancel("least")
  engine.engine.cancel("nobody")
  engine.run()
  assert [e.finish for e in engine.events["least"]] == ["cancelled"]
  assert tokens_of(engine.events["one"]) == alone["one"]


def test_stop_tokens_end_an_answer_and_are_its_last(model, alone):
  engine = watched(model)
  for name in ("greedy", "seeded"):
    (one,) = (one for one in several() if one.id == name)
    for stop in range(VOCAB):
      want = alone[name]
      end = want.index(stop) + 1 if stop in want else len(want)
      params = dataclasses.replace(
        one.params, stop_tokens=(stop, VOCAB), max_tokens=len(want)
      )
      events = engine.run(
        dataclasses.replace(one, id=f"{name} {stop}", params=params)
      )[0]
      assert tokens_of(events) == want[:end]
      assert events[-1].finish == ("stop" if stop in want else "length")


def test_the_shortest_and_the_longest(model):
  engine = watched(model)
  requests = [
    request("1 and 1", prompt(1), 1),
    request("1 and all", prompt(1), 63),
    request("all and 1", prompt(63), 1),
    request("page and all", prompt(16), 48),
  ]
  answers = engine.run(*requests)
  for one, events in zip(requests, answers, strict=True):
    assert len(tokens_of(events)) == one.params.max_tokens
  assert tokens_of(answers[0]) == tokens_of(answers[1])[:1]


def test_names_can_be_used_again(model, alone):
  engine = watched(model)
  one = several()[0]
  stop = dataclasses.replace(one.params, stop_tokens=(alone[one.id][4],))
  for again in (one, dataclasses.replace(one, params=stop), one):
    engine.submit(again)
    with pytest.raises(ValueError, match="`id` must be unique"):
      engine.engine.submit(again)
    while not any(e.finish for e in engine.events[one.id]):
      engine.step()
    # The device may have begun another turn of it.
    engine.step()
    got = tokens_of(engine.events[one.id])
    assert got == alone[one.id][: len(got)]
  for steps in range(4):
    engine.submit(one)
    for _ in range(steps):
      engine.step()
    engine.engine.cancel(one.id)
    with pytest.raises(ValueError, match="`id` must be unique"):
      engine.engine.submit(one)
    engine.step()
    assert engine.events[one.id][-1].finish == "cancelled"
    assert tokens_of(engine.run(one)[0]) == alone[one.id]


def test_log_probabilities(model):
  engine = watched(model)
  (none,), (zero,), (three,), (more,) = (
    engine.run(request(str(most), prompt(8), 1, logprobs=most))
    for most in (None, 0, 3, 20)
  )
  assert none[0].logprob is None
  assert none[0].top_logprobs == zero[0].top_logprobs == ()
  assert zero[0].logprob == three[0].logprob == more[0].logprob
  assert more[0].top_logprobs[:3] == three[0].top_logprobs
  assert three[0].top_logprobs[0] == (three[0].token, three[0].logprob)
  # No more than there are.
  assert sorted(dict(more[0].top_logprobs)) == list(range(VOCAB))
  assert all(np.isfinite(value) for _, value in more[0].top_logprobs)


def test_seeds(model, alone):
  engine = watched(model)
  one = several()[1]
  others = [
    dataclasses.replace(
      one, id=f"{seed}", params=dataclasses.replace(one.params, seed=seed)
    )
    for seed in (7, 8, 7 + 2**32)
  ]
  same, *different = (tokens_of(events) for events in engine.run(*others))
  assert same == alone["seeded"]
  assert all(tokens != same for tokens in different)


def test_slots_forget_what_was_in_them(model, alone):
  """Counts of penalties, settings, rows: all from the request that came."""
  engine = watched(model)
  loud = request(
    "loud", prompt(45), 18, frequency_penalty=2.0, temperature=2.0, seed=3
  )
  for one in several():
    engine.run(loud)
    assert tokens_of(engine.run(one)[0]) == alone[one.id], one.id
    engine.events.clear()


@pytest.mark.parametrize("seed", range(3))
def test_random_schedules(model, alone, seed):
  """Requests come and go in any order, and pages are short now and then."""
  rng = np.random.default_rng(seed)
  engine = watched(model)
  kinds = several()
  running = {}
  hoarded = []
  for index in range(40):
    one = kinds[rng.integers(len(kinds))]
    name = f"{one.id} {index}"
    engine.submit(dataclasses.replace(one, id=name))
    running[name] = one.id
    for _ in range(rng.integers(6)):
      engine.step()
    if rng.random() < 0.2:
      engine.engine.cancel(list(running)[rng.integers(len(running))])
    allocator = engine.scheduler.allocator
    if hoarded and rng.random() < 0.5:
      allocator.free(hoarded.pop())
    elif allocator.num_free > 40 and rng.random() < 0.5:
      hoarded.append(allocator.allocate(allocator.num_free - 30))
      # What is left must be enough for whoever came first.
    while engine.engine.stats().waiting > 3:
      engine.step()
      if hoarded:
        allocator.free(hoarded.pop())
  for pages in hoarded:
    engine.scheduler.allocator.free(pages)
  engine.run()
  cancelled = 0
  for name, kind in running.items():
    events = engine.events[name]
    got = tokens_of(events)
    if events[-1].finish == "cancelled":
      cancelled += 1
      assert got == alone[kind][: len(got)], name
    else:
      assert got == alone[kind], name
  assert cancelled


def test_refused_requests_go_unnoticed(model, alone):
  engine = watched(model, max_waiting=1)
  first, second, third = several()[:3]
  engine.submit(first)
  with pytest.raises(QueueFull):
    engine.submit(second)
  engine.step()
  engine.submit(second)
  for bad, error in (
    (dataclasses.replace(third, prompt=(VOCAB,)), ValueError),
    (dataclasses.replace(third, prompt=prompt(60)), ValueError),
    (dataclasses.replace(third, budget=0), ValueError),
    (dataclasses.replace(third, id=first.id), ValueError),
    (third, QueueFull),
  ):
    with pytest.raises(error):
      engine.submit(bad)
  engine.run()
  for one in (first, second):
    assert tokens_of(engine.events[one.id]) == alone[one.id]
  assert tokens_of(engine.run(third)[0]) == alone[third.id]
