"""The engine serves a model whose heads are stored in another order."""

import dataclasses

import numpy as np
import pytest

from jaxheads import s2
from jaxheads.models import reordered
from tests.models.builders import BY_NORM, ROUTED
from tests.serve.engines import (
  ADA,
  Watched,
  logprobs_of,
  model_of,
  prompt,
  request,
  tokens_of,
)

SHARES = s2.strided(4, block_size=16, local_blocks=1, vertical_stride=3)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("plans", "contexts", "budget"),
  [((None, ROUTED), (SHARES, None), 1.0), ((ROUTED, BY_NORM), (), 0.5)],
  ids=["shares", "budget"],
)
def test_answers_and_pages_are_the_same(plans, contexts, budget):
  own = model_of(*plans, contexts=contexts)
  stored = reordered(
    own, dataclasses.replace(own.config, head_orders=((2, 0, 3, 1),) * 2)
  )
  answers, pages = [], []
  for model in (own, stored):
    engine = Watched(model, ADA, budget=budget)
    (events,) = engine.run(request("a", prompt(45), 12))
    answers.append(events)
    pages.append(engine.pages_used)
  assert tokens_of(answers[1]) == tokens_of(answers[0])
  np.testing.assert_allclose(
    logprobs_of(answers[1]), logprobs_of(answers[0]), atol=1e-5
  )
  assert pages[1] == pages[0]
