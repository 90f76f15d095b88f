"""Several engines that look like one: answers, ends, failures and sums."""

import collections
import contextlib
import dataclasses
import time

import jax
import numpy as np
import pytest

from jaxheads.serve.engine import Engine
from jaxheads.serve.replicas import Replicas, split
from jaxheads.serve.request import QueueFull, Request, SamplingParams
from jaxheads.sharding import MeshShape, make_mesh
from tests.serve.engines import (
  SMALL,
  logprobs_of,
  model_of,
  prompt,
  tokens_of,
)
from tests.serve.engines import request as request_for
from tests.serve.fake_engine import FakeEngine, answer
from tests.serve.live import live


def request(name, count=20, **fields):
  params = SamplingParams(max_tokens=count, seed=len(name), stop_tokens=(10,))
  return Request(id=name, prompt=tuple(name.encode()), params=params, **fields)


@contextlib.contextmanager
def replicas_of(*engines, capacity=4, max_waiting=1000):
  replicas = Replicas(engines, capacity=capacity, max_waiting=max_waiting)
  yield replicas
  assert replicas.close()


def collect(replicas, events, until=None):
  """Steps until nothing is left to do, or something holds."""
  end = time.monotonic() + 60
  while replicas.has_work() and not (until and until()):
    assert time.monotonic() < end, "does not come to an end"
    for event in replicas.step():
      so_far = events[event.request_id]
      assert not so_far or so_far[-1].finish is None, "after the end"
      so_far.append(event)


def serve(replicas, requests):
  events = collections.defaultdict(list)
  for one in requests:
    replicas.submit(one)
  collect(replicas, events)
  return events


def test_answers_and_sums():
  engines = [FakeEngine(batch=4) for _ in range(3)]
  requests = [request(f"r{n}", 5 + n % 7) for n in range(60)]
  with replicas_of(*engines) as replicas:
    events = serve(replicas, requests)
    stats = replicas.stats()
  for one in requests:
    assert events[one.id] == answer(one)
  assert sum(len(e.submitted) for e in engines) == 60
  assert all(e.submitted for e in engines)
  assert stats.tokens_generated == sum(len(answer(r)) for r in requests)
  assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
  assert (stats.pages_total, stats.compilations) == (300, 6)
  assert stats.failed_replicas == 0


def test_least_loaded_first_and_one_queue():
  engines = [FakeEngine(turn_s=0.005) for _ in range(2)]
  with replicas_of(*engines, capacity=2, max_waiting=3) as replicas:
    for n in range(4):
      replicas.submit(request(str(n), 200))
    for n in range(4, 7):
      replicas.submit(request(str(n), 200))
    with pytest.raises(QueueFull, match="3 requests are waiting"):
      replicas.submit(request("7"))
    stats = replicas.stats()
    assert (stats.waiting, stats.running) in ((3, 4), (7, 0), (5, 2))
    assert [[r.id for r in e.submitted] for e in engines] == [
      ["0", "2"],
      ["1", "3"],
    ]
    for n in range(7):
      replicas.cancel(str(n))
    collect(replicas, collections.defaultdict(list))


def test_cancelled_requests_say_nothing_more_and_free_their_place():
  engine = FakeEngine(turn_s=0.001)
  with replicas_of(engine, capacity=1) as replicas:
    events = collections.defaultdict(list)
    for name in ("running", "waiting", "last"):
      replicas.submit(request(name, 240))
    collect(replicas, events, until=lambda: events["running"])
    for name in ("waiting", "running", "running", "unknown"):
      replicas.cancel(name)
    with pytest.raises(ValueError, match="'running' is in use"):
      replicas.submit(request("running"))
    collect(replicas, events)
  assert [e.finish for e in events["waiting"]] == ["cancelled"]
  assert events["running"][-1].finish == "cancelled"
  assert events["last"] == answer(request("last", 240))
  assert engine.cancelled == ["running"]
  assert "unknown" not in events


def test_a_failing_replica_takes_only_its_own_requests():
  engines = [FakeEngine(), FakeEngine(fail_at=10), FakeEngine()]
  requests = [request(f"r{n}", 30) for n in range(40)]
  with replicas_of(*engines) as replicas:
    events = serve(replicas, requests)
    stats = replicas.stats()
    # What comes later goes to the others.
    assert serve(replicas, [request("later")])["later"] == answer(
      request("later")
    )
  lost = [r for r in requests if events[r.id][-1].finish == "error"]
  assert {r.id for r in lost} == {r.id for r in engines[1].submitted}
  assert 0 < len(lost) <= 4
  for one in requests:
    if one not in lost:
      assert events[one.id] == answer(one)
  assert stats.failed_replicas == 1 and stats.pages_total == 200
  assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)


def test_when_all_have_failed_it_says_so():
  events = collections.defaultdict(list)
  with replicas_of(FakeEngine(fail_at=3), FakeEngine(fail_at=5)) as replicas:
    for n in range(20):
      replicas.submit(request(f"r{n}", 30))
    with pytest.raises(RuntimeError, match="all 2 replicas .*out of smoke"):
      collect(replicas, events)
    with pytest.raises(RuntimeError, match="all 2 replicas have failed"):
      replicas.submit(request("later"))
    assert replicas.has_work()
    assert replicas.stats().failed_replicas == 2
  assert sum(e[-1].finish == "error" for e in events.values()) == 8


