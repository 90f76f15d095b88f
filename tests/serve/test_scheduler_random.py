"""Anything a caller can do, in any order, against a device that checks."""

import collections
import dataclasses
import time

import hypothesis.stateful
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads.kvcache import prefix, row_table
from jaxheads.kvcache.allocator import PageAllocator
from jaxheads.kvcache.prefix import PrefixCache
from jaxheads.kvcache.rows import row_step
from jaxheads.serve.scheduler import Scheduler
from jaxheads.serve.sequence import State
from tests.serve.world import World, play


def play_many(seeds, operations, shards=1):
  done = collections.Counter()
  for seed in seeds:
    try:
      done += play(seed, operations, shards).done
    except BaseException:
      print(f"seed {seed}, {operations} operations")
      raise
  return done


def check_coverage(done):
  # A run that led to none of these would show little.
  for what in (
    "added refused turns prefills decoded compacts finished cancelled stopped "
    "shared preempted replayed dropped"
  ).split():
    assert done[what] > 0, what


def test_random_operations():
  check_coverage(play_many(range(40), 100))


@pytest.mark.parametrize(
  "shards", [2, pytest.param(3, marks=pytest.mark.exhaustive)]
)
def test_random_operations_over_several_devices(shards):
  check_coverage(play_many(range(40), 100, shards))


@pytest.mark.slow
def test_twenty_thousand_random_operations():
  check_coverage(play_many(range(1000, 1100), 200))


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(10))
def test_a_million_random_operations(part):
  seeds = range(10_000 + 100 * part, 10_100 + 100 * part)
  began = time.monotonic()
  done = play_many(seeds, 1000)
  print(f"seeds {seeds}: {time.monotonic() - began:.0f} s, {dict(done)}")
  check_coverage(done)


class Machine(hypothesis.stateful.RuleBasedStateMachine):
  """The same operations, chosen and shrunk by hypothesis."""

  @hypothesis.stateful.initialize(seed=st.integers(0, 2**32 - 1))
  def begin(self, seed):
    self.world = World(np.random.default_rng(seed))

  @hypothesis.stateful.rule(times=st.integers(1, 4))
  def add(self, times):
    for _ in range(times):
      self.world.do("add")

  @hypothesis.stateful.rule(times=st.integers(1, 9))
  def schedule(self, times):
    for _ in range(times):
      self.world.do("schedule")

  @hypothesis.stateful.rule()
  def record(self):
    self.world.do("record")

  @hypothesis.stateful.rule()
  def set_lengths(self):
    self.world.do("set_lengths")

  @hypothesis.stateful.rule()
  def cancel(self):
    self.world.do("cancel")

  def teardown(self):
    if hasattr(self, "world"):
      self.world.drain()


Machine.TestCase.settings = hypothesis.settings(
  max_examples=30, stateful_step_count=40
)
TestMachine = Machine.TestCase


# Defects that must be found. Each replaces one thing by its broken sister.


def leak_at_cancel(monkeypatch):
  def clear(self, slot, whole=row_table.RowTable.clear):
    return whole(self, slot)[1:]

  monkeypatch.setattr(row_table.RowTable, "clear", clear)


def double_free_at_preemption(monkeypatch):
  def preempt(self, sequence, whole=Scheduler._preempt):
    pages = self.rows.pages[:, sequence.slot]
    self.allocator.free(pages[pages > 0])
    whole(self, sequence)

  monkeypatch.setattr(Scheduler, "_preempt", preempt)


def shared_prefix_not_counted(monkeypatch):
  def take(self, keys):
    share = PageAllocator.share
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(PageAllocator, "share", lambda self, pages: None)
      pages = whole(self, keys)
    assert PageAllocator.share is share
    return pages

  whole = PrefixCache.take
  monkeypatch.setattr(PrefixCache, "take", take)


def users_of_a_prefix_forgotten(monkeypatch):
  monkeypatch.setattr(PrefixCache, "release", lambda self, keys: None)


