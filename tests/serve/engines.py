"""Engines that are watched: what tests of the engine share."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.kvcache.names import make_policy
from jaxheads.serve.engine import Engine, EngineConfig
from jaxheads.serve.request import Request, SamplingParams
from jaxheads.serve.sequence import State
from tests.models.builders import VOCAB, small_config, small_model
from tests.serve import masked

PAGE = 16
SMALL = EngineConfig(max_batch=2, page_size=PAGE)
TASK_KV = make_policy("task_kv", sinks=2, recent=6, window=4, top=8, kernel=3)
ADA = make_policy("ada_snapkv", window=4, kernel=3)


def model_of(*plans, **fields):
  """Layers of 4 heads with a KV head each, for sequences of 64 tokens."""
  fields = {"num_kv_heads": 4, "max_seq_len": masked.SIZE, **fields}
  return small_model(small_config(*plans, **fields))


def prompt(length, seed=0):
  rng = np.random.default_rng((seed, length))
  return tuple(int(token) for token in rng.integers(0, VOCAB, length))


def request(name, tokens, count, *, budget=None, **params):
  """Greedy, with the log-probabilities of the whole vocabulary."""
  params = {"temperature": 0.0, "logprobs": VOCAB, **params}
  return Request(
    id=name,
    prompt=tokens,
    params=SamplingParams(max_tokens=count, **params),
    budget=budget,
  )


def tokens_of(events):
  return [event.token for event in events if event.token is not None]


def logprobs_of(events):
  """[tokens, VOCAB], of requests with log-probabilities of all tokens."""
  table = np.empty((len(events), VOCAB))
  for row, event in zip(table, events, strict=True):
    for token, value in event.top_logprobs:
      row[token] = value
  return table


def log_softmax(logits):
  x = np.asarray(logits, np.float64)
  x = x - x.max(axis=-1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Watched:
  """An engine that is inspected after every step.

  What the host knows of rows must be what the device holds, no page may have
  two owners, and pages that nobody owns are filled with NaN: whoever reads one
  of them shows it.
  """

  def __init__(
    self,
    model,
    policy=None,
    config=SMALL,
    budget=1.0,
    poison=True,
    mesh=None,
  ):
    self.engine = Engine(
      model, policy=policy, budget=budget, config=config, mesh=mesh
    )
    self.scheduler = self.engine._scheduler
    self.device = self.engine._device
    self.events = {}
    self.order = []
    self.pages_used = []
    self._poison = poison
    if poison:
      self.poison()

  def submit(self, *requests):
    for one in requests:
      self.engine.submit(one)
      self.events[one.id] = []

  def step(self):
    new = self.engine.step()
    for event in new:
      self.order.append(event.request_id)
      so_far = self.events[event.request_id]
      assert not so_far or so_far[-1].finish is None, "after the end"
      so_far.append(event)
    self.check()
    if self._poison:
      self.poison()
    self.pages_used.append(self.engine.stats().pages_used)
    return new

  def run(self, *requests):
    """Serves to the end; the events of each request."""
    self.submit(*requests)
    for _ in range(3000):
      if not self.engine.has_work():
        break
      self.step()
    else:
      raise AssertionError("The engine does not come to an end.")
    stats = self.engine.stats()
    assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
    for events in self.events.values():
      assert [e.finish is not None for e in events] == [
        *[False] * (len(events) - 1),
        True,
      ]
    return [self.events[one.id] for one in requests]

  def check(self):
    """Host and device agree on all rows."""
    host = self.scheduler.rows
    mine = jax.device_get(self.device._state.rows)
    allocator = self.scheduler.allocator
    owned = np.zeros(allocator.owners.size, np.int32)
    for sequence in self.scheduler._active:
      if sequence.prompt_pages is not None:
        np.add.at(owned, sequence.prompt_pages.reshape(-1), 1)
      if sequence.state is not State.RUNNING:
        continue
      slot = sequence.slot
      for name in ("lengths", "rings"):
        np.testing.assert_array_equal(
          getattr(mine, name)[:, slot], getattr(host, name)[:, slot], name
        )
      at = np.arange(host.pages.shape[-1])
      held = at < -(-host.lengths[:, slot, :, None] // PAGE)
      np.testing.assert_array_equal(
        np.where(held, mine.pages[:, slot], 0),
        allocator.local(host.pages[:, slot]),
      )
      assert (host.pages[:, slot][held] > 0).all()
      np.add.at(owned, host.pages[:, slot][held], 1)
      assert mine.written[slot] == sequence.written
      assert mine.positions[slot] == sequence.position
      heads = np.sort(mine.head_of_slot[:, slot], axis=-1)
      assert (heads == np.arange(heads.shape[-1])).all()
      plan = sequence.plan
      if plan.heads is not None:
        # In layers that give pages up.
        drop = plan.layers.get("has_context", np.ones(len(plan.heads))) > 0
        np.testing.assert_array_equal(
          mine.head_of_slot[drop, slot], plan.heads[drop]
        )
    # Only prompts may share pages, and nobody owns what is free.
    assert (owned <= allocator.owners).all()
    assert not owned[:: allocator.pages_per_shard].any()

  def poison(self):
    state = self.device._state
    free = jnp.asarray(self.scheduler.allocator.owners == 0)
    self.device._state = state._replace(pages=_fill(state.pages, free))


@jax.jit
def _fill(pages, free):
  """Free pages hold NaN, or are multiplied with it."""

  def fill(pool):
    if pool.scales is not None:
      scales = jnp.where(free, jnp.nan, pool.scales)
      return dataclasses.replace(pool, scales=scales)
    nan = np.uint16(0x7FC0) if pool.stored.dtype == jnp.uint16 else np.nan
    nan = jnp.asarray(nan, pool.stored.dtype)
    stored = jnp.where(free[:, None, None], nan, pool.stored)
    return dataclasses.replace(pool, stored=stored)

  return dataclasses.replace(pages, k=fill(pages.k), v=fill(pages.v))


def check_masked(model, one, events, *, policy, budget, atol=2e-5):
  """An answer equals one mask over a dense cache: tokens and distributions."""
  count = one.params.max_tokens
  assert len(events) == count
  logits, _ = masked.logits(
    model, one.prompt, tokens_of(events), policy=policy, budget=budget
  )
  want = log_softmax(logits)
  np.testing.assert_allclose(logprobs_of(events), want, atol=atol, rtol=0)
  for event, row in zip(events, want, strict=True):
    assert row[event.token] >= row.max() - atol
    assert event.logprob == pytest.approx(row[event.token], abs=atol)