def test_a_replica_that_hangs_does_not_hold_up_the_others():
  hanging = FakeEngine(hang_at=2)
  replicas = Replicas([hanging, FakeEngine()], capacity=1, max_waiting=99)
  requests = [request(f"r{n}") for n in range(9)]
  events = collections.defaultdict(list)
  for one in requests:
    replicas.submit(one)

  def ended():
    return sum(e[-1].finish is not None for e in events.values())

  collect(replicas, events, until=lambda: ended() == 8)
  assert [r.id for r in hanging.submitted] == ["r0"]
  began = time.monotonic()
  assert replicas.stats().running == 0  # As it was, before all this.
  assert time.monotonic() - began < 5
  assert not replicas.close(timeout_s=0.01)


def test_refused_before_it_reaches_an_engine():
  engine = FakeEngine()
  with replicas_of(engine) as replicas:
    with pytest.raises(ValueError, match="too long"):
      replicas.submit(request("a", 999))
    with pytest.raises(ValueError, match="budget"):
      replicas.submit(request("a", budget=2.0))
    assert not replicas.has_work() and not engine.submitted
    assert replicas.kept_fraction(request("a", budget=0.3)) == 0.3


def play(seed):
  """Random submits, cancels and failures; everyone gets one end."""
  rng = np.random.default_rng(seed)
  count = int(rng.integers(1, 5))
  engines = [
    FakeEngine(fail_at=int(rng.integers(5, 60)) if rng.random() < 0.3 else None)
    for _ in range(count - 1)
  ] + [FakeEngine()]
  capacity = int(rng.integers(1, 5))
  events = collections.defaultdict(list)
  sent, cancelled = {}, set()
  with replicas_of(*engines, capacity=capacity, max_waiting=6) as replicas:
    for index in range(60):
      if rng.random() < 0.6:
        one = request(f"{seed}-{index}", int(rng.integers(1, 30)))
        try:
          replicas.submit(one)
          sent[one.id] = one
        except QueueFull:
          assert replicas._dispatcher.num_waiting == 6
      if sent and rng.random() < 0.1:
        name = list(sent)[rng.integers(len(sent))]
        replicas.cancel(name)
        cancelled.add(name)
      if rng.random() < 0.7:
        steps = iter(range(int(rng.integers(1, 4))))
        collect(replicas, events, until=lambda s=steps: next(s, None) is None)
    collect(replicas, events)
    stats = replicas.stats()
    working = [e for e in engines if not e.fail_at or e.turns < e.fail_at]
    assert replicas._dispatcher._loads == [0] * count
  assert stats.failed_replicas == count - len(working)
  assert (stats.waiting, stats.running, stats.pages_used) == (0, 0, 0)
  reached = [r.id for e in engines for r in e.submitted]
  assert set(reached) <= set(sent) and len(set(reached)) == len(reached)
  done = collections.Counter()
  for name, one in sent.items():
    got, want = events[name], answer(one)
    finish = got[-1].finish
    done[finish] += 1
    if finish == "cancelled":
      assert name in cancelled
    elif finish == "error":
      assert not any(one in e.submitted for e in working)
    else:
      assert got == want
      continue
    assert got[:-1] == want[: len(got) - 1]
  return done


def test_random_operations():
  done = sum(map(play, range(15)), collections.Counter())
  assert all(done[what] for what in ("length", "stop", "cancelled", "error"))


@pytest.mark.exhaustive
def test_many_random_operations():
  for seed in range(100, 600):
    play(seed)


def test_behind_the_server():
  engines = [FakeEngine(), FakeEngine(fail_at=3), FakeEngine()]
  replicas = Replicas(engines, capacity=4, max_waiting=100)
  with live(replicas) as server, server.client() as client:
    answers = []
    for seed in range(9):
      with contextlib.suppress(Exception):
        answers.append(
          client.completions.create(
            model="fake", prompt="a", max_tokens=9, seed=seed, temperature=1
          )
        )
    assert len(answers) == 9  # Least loaded: always the first.
    streams = [
      client.completions.create(
        model="fake", prompt="a", max_tokens=200, temperature=0, stream=True
      )
      for _ in range(6)
    ]
    failed = 0
    for stream in streams:
      try:
        list(stream)
      except Exception:
        failed += 1
    assert 1 <= failed <= 4
    status, _, told = server.ask("GET", "/health")
    assert (status, told) == (200, {"status": "ok"})
    assert server.metric("jaxheads_failed_replicas") == 1
    assert server.metric('jaxheads_pages{state="total"}') == 200
  assert replicas.close()


def test_the_meshes_of_replicas():
  shape = MeshShape(data=2, heads=4)
  mesh = make_mesh(shape, jax.devices()[:8])
  parts = split(mesh)
  assert [dict(part.shape) for part in parts] == [
    dict(data=1, fsdp=1, context=1, heads=4)
  ] * 2
  found = [list(part.devices.flat) for part in parts]
  assert found == [list(mesh.devices[n].flat) for n in range(2)]


@pytest.mark.exhaustive
def test_two_engines_on_two_devices():
  model = model_of(None)
  mesh = make_mesh(MeshShape(data=2), jax.devices()[:2])
  config = dataclasses.replace(SMALL, max_batch=1)
  engines = [Engine(model, config=config, mesh=part) for part in split(mesh)]
  requests = [request_for(str(n), prompt(n), 6) for n in (3, 5, 7, 9, 11)]
  alone = Engine(model, config=config).generate(requests)
  with replicas_of(*engines, capacity=1) as replicas:
    got = serve(replicas, requests)
    assert all(engine.stats().tokens_generated for engine in engines)
  where = [engine._device._state.pages.k.stored.devices() for engine in engines]
  assert where == [{device} for device in jax.devices()[:2]]
  for one in requests:
    assert tokens_of(got[one.id]) == tokens_of(alone[one.id])
    np.testing.assert_allclose(
      logprobs_of(got[one.id]), logprobs_of(alone[one.id]), atol=1e-5
    )