def prefix_keys_without_their_past(monkeypatch):
  def keys(prompt, page_size):
    return tuple(
      prefix.block_keys(prompt[end - page_size : end], page_size)[0]
      for end in range(page_size, len(prompt) + 1, page_size)
    )

  monkeypatch.setattr("jaxheads.serve.scheduler.block_keys", keys)


def new_page_too_late(monkeypatch):
  def step(lengths, rings, written, dropped, page_size):
    right = row_step(lengths, rings, written, dropped, page_size)
    late = (right.write % page_size == 1 % page_size).astype(np.int32)
    return right._replace(new_page=late * (rings == 0))

  monkeypatch.setattr(row_table, "row_step", step)


def ring_one_too_far(monkeypatch):
  def step(lengths, rings, written, dropped, page_size):
    grows = (rings == 0).astype(np.int32)
    return row_step(lengths, rings, written, dropped, page_size)._replace(
      lengths=lengths + np.maximum(grows, written % (rings + grows) == 1)
    )

  monkeypatch.setattr(row_table, "row_step", step)


def oldest_is_preempted(monkeypatch):
  def preempt(self, sequence, whole=Scheduler._preempt):
    whole(self, self._active[0])

  monkeypatch.setattr(Scheduler, "_preempt", preempt)


def preempted_to_the_back(monkeypatch):
  def preempt(self, sequence, whole=Scheduler._preempt):
    whole(self, sequence)
    self._waiting.rotate(-1)

  monkeypatch.setattr(Scheduler, "_preempt", preempt)


def readmitted_at_once(monkeypatch):
  def schedule(self, whole=Scheduler.schedule):
    turn = whole(self)
    if turn is None or turn.prefill is not None:
      return turn
    return dataclasses.replace(turn, prefill=self._admit())

  monkeypatch.setattr(Scheduler, "schedule", schedule)


def replay_one_short(monkeypatch):
  def admit(self, whole=Scheduler._admit):
    part = whole(self)
    if part is not None and self._active[-1].replay:
      self._active[-1].replay -= 1
    return part

  monkeypatch.setattr(Scheduler, "_admit", admit)


def given_out_twice(monkeypatch):
  def decode(self, step, drops, whole=Scheduler._decode):
    turn = whole(self, step, drops)
    if turn is not None:
      turn.emit[turn.slots] = True
    return turn

  monkeypatch.setattr(Scheduler, "_decode", decode)


def prompt_freed_too_early(monkeypatch):
  def read_on(self, sequence, whole=Scheduler._read_on):
    part = whole(self, sequence)
    if sequence.state is State.SETTLING:
      self._release_prompt(sequence)
    return part

  monkeypatch.setattr(Scheduler, "_read_on", read_on)


def dropped_page_kept(monkeypatch):
  def drop(self, slot, drops, whole=row_table.RowTable.drop):
    return whole(self, slot, drops)[:0]

  monkeypatch.setattr(row_table.RowTable, "drop", drop)


def last_token_never_ends(monkeypatch):
  def finish(self, whole=Scheduler._finish_turn):
    done = [s for s in self._active if s.done]
    if done and not done[0].request.id.endswith("1"):
      whole(self)

  monkeypatch.setattr(Scheduler, "_finish_turn", finish)


@pytest.mark.parametrize(
  "plant",
  [
    leak_at_cancel,
    double_free_at_preemption,
    shared_prefix_not_counted,
    users_of_a_prefix_forgotten,
    prefix_keys_without_their_past,
    new_page_too_late,
    ring_one_too_far,
    oldest_is_preempted,
    preempted_to_the_back,
    readmitted_at_once,
    replay_one_short,
    given_out_twice,
    prompt_freed_too_early,
    dropped_page_kept,
    last_token_never_ends,
  ],
  ids=lambda plant: plant.__name__,
)
def test_planted_defect_is_found(plant, monkeypatch):
  plant(monkeypatch)
  with pytest.raises((AssertionError, ValueError, RuntimeError, KeyError)):
    play_many(range(40), 100)
