"""Defects that are put into the engine, each of which a check must find."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxheads import s2
from jaxheads.kvcache.rows import row_step
from jaxheads.nn import HeadAttention
from jaxheads.serve import device, layers, state
from jaxheads.serve.device import Device
from jaxheads.serve.scheduler import Scheduler
from tests.serve.engines import (
  SMALL,
  TASK_KV,
  Watched,
  check_masked,
  model_of,
  prompt,
  request,
  tokens_of,
)

ROLL = dataclasses.replace(TASK_KV, decode="roll")
CONTEXT = s2.sliding_window(4, block_size=16, local_blocks=2)


@pytest.fixture
def afresh():
  """Programs that are traced now, and by nobody later."""
  device._compile.cache_clear()
  yield
  device._compile.cache_clear()


def check_answers():
  model = model_of(None)
  one = request("a", prompt(45), 10, budget=0.5)
  (events,) = Watched(model, ROLL).run(one)
  check_masked(model, one, events, policy=ROLL, budget=0.5)


def check_contexts():
  model = model_of(None, contexts=(CONTEXT,))
  Watched(model).run(request("a", prompt(30), 30))


def check_growth():
  model = model_of(None)
  one = request("a", prompt(45), 10, budget=0.5)
  (events,) = Watched(model, TASK_KV).run(one)
  check_masked(model, one, events, policy=TASK_KV, budget=0.5)


def check_chunks():
  model = model_of(None)
  one = request("a", prompt(20), 2)
  config = dataclasses.replace(SMALL, chunk=16)
  (events,) = Watched(model, TASK_KV, config).run(one)
  check_masked(model, one, events, policy=TASK_KV, budget=1.0)


def check_slots():
  engine = Watched(model_of(None), TASK_KV)
  one = request("a", prompt(45), 10, frequency_penalty=1.0)
  (first,) = engine.run(one)
  engine.events.clear()
  (second,) = engine.run(one)
  assert tokens_of(first) == tokens_of(second)


def check_preemption():
  model = model_of(None)
  requests = [
    request(name, prompt(16, seed), 40) for seed, name in enumerate("ab")
  ]
  large = Watched(model, TASK_KV)
  want = [tokens_of(large.run(one)[0]) for one in requests]
  engine = Watched(model, TASK_KV)
  allocator = engine.scheduler.allocator
  allocator.allocate(allocator.num_free - 20)
  engine.submit(*requests)
  while engine.engine.has_work():
    engine.step()
  assert engine.engine.stats().preemptions
  assert [tokens_of(engine.events[one.id]) for one in requests] == want


def wrong_permutation(patch):
  right = layers.compact

  def compact(*args):
    packed = right(*args)
    return packed._replace(head_of_slot=jnp.roll(packed.head_of_slot, 1))

  patch.setattr(layers, "compact", compact)


def late_ring(patch):
  def step(lengths, rings, written, dropped, page_size):
    return row_step(lengths, rings, written + 1, dropped, page_size)

  patch.setattr(state, "row_step", step)


def compacted_too_early(patch):
  right = HeadAttention.attend

  def attend(self, x, k, v, **fields):
    recent = jnp.arange(k.shape[1]) >= 45 - 20
    return right(self, x, k, v * recent[:, None, None], **fields)

  patch.setattr(HeadAttention, "attend", attend)


def forgotten_drop(patch):
  patch.setattr(state, "drop_pages", lambda table, drops, xp: table)


def forgotten_rows(patch):
  patch.setattr(layers, "_write_rows", lambda pages, numbers, k, v: pages)


def stale_page(patch):
  right = Device._decode

  def decode(self, turn):
    return right(self, dataclasses.replace(turn, new_pages=0 * turn.new_pages))

  patch.setattr(Device, "_decode", decode)


def stale_prompt(patch):
  right = jnp.where

  def where(condition, x, y):
    # Of `_continue` alone: there the other value is a plain 0.
    return x if isinstance(y, int) and x.ndim == 3 else right(condition, x, y)

  fake = type("jnp", (), {**vars(jnp), "where": staticmethod(where)})
  patch.setattr(layers, "jnp", fake)


def old_counts(patch):
  right = Device._prefill

  def prefill(self, turn):
    counts = jnp.array(self._state.drawing.answer_counts)
    outputs = right(self, turn)
    drawing = self._state.drawing._replace(answer_counts=counts)
    self._state = self._state._replace(drawing=drawing)
    return outputs

  patch.setattr(Device, "_prefill", prefill)


def wrong_replay(patch):
  patch.setattr(Scheduler, "_known", lambda self, sequence: 0)


def page_of_two(patch):
  right = Scheduler._release

  def release(self, sequence):
    pages = self.rows.pages[:, sequence.slot].copy()
    right(self, sequence)
    # Freed, and given to the next one while this one's answer goes on.
    for other in self._active:
      self.rows.pages[:, other.slot, :, 0] = pages[..., 0]

  patch.setattr(Scheduler, "_release", release)


DEFECTS = {
  check_answers: (wrong_permutation, late_ring, compacted_too_early),
  check_contexts: (forgotten_drop,),
  check_growth: (forgotten_rows, stale_page),
  check_chunks: (stale_prompt,),
  check_slots: (old_counts,),
  check_preemption: (wrong_replay, page_of_two),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("check", DEFECTS, ids=lambda f: f.__name__)
def test_each_check_finds_its_defects(check, monkeypatch, afresh):
  check()  # Without one, nothing is found.
  for defect in DEFECTS[check]:
    device._compile.cache_clear()
    with monkeypatch.context() as patch:
      defect(patch)
      found = None
      try:
        check()
      except (AssertionError, ValueError) as error:
        found = error
      assert found is not None, defect.__name__
