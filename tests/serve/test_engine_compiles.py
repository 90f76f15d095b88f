"""How many programs the engine compiles, and when."""

import dataclasses

import numpy as np
import pytest

from tests.serve.engines import (
  ADA,
  SMALL,
  TASK_KV,
  Watched,
  model_of,
  prompt,
  request,
)

# Prompts of 16, 32 and 48 tokens; 1 or 2 slots; one list of pages.
TINY = dataclasses.replace(SMALL, max_length=48)


def random_requests(count, seed=0):
  rng = np.random.default_rng(seed)
  found = []
  for index in range(count):
    length = int(rng.integers(1, 48))
    tokens = prompt(min(length, 16)) + prompt(max(0, length - 16), index % 3)
    found.append(
      request(
        str(index),
        tokens[:length],
        int(rng.integers(1, min(8, 48 - length) + 1)),
        budget=float(rng.choice([0.01, 0.3, 0.7, 1.0])),
        temperature=float(rng.choice([0.0, 1.0])),
        top_k=int(rng.integers(0, 5)),
        seed=index,
        repetition_penalty=float(rng.choice([1.0, 1.5])),
        logprobs=rng.choice([None, 3]),
        stop_tokens=tuple(rng.integers(0, 13, rng.integers(0, 2)).tolist()),
      )
    )
  return found


@pytest.mark.slow
@pytest.mark.parametrize(
  ("policy", "fields", "programs"),
  [
    (TASK_KV, {}, 3 + 2),
    pytest.param(
      TASK_KV,
      dict(chunk=16, prefix_sharing=True),
      2 * 3 + 2,
      marks=pytest.mark.exhaustive,
    ),
    pytest.param(ADA, {}, 2 * 3 + 2, marks=pytest.mark.exhaustive),
    pytest.param(
      ADA, dict(prefix_sharing=True), 2 * 3 + 2, marks=pytest.mark.exhaustive
    ),
    pytest.param(
      ADA,
      dict(chunk=16, prefix_sharing=True),
      3 * 3 + 2,
      marks=pytest.mark.exhaustive,
    ),
  ],
)
def test_warming_up_leaves_nothing_to_compile(policy, fields, programs):
  """Spec, test 16: 200 requests of all kinds, and budgets of their own."""
  config = dataclasses.replace(TINY, **fields)
  engine = Watched(model_of(None), policy, config, poison=False)
  assert engine.engine.warm_up() == programs
  assert engine.engine.stats().compilations == programs
  requests = random_requests(200)
  while requests:
    engine.run(*(requests.pop() for _ in range(min(20, len(requests)))))
    engine.events.clear()
  assert engine.engine.stats().compilations == programs


def test_nothing_is_compiled_before_it_is_needed():
  engine = Watched(model_of(None), TASK_KV, TINY)
  assert engine.engine.stats().compilations == 0
  for budget in (0.1, 0.5, 1.0):
    engine.run(request(str(budget), prompt(20), 4, budget=budget))
    # One size of prompts, one slot.
    assert engine.engine.stats().compilations == 2
