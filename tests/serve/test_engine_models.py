"""The engine serves every kind of model that the decoder can be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import s2
from jaxheads.kvcache.by_context import ByContext
from jaxheads.models.generate import generate
from jaxheads.serve import layers
from tests.models.builders import (
  ALL_SHARED,
  BY_NORM,
  NO_SHARED,
  ROUTED,
  forward,
)
from tests.serve import masked
from tests.serve.engines import (
  ADA,
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

STRIDED = s2.strided(4, block_size=16, local_blocks=1, vertical_stride=3)
WINDOW = s2.sliding_window(4, block_size=16, local_blocks=2)
SINKS = s2.sliding_window(4, block_size=16, local_blocks=1, sink_blocks=1)
TWO_KV = s2.strided(
  4, block_size=16, local_blocks=1, vertical_stride=2, num_kv_heads=2
)


def check_against_masks(engine, model, requests, policy):
  answers = engine.run(*requests)
  for one, events in zip(requests, answers, strict=True):
    check_masked(model, one, events, policy=policy, budget=one.budget or 1.0)
  return answers


def check_against_model(model, one, events):
  """The model itself, without any cache, gives the same."""
  tokens = (*one.prompt, *tokens_of(events))
  padded = np.zeros((1, masked.SIZE), np.int32)
  padded[0, : len(tokens)] = tokens
  logits = forward(model, jnp.asarray(padded))[0]
  want = log_softmax(logits[len(one.prompt) - 1 : len(tokens) - 1])
  np.testing.assert_allclose(logprobs_of(events), want, atol=1e-5, rtol=0)
  assert (want.argmax(-1) == tokens_of(events)).all()


def requests_of(lengths, count, budget=None):
  return [request(str(n), prompt(n), count, budget=budget) for n in lengths]


@pytest.mark.slow
@pytest.mark.parametrize(
  "plans",
  [
    (NO_SHARED, NO_SHARED),
    pytest.param(
      (ROUTED, None, BY_NORM, ALL_SHARED), marks=pytest.mark.exhaustive
    ),
  ],
  ids=["routed", "every kind"],
)
def test_routed_layers(plans):
  model = model_of(*plans)
  engine = Watched(model, TASK_KV)
  requests = requests_of((12, 45), 12, budget=0.5)
  check_against_masks(engine, model, requests, TASK_KV)


@pytest.mark.exhaustive
def test_heads_that_are_not_chosen_are_not_read(monkeypatch):
  """What the kernel is told to read: rows of chosen KV heads alone."""
  seen = []
  kernel = layers.paged_attention

  def spy(q, k, v, table):
    jax.debug.callback(lambda x: seen.append(np.array(x)), table.lengths)
    return kernel(q, k, v, table)

  monkeypatch.setattr(layers, "paged_attention", spy)
  # Another size than elsewhere: its programs are compiled here.
  model = model_of(NO_SHARED, max_seq_len=48)
  engine = Watched(model, TASK_KV, poison=False)
  engine.run(request("a", prompt(12), 8, budget=0.5))
  assert len(seen) == 7
  assert all((lengths > 0).sum() == 2 for lengths in seen)


@pytest.mark.slow
@pytest.mark.parametrize(
  "contexts",
  [
    (STRIDED, SINKS),
    pytest.param((WINDOW, WINDOW), marks=pytest.mark.exhaustive),
    pytest.param((STRIDED, STRIDED, WINDOW), marks=pytest.mark.exhaustive),
  ],
)
def test_contexts_equal_the_models_own_cache(contexts):
  model = model_of(*[None] * len(contexts), contexts=contexts)
  engine = Watched(model)
  # Prompts and answers that end before, at and after blocks.
  requests = [
    request("1", prompt(1), 63),
    request("15", prompt(15), 34),
    request("16", prompt(16), 3),
    request("33", prompt(33), 31),
    request("48", prompt(48), 16),
  ]
  answers = engine.run(*requests)
  for one, events in zip(requests, answers, strict=True):
    check_against_model(model, one, events)


@pytest.mark.exhaustive
def test_contexts_equal_generate():
  """The same with the cache of `jaxheads.models.generate`."""
  model = model_of(None, None, contexts=(STRIDED, SINKS))
  engine = Watched(model)
  for one in requests_of((1, 33), 30):
    (events,) = engine.run(one)
    want = generate(
      model, jnp.asarray([one.prompt]), max_new_tokens=30, temperature=0.0
    )
    assert tokens_of(events) == [int(new[0]) for new in want]


@pytest.mark.exhaustive
def test_contexts_and_chunks_and_shared_prefixes():
  model = model_of(None, None, contexts=(STRIDED, None))
  config = dataclasses.replace(SMALL, chunk=20, prefix_sharing=True)
  engine = Watched(model, TASK_KV, config)
  requests = requests_of((5, 33, 48), 14)
  requests.append(request("again", prompt(48) + prompt(2), 14))
  for _ in range(2):
    answers = engine.run(*requests)
    for one, events in zip(requests, answers, strict=True):
      check_against_model(model, one, events)
    engine.events.clear()


def test_pages_that_left_their_window_are_free():
  """A long answer of windowed heads takes no more pages than a short one."""
  contexts = (STRIDED, SINKS)
  model = model_of(None, None, contexts=contexts)
  engine = Watched(model)
  engine.run(request("a", prompt(1), 63))
  # After a step that writes the token at `position`: the blocks in sight.
  want = [
    sum(
      int(rule.keep(row, np.arange(row + 1)).sum())
      for pattern in contexts
      for rule in pattern.rules
    )
    for row in (position // 16 for position in range(63))
  ]
  assert engine.pages_used == [*want, 0]
  assert max(want) < 0.6 * 2 * 4 * 4


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("plans", "contexts", "fields"),
  [
    ((None, None), (STRIDED, None), {}),
    ((None, None), (None, SINKS), {"tie_embeddings": True}),
    ((ROUTED, NO_SHARED), (STRIDED, None), {}),
    ((ROUTED, None, ROUTED), (TWO_KV, None, TWO_KV), {"num_kv_heads": 2}),
  ],
  ids=["mixed", "tied", "routed", "routed, grouped"],
)
@pytest.mark.parametrize("policy", [TASK_KV, ADA], ids=["task_kv", "ada"])
def test_layers_without_contexts_obey_the_policy(
  plans, contexts, fields, policy
):
  model = model_of(*plans, contexts=contexts, **fields)
  engine = Watched(model, policy)
  requests = requests_of((12, 33), 30, budget=0.5)
  mine = ByContext(policy=policy, contexts=contexts)
  check_against_masks(engine, model, requests, mine)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  "fields", [{"tie_embeddings": True}, {"num_kv_heads": 2}], ids=str
)
def test_other_models(fields):
  model = model_of(None, None, **fields)
  engine = Watched(model, TASK_KV)
  requests = requests_of((12, 45), 12, budget=0.5)
  check_against_masks(engine, model, requests, TASK_KV)
