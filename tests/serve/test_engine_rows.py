"""What rows hold: against a mask over a dense cache, and the model itself."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.kvcache.policy import Plan, Policy
from jaxheads.kvcache.select import largest
from jaxheads.models.generate import generate
from tests.models.builders import forward
from tests.serve import masked
from tests.serve.engines import (
  PAGE,
  SMALL,
  TASK_KV,
  Watched,
  check_masked,
  log_softmax,
  logprobs_of,
  model_of,
  prompt,
  request,
  tokens_of,
)

ALL_HEADS = dataclasses.replace(TASK_KV, beta=1.0, m=4)
ROLL = dataclasses.replace(TASK_KV, decode="roll")


@pytest.fixture(scope="module")
def model():
  return model_of(None, None)


@pytest.mark.slow
@pytest.mark.parametrize(
  "policy",
  [ALL_HEADS, pytest.param(None, marks=pytest.mark.exhaustive)],
  ids=["all heads full", "full"],
)
def test_a_whole_cache_equals_the_dense_one(policy):
  """Spec, test 2: 64 tokens, and the distribution of each."""
  model = model_of(None, None, max_seq_len=80)
  one = request("a", prompt(9), 64)
  (events,) = Watched(model, policy).run(one)
  tokens = jnp.asarray([one.prompt])
  want = [
    int(new[0])
    for new in generate(model, tokens, max_new_tokens=64, temperature=0.0)
  ]
  assert tokens_of(events) == want
  logits = forward(model, jnp.asarray([(*one.prompt, *want[:-1])]))[0, 8:]
  np.testing.assert_allclose(
    logprobs_of(events), log_softmax(logits), atol=1e-5, rtol=0
  )


@pytest.mark.exhaustive
def test_a_whole_cache_in_bfloat16(standard_promotion):
  """Spec, test 2."""
  model = model_of(None, None, dtype="bfloat16", max_seq_len=80)
  one = request("a", prompt(9), 64)
  (events,) = Watched(model, ALL_HEADS).run(one)
  tokens = jnp.asarray([(*one.prompt, *tokens_of(events)[:-1])])
  want = log_softmax(np.asarray(forward(model, tokens)[0, 8:], np.float32))
  got = logprobs_of(events)
  assert np.abs(got - want).max() <= 2e-2
  first, second = np.sort(want, axis=-1)[:, -1:-3:-1].T
  clear = first - second > 2e-2
  assert clear.mean() > 0.8
  assert (got.argmax(-1) == want.argmax(-1))[clear].all()


def test_the_first_token_is_exact_at_any_budget(model):
  """Spec, test 3; budgets of neighbours are their own."""
  engine = Watched(model, TASK_KV)
  budgets = (1.0, 0.6, 0.3, 0.01)
  requests = [
    request(str(budget), prompt(45), 8, budget=budget) for budget in budgets
  ]
  answers = engine.run(*requests)
  exact = log_softmax(forward(model, jnp.asarray([requests[0].prompt]))[0, -1])
  for events in answers:
    np.testing.assert_allclose(logprobs_of(events[:1])[0], exact, atol=1e-5)
    assert events[0].top_logprobs == answers[0][0].top_logprobs
  second = [logprobs_of(events[1:2])[0] for events in answers]
  for one, events, found in zip(requests, answers, second, strict=True):
    check_masked(model, one, events, policy=TASK_KV, budget=one.budget)
    if one.budget < 1:
      assert np.abs(found - second[0]).max() > 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn(Policy):
  """Keep sets of given sizes, drawn by chance; some rows are rings."""

  counts: tuple[tuple[int, ...], ...]  # By head.
  ring: int = 0
  seed: int = 0

  def plan(self, length, budget, shape):
    counts = np.minimum(self.counts, length).astype(np.int32)
    rng = np.random.default_rng(self.seed)
    scores = rng.random((*shape, masked.SIZE)).astype(np.float32)
    lengths = -np.sort(-counts, axis=-1)
    return Plan(
      lengths,
      np.minimum(self.ring, lengths).astype(np.int32),
      {"count": counts, "scores": scores},
    )

  def keep(self, window, layer: dict[str, Any]):
    inside = jnp.arange(window.k.shape[0]) < window.length
    scores = layer["scores"][:, : inside.shape[0]]
    best = largest(jnp.where(inside, scores, -1.0), layer["count"][:, None])
    return best & inside


COUNTS = ((1, PAGE + 1, 0, PAGE), (PAGE - 1, 0, 1, PAGE + 1))


@pytest.mark.parametrize(
  ("ring", "chunk"),
  [
    (0, None),
    pytest.param(5, None, marks=pytest.mark.exhaustive),
    pytest.param(0, 16, marks=pytest.mark.exhaustive),
    pytest.param(5, 16, marks=pytest.mark.exhaustive),
  ],
)
def test_keep_sets_of_any_size(model, ring, chunk):
  """Spec, test 6: rows of 0, 1, page - 1, page, page + 1 tokens."""
  policy = Drawn(counts=COUNTS, ring=ring)
  engine = Watched(model, policy, dataclasses.replace(SMALL, chunk=chunk))
  requests = [request(str(n), prompt(n), 18) for n in (34, 45)]
  answers = engine.run(*requests)
  for one, events in zip(requests, answers, strict=True):
    check_masked(model, one, events, policy=policy, budget=1.0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("chunk", [None, 4, 24])
def test_a_mixed_batch_equals_each_alone(model, chunk):
  """Spec, test 7, and 14: prompts shorter than window, top and page."""
  config = dataclasses.replace(SMALL, max_batch=4, chunk=chunk)
  lengths = (1, 3, 15, 16, 17, 31, 32, 33, 48, 56)
  requests = [request(str(n), prompt(n), 8, budget=0.4) for n in lengths]
  together = Watched(model, TASK_KV, config).run(*requests)
  alone = Watched(model, TASK_KV, config)
  for one, events in zip(requests, together, strict=True):
    (other,) = alone.run(one)
    assert tokens_of(other) == tokens_of(events)
    np.testing.assert_allclose(
      logprobs_of(other), logprobs_of(events), atol=1e-5
    )
    check_masked(model, one, events, policy=TASK_KV, budget=0.4)


def test_rolling_past_the_recent_part(model):
  """Spec, test 8: rings come round twice, full heads keep everything."""
  engine = Watched(model, ROLL)
  one = request("a", prompt(45), 2 * TASK_KV.recent + 7, budget=0.4)
  plan = ROLL.plan(45, 0.4, engine.scheduler.shape)
  assert set(plan.rings.reshape(-1)) == {0, TASK_KV.recent}
  engine.submit(one)
  while len(engine.events["a"]) < one.params.max_tokens - 1:
    engine.step()
  # The last token's key is never needed.
  grown = np.where(plan.rings, 0, one.params.max_tokens - 1)
  np.testing.assert_array_equal(
    engine.scheduler.rows.lengths[:, 0], plan.lengths + grown
  )
  engine.run()
  check_masked(model, one, engine.events["a"], policy=ROLL, budget=0.4)


def test_appending_grows_every_row(model):
  """Spec, test 8."""
  engine = Watched(model, TASK_KV)
  one = request("a", prompt(45), 12, budget=0.4)
  plan = TASK_KV.plan(45, 0.4, engine.scheduler.shape)
  engine.submit(one)
  lengths = []
  while engine.engine.has_work():
    engine.step()
    if engine.scheduler._active:
      lengths.append(engine.scheduler.rows.lengths[:, 0].copy())
  for written, found in enumerate(lengths):
    np.testing.assert_array_equal(found, plan.lengths + written)
  assert len(lengths) == 12


def permuted(model, order):
  """The same function, with its heads in another order."""
  graphdef, state = nnx.split(model)

  def move(path, leaf):
    name = jax.tree_util.keystr(path)
    axis = {"query": -2, "key": -2, "value": -2, "out": -3}
    for part, at in axis.items():
      if "'attention'" in name and f"'{part}'" in name:
        return jnp.take(leaf, jnp.asarray(order), axis=leaf.ndim + at)
    return leaf

  moved = jax.tree_util.tree_map_with_path(move, state)
  return nnx.merge(graphdef, moved)


def test_the_order_of_heads_does_not_matter(model):
  """Spec, test 10."""
  order = [2, 0, 3, 1]
  one = request("a", prompt(45), 12, budget=0.5)
  kept, answers = [], []
  for which in (model, permuted(model, order)):
    engine = Watched(which, TASK_KV)
    engine.submit(one)
    while engine.engine.has_work():
      engine.step()
      for found in engine.engine.snapshot()[:1]:
        kept.append(np.asarray(found["tokens"]))
    answers.append(logprobs_of(engine.events["a"]))
  np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)
  first, second = kept[0], kept[len(kept) // 2]
  assert len(np.unique(first)) == 2
  np.testing.assert_array_equal(first[:, order], second)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_groups_of_query_heads(kv_heads):
  """Spec, test 10: G = 1, 2, 8."""
  model = model_of(None, num_heads=8, num_kv_heads=kv_heads)
  engine = Watched(model, TASK_KV)
  requests = [request(str(n), prompt(n), 12, budget=0.5) for n in (16, 45)]
  for one, events in zip(requests, engine.run(*requests), strict=True):
    check_masked(model, one, events, policy=TASK_KV, budget=0.5)
