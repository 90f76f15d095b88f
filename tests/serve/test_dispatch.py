"""Who serves what: rules by example, and anything in any order."""

import collections

import numpy as np
import pytest

from jaxheads.serve.dispatch import Dispatcher
from jaxheads.serve.request import QueueFull, Request


def request(name):
  return Request(id=name, prompt=(1,))


def with_requests(names, replicas=2, capacity=2, max_waiting=99):
  dispatcher = Dispatcher(replicas, capacity=capacity, max_waiting=max_waiting)
  for name in names:
    dispatcher.add(request(name))
  return dispatcher


def assigned(dispatcher):
  return [(replica, one.id) for replica, one in dispatcher.assign()]


def test_least_loaded_first_and_the_rest_waits():
  dispatcher = with_requests("abcdef")
  assert assigned(dispatcher) == [(0, "a"), (1, "b"), (0, "c"), (1, "d")]
  assert dispatcher.num_waiting == 2 and assigned(dispatcher) == []
  dispatcher.end(1, "b")
  assert assigned(dispatcher) == [(1, "e")]
  dispatcher.end(1, "d")
  dispatcher.end(1, "e")
  assert assigned(dispatcher) == [(1, "f")]
  dispatcher.add(request("g"))
  assert assigned(dispatcher) == [(1, "g")]  # It has one, the other two.


def test_a_failing_replica_loses_its_own_requests_alone():
  dispatcher = with_requests("abcdef")
  dispatcher.assign()
  dispatcher.cancel("c")
  assert dispatcher.fail(0) == ["a"]
  assert dispatcher.working == [1] and assigned(dispatcher) == []
  assert dispatcher.is_heard(1, "b") and not dispatcher.is_heard(0, "a")
  dispatcher.end(1, "b")
  assert assigned(dispatcher) == [(1, "e")]
  assert dispatcher.fail(1) == ["d", "e"]
  assert assigned(dispatcher) == [] and dispatcher.num_waiting == 1


def test_cancelled_requests_keep_their_place_until_the_replica_lets_go():
  dispatcher = with_requests("abc", replicas=1, capacity=1)
  dispatcher.assign()
  assert dispatcher.cancel("b") == (True, None)
  assert dispatcher.cancel("a") == (True, 0)
  assert dispatcher.cancel("a") == dispatcher.cancel("z") == (False, None)
  assert not dispatcher.is_heard(0, "a") and assigned(dispatcher) == []
  with pytest.raises(ValueError, match="'a' is in use"):
    dispatcher.add(request("a"))
  dispatcher.end(0, "a")
  dispatcher.add(request("a"))
  assert assigned(dispatcher) == [(0, "c")]


def test_too_many_wait():
  dispatcher = with_requests("abc", replicas=1, capacity=1, max_waiting=3)
  with pytest.raises(QueueFull, match="3 requests are waiting"):
    dispatcher.add(request("d"))
  dispatcher.assign()
  dispatcher.add(request("d"))


def play(seed, operations=300):
  """Random operations beside a model of what must hold; what happened."""
  rng = np.random.default_rng(seed)
  replicas, capacity = int(rng.integers(1, 5)), int(rng.integers(1, 4))
  most = int(rng.integers(1, 9))
  dispatcher = Dispatcher(replicas, capacity=capacity, max_waiting=most)
  queue, held = [], [{} for _ in range(replicas)]  # Of each: id to cancelled.
  failed, done = set(), collections.Counter()

  def pick(names):
    names = list(names)
    return names[rng.integers(len(names))] if names else "nobody"

  for count in range(operations):
    what = rng.choice(
      ["add", "assign", "end", "cancel", "fail"], p=[0.4, 0.25, 0.2, 0.14, 0.01]
    )
    replica = int(rng.integers(replicas))
    everyone = [*queue, *(name for mine in held for name in mine)]
    if what == "add":
      name = f"r{count}" if rng.random() < 0.9 else pick(everyone)
      if name in everyone:
        with pytest.raises(ValueError, match="in use"):
          dispatcher.add(request(name))
      elif len(queue) >= most:
        with pytest.raises(QueueFull):
          dispatcher.add(request(name))
      else:
        dispatcher.add(request(name))
        queue.append(name)
    elif what == "assign":
      for replica, one in dispatcher.assign():
        assert replica not in failed and one.id == queue.pop(0)
        loads = [len(held[n]) for n in range(replicas) if n not in failed]
        assert len(held[replica]) == min(loads) < capacity
        held[replica][one.id] = False
        done["assigned"] += 1
      working = [len(held[n]) for n in range(replicas) if n not in failed]
      assert not queue or all(load == capacity for load in working)
    elif what == "end":
      name = pick(everyone)
      dispatcher.end(replica, name)
      done["ended"] += held[replica].pop(name, None) is not None
    elif what == "cancel":
      name = pick(everyone)
      owner = next((n for n in range(replicas) if name in held[n]), None)
      got = dispatcher.cancel(name)
      if name in queue:
        queue.remove(name)
        assert got == (True, None)
      elif owner is None or held[owner][name]:
        assert got == (False, None)
      else:
        assert got == (True, owner)
        held[owner][name] = True
        done["cancelled"] += 1
    else:
      lost = [name for name, gone in held[replica].items() if not gone]
      assert dispatcher.fail(replica) == lost
      held[replica] = {}
      failed.add(replica)
      done["lost"] += len(lost)
    assert dispatcher.num_waiting == len(queue)
    assert dispatcher.working == [n for n in range(replicas) if n not in failed]
    assert dispatcher.is_idle == (not queue and not any(held))
    for n, mine in enumerate(held):
      for name, cancelled in mine.items():
        assert dispatcher.is_heard(n, name) == (not cancelled)
  return done


def play_many(seeds):
  return sum(map(play, seeds), collections.Counter())


def test_random_operations():
  done = play_many(range(30))
  assert all(done[what] for what in ("assigned", "ended", "cancelled", "lost"))


@pytest.mark.exhaustive
def test_many_random_operations():
  play_many(range(1000, 3000))


# Defects that must be found.


def most_loaded_first(patch):
  def assign(self, whole=Dispatcher.assign):
    self._loads = [-load for load in self._loads]
    self._capacity += 100
    given = whole(self)
    self._capacity -= 100
    self._loads = [abs(load) for load in self._loads]
    return given

  patch.setattr(Dispatcher, "assign", assign)


def place_freed_twice(patch):
  def end(self, replica, name, whole=Dispatcher.end):
    if name in self._entries and self._entries[name].cancelled:
      self._loads[replica] -= 1
    whole(self, replica, name)

  patch.setattr(Dispatcher, "end", end)


def ended_by_anybody(patch):
  def end(self, replica, name, whole=Dispatcher.end):
    entry = self._entries.get(name)
    if entry is not None and entry.replica is not None:
      whole(self, entry.replica, name)

  patch.setattr(Dispatcher, "end", end)


def failed_ones_serve_on(patch):
  def fail(self, replica, whole=Dispatcher.fail):
    lost = whole(self, replica)
    self._failed.clear()
    return lost

  patch.setattr(Dispatcher, "fail", fail)


@pytest.mark.parametrize(
  "plant",
  [
    most_loaded_first,
    place_freed_twice,
    ended_by_anybody,
    failed_ones_serve_on,
  ],
  ids=lambda plant: plant.__name__,
)
def test_planted_defect_is_found(plant, monkeypatch):
  plant(monkeypatch)
  with pytest.raises((AssertionError, KeyError)):
    play_many(range(30))
