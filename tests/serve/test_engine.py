"""The engine against one mask over a dense cache, and against itself."""

import dataclasses

import numpy as np
import pytest

from jaxheads.kvcache.names import make_policy
from jaxheads.serve.engine import Engine, EngineConfig
from jaxheads.serve.request import Request, SamplingParams
from tests.models.builders import VOCAB, small_config, small_model
from tests.serve import masked

TASK_KV = dict(sinks=2, recent=6, window=4, top=8, kernel=3)
SMALL = EngineConfig(max_batch=2, page_size=16)


def model_of(*plans, **fields):
  fields = {"num_kv_heads": 4, "max_seq_len": 64, **fields}
  return small_model(small_config(*plans, **fields))


def prompt(length, seed=0):
  rng = np.random.default_rng((seed, length))
  return tuple(int(token) for token in rng.integers(0, VOCAB, length))


def greedy(name, tokens, count, **fields):
  params = SamplingParams(max_tokens=count, temperature=0, logprobs=5)
  return Request(id=name, prompt=tokens, params=params, **fields)


def tokens_of(events):
  return [event.token for event in events]


def serve(model, prompts, count, *, policy, budget=1.0, config=SMALL):
  engine = Engine(model, policy=policy, budget=budget, config=config)
  answers = engine.generate(
    [greedy(str(i), p, count) for i, p in enumerate(prompts)]
  )
  stats = engine.stats()
  assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
  return [answers[str(i)] for i in range(len(prompts))], engine


POLICIES = {
  "full": ({}, 1.0),
  "streaming": (dict(sinks=2), 0.4),
  "snapkv": (dict(window=4, kernel=3), 0.4),
  "task_kv": (TASK_KV, 0.5),
  "ada_snapkv": (dict(window=4, kernel=3), 0.4),
}


@pytest.mark.parametrize(
  ("name", "chunk"),
  [
    ("full", None),
    ("task_kv", 16),
    *(
      pytest.param(name, chunk, marks=pytest.mark.exhaustive)
      for name, chunk in [
        *((name, None) for name in POLICIES if name != "full"),
        ("ada_snapkv", 16),
      ]
    ),
  ],
)
def test_answers_equal_a_mask_over_a_dense_cache(name, chunk):
  settings, budget = POLICIES[name]
  policy = make_policy(name, **settings)
  model = model_of(None, None)
  prompts = [prompt(n) for n in (1, 8, 31, 45)]
  config = dataclasses.replace(SMALL, chunk=chunk)
  got, _ = serve(
    model, prompts, 12, policy=policy, budget=budget, config=config
  )
  for tokens, events in zip(prompts, got, strict=True):
    want, logits, _ = masked.answer(
      model, tokens, 12, policy=policy, budget=budget
    )
    assert tokens_of(events) == want
    for event, row in zip(events, logits, strict=True):
      row = row.astype(np.float64)
      row -= row.max()
      row -= np.log(np.exp(row).sum())
      assert event.logprob == pytest.approx(row[event.token], abs=2e-5)
