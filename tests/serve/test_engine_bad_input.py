"""What the engine refuses, and how it says so."""

import dataclasses
import math

import numpy as np
import pytest

from jaxheads import s2
from jaxheads.kvcache.names import make_policy
from jaxheads.serve.engine import Engine, EngineConfig
from jaxheads.serve.request import QueueFull, Request, SamplingParams
from tests.serve.engines import SMALL, TASK_KV, VOCAB, model_of, prompt

NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def model():
  return model_of(None)


@pytest.mark.parametrize(
  ("name", "values"),
  {
    "max_batch": (0, -1, 2.5, "2", None),
    "max_length": (0, 1, 65, 20.5),
    "max_waiting": (0, 1.5, None),
    "num_pages": (-3, 0, 1, 5.5),
    "page_size": (-4, 0, 2.5),
    "chunk": (-1, 0, 1, 4.5),
    "prefix_sharing": (True,),
    "dtype": ("nonsense", "int4", "int32", bool, "complex64"),
  }.items(),
)
def test_sizes(model, name, values):
  for value in values:
    with pytest.raises(ValueError, match=f"^`{name}` "):
      Engine(model, policy=TASK_KV, config=EngineConfig(**{name: value}))


def test_pages_are_blocks():
  context = s2.sliding_window(4, block_size=32, local_blocks=1)
  with pytest.raises(ValueError, match="`page_size` must be the block size"):
    Engine(model_of(None, contexts=(context,)), config=SMALL)
  mask = np.tril(np.ones((4, 4), bool))
  table = s2.from_block_mask(mask, block_size=16, num_heads=4)
  with pytest.raises(ValueError, match=r"`patterns\[0\]` must have strided"):
    Engine(model_of(None, contexts=(table,)), config=SMALL)


@pytest.mark.parametrize("budget", [0, -0.1, 1.1, NAN, INF, "x", None])
def test_budgets(model, budget):
  with pytest.raises(ValueError, match="^`budget` must be"):
    Engine(model, budget=budget, config=SMALL)
  if budget is not None:
    engine = Engine(model, policy=TASK_KV, config=SMALL)
    with pytest.raises(ValueError, match="^`budget` must be"):
      engine.submit(Request(id="a", prompt=(1,), budget=budget))
    assert not engine.has_work()


def test_policies_of_other_models(model):
  for policy, name in (
    (make_policy("static_heads", gates=((1.0, 2.0),)), "gates"),
    (
      dataclasses.replace(TASK_KV, ranking="static", heads=((0,), (1,))),
      "heads",
    ),
  ):
    with pytest.raises(ValueError, match=f"`{name}`"):
      Engine(model, policy=policy, config=SMALL)


def test_prompts(model):
  engine = Engine(model, policy=TASK_KV, config=SMALL)
  for tokens in (
    (),
    (VOCAB,),
    (1, -1),
    (1.5,),
    ("a",),
    "abc",
    None,
    5,
    (None,),
    (True,),
    (2**70,),
    ((1,), (2,)),
    prompt(64),
    np.array([1.5]),
  ):
    with pytest.raises(ValueError, match="`prompt`"):
      engine.submit(Request(id="a", prompt=tokens))
  params = SamplingParams(max_tokens=10**9)
  with pytest.raises(ValueError, match="`max_tokens`"):
    engine.submit(Request(id="a", prompt=(1,), params=params))
  assert not engine.has_work()
  assert engine.step() == []


def test_what_never_fits_and_what_does_not_fit_now(model):
  config = dataclasses.replace(SMALL, num_pages=9, max_waiting=2)
  engine = Engine(model, policy=TASK_KV, config=config)
  with pytest.raises(ValueError, match="may need 12 pages, the pool has 8"):
    engine.submit(Request(id="a", prompt=prompt(33)))
  engine.submit(Request(id="a", prompt=prompt(3)))
  with pytest.raises(ValueError, match="`id` must be unique, 'a' is in use"):
    engine.submit(Request(id="a", prompt=prompt(3)))
  engine.submit(Request(id="b", prompt=prompt(3)))
  with pytest.raises(QueueFull, match="2 requests are waiting"):
    engine.submit(Request(id="c", prompt=prompt(3)))
  engine.cancel("a")
  engine.submit(Request(id="c", prompt=prompt(3)))
  assert engine.stats().waiting == 2


@pytest.mark.parametrize(
  ("name", "values"),
  {
    "max_tokens": (0, -1, 2.5, NAN, "3", None),
    "temperature": (-1, NAN, INF, 1e300, "x", None),
    "top_k": (-1, 1.5, NAN, None),
    "top_p": (0, 1.1, NAN, None),
    "min_p": (-0.1, 1.1, NAN),
    "repetition_penalty": (0, -1, NAN, INF, 1e300, 1e-300),
    "presence_penalty": (NAN, INF, 1e300, -1e300),
    "frequency_penalty": (NAN, INF, 1e300),
    "seed": (-1, 2**63, 1.5, None),
    "stop_tokens": (5, None, (1.5,), ("a",), "ab"),
    "logprobs": (-1, 21, 1.5, "a"),
  }.items(),
)
def test_sampling(name, values):
  for value in values:
    with pytest.raises(ValueError, match=f"^`{name}` must be"):
      SamplingParams(**{name: value})


@pytest.mark.parametrize(
  ("policy", "settings", "name"),
  [
    ("nope", {}, "policy"),
    (None, {}, "policy"),
    ("task_kv", {"beta": NAN}, "beta"),
    ("task_kv", {"window": 2.5}, "window"),
    ("task_kv", {"window": 0}, "window"),
    ("task_kv", {"recent": 1}, "recent"),
    ("task_kv", {"kernel": 4}, "kernel"),
    ("task_kv", {"heads": ((0,),)}, "heads"),
    ("streaming", {"sinks": 1.5}, "sinks"),
    ("snapkv", {"floor": NAN}, "floor"),
    ("snapkv", {"slope": 0.5}, "slope"),
    ("expected", {"theta": 0}, "theta"),
    ("static_heads", {"gates": ((), ())}, "gates"),
    ("shard_only", {}, "patterns"),
  ],
)
def test_policy_settings(policy, settings, name):
  with pytest.raises(ValueError, match=f"^`{name}` must"):
    make_policy(policy, **settings)


def test_settings_from_json_are_hashable():
  """Programs are told apart by their policy."""
  for policy in (
    make_policy("task_kv", ranking="static", heads=[[0, 1], [2]]),
    make_policy("static_heads", gates=[[0.5, 1.0], [2.0, 0.0]]),
  ):
    assert hash(policy) == hash(dataclasses.replace(policy))
