"""Several engines behind one queue."""

import concurrent.futures
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from jax.sharding import Mesh

from jaxheads.serve.dispatch import Dispatcher
from jaxheads.serve.engine import EngineStats
from jaxheads.serve.request import Event, QueueFull, Request
from jaxheads.serve.runner import AnyEngine

_T = TypeVar("_T")
# So long a step waits for news, and so may a new request. The engines' own
# turns take about as long.
_NEWS_S = 0.005
# So long a question waits for an engine that is in a turn, or compiles.
_ANSWER_S = 0.1
_log = logging.getLogger("jaxheads")


class Replica(AnyEngine, Protocol):
  """What is asked of each engine; all but the first two from its own thread."""

  def check(self, request: Request) -> None:
    """`ValueError` if the request can never be served."""

  def kept_fraction(self, request: Request) -> float: ...

  def warm_up(self) -> int:
    """Compiles what requests may need; returns how many programs."""


class Replicas:
  """Engines of one model, each with a thread and devices of its own.

  Used like one `jaxheads.serve.Engine`, by one thread. Requests wait in one
  queue and go to the engine that holds fewest. An engine that raises an
  exception ends its own requests with an "error" event, and gets no others;
  when it was the last one, `step` and `submit` raise.

  Args:
    engines: All for the same model, policy and sizes; not used by anybody
      else from now on.
    capacity: Requests that each engine holds at most: its `max_batch`.
    max_waiting: Requests that wait at most.
  """

  def __init__(
    self, engines: Sequence[Replica], *, capacity: int, max_waiting: int
  ) -> None:
    self._any = engines[0]
    self._dispatcher = Dispatcher(
      len(engines), capacity=capacity, max_waiting=max_waiting
    )
    self._news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    self._workers = [
      _Worker(number, engine, self._news)
      for number, engine in enumerate(engines)
    ]
    self._stats = [_NOTHING] * len(engines)
    self._snapshots: list[list[dict[str, Any]]] = [[] for _ in engines]
    self._told: list[Event] = []
    self._failure: BaseException | None = None

  def submit(self, request: Request) -> None:
    """Takes a request; its tokens come with later steps.

    Raises:
      ValueError: It can never be served, or its id is in use.
      QueueFull: Too many requests wait.
      RuntimeError: All engines have failed.
    """
    self._check_working()
    self._any.check(request)
    self._dispatcher.add(request)
    self._assign()

  def kept_fraction(self, request: Request) -> float:
    """Share of the prompt's tokens that heads keep."""
    return self._any.kept_fraction(request)

  def cancel(self, request_id: str) -> None:
    """Ends a request early; nothing happens if it has ended."""
    lived, replica = self._dispatcher.cancel(request_id)
    if lived:
      self._told.append(Event(request_id=request_id, finish="cancelled"))
    if replica is not None:
      self._workers[replica].cancel(request_id)

  def has_work(self) -> bool:
    """Whether another step would do anything."""
    # A step says that all have failed.
    none_left = not self._dispatcher.working
    return bool(self._told or none_left or not self._dispatcher.is_idle)

  def step(self) -> list[Event]:
    """What has happened; waits a moment if nothing has.

    Raises:
      RuntimeError: All engines have failed.
    """
    events, self._told = self._told, []
    if not events:
      self._check_working()
    with contextlib.suppress(queue.Empty):
      news = self._news.get(timeout=0 if events else _NEWS_S)
      while True:
        events += self._hear(news)
        news = self._news.get_nowait()
    self._assign()
    return events

  def warm_up(self) -> int:
    """Compiles every program that requests may need; returns how many."""
    asked = [worker.ask(lambda e: e.warm_up()) for worker in self._workers]
    return sum(answer.result() for answer in asked)

  def stats(self) -> EngineStats:
    """Of all engines together.

    An engine that does not answer at once counts as it was. Of one that has
    failed, what it did stays counted.
    """
    self._ask(lambda engine: engine.stats(), self._stats)
    working = self._dispatcher.working
    total = {
      field.name: sum(getattr(one, field.name) for one in self._stats)
      for field in dataclasses.fields(EngineStats)
    }
    for name in ("waiting", "running", "pages_total", "pages_used"):
      total[name] = sum(getattr(self._stats[n], name) for n in working)
    total["pages_cached"] = sum(self._stats[n].pages_cached for n in working)
    total["waiting"] += self._dispatcher.num_waiting
    total["failed_replicas"] = len(self._workers) - len(working)
    return EngineStats(**total)

  def snapshot(self) -> list[dict[str, Any]]:
    """What each running sequence keeps, see `Engine.snapshot`."""
    self._ask(lambda engine: engine.snapshot(), self._snapshots)
    return [
      sequence
      for number in self._dispatcher.working
      for sequence in self._snapshots[number]
    ]

  def close(self, timeout_s: float = 5.0) -> bool:
    """Ends the threads; returns whether all have ended in time."""
    for worker in self._workers:
      worker.commands.put(None)
    until = time.monotonic() + timeout_s
    for worker in self._workers:
      worker.thread.join(max(0.0, until - time.monotonic()))
    return not any(worker.thread.is_alive() for worker in self._workers)

  def _check_working(self) -> None:
    if not self._dispatcher.working:
      raise RuntimeError(
        f"all {len(self._workers)} replicas have failed, the last one with "
        f"{self._failure!r}"
      ) from self._failure

  def _assign(self) -> None:
    for replica, request in self._dispatcher.assign():
      self._workers[replica].submit(request)

  def _hear(self, news: "_News") -> list[Event]:
    """Events for callers."""
    replica = news.replica
    heard = []
    for event in news.events:
      name = event.request_id
      if self._dispatcher.is_heard(replica, name):
        heard.append(event)
        if event.finish is not None:
          self._dispatcher.end(replica, name)
    for name in news.gone:
      self._dispatcher.end(replica, name)
    if news.failure is not None:
      self._failure = news.failure
      heard += [
        Event(request_id=name, finish="error")
        for name in self._dispatcher.fail(replica)
      ]
    return heard

  def _ask(self, question: Callable[[Replica], _T], answers: list[_T]) -> None:
    """Updates the answers of the engines that work, and have time for it."""
    working = self._dispatcher.working
    asked = {n: self._workers[n].ask(question) for n in working}
    until = time.monotonic() + _ANSWER_S
    for number, answer in asked.items():
      with contextlib.suppress(Exception):  # It is news, too.
        left = max(0.0, until - time.monotonic())
        answers[number] = answer.result(left)


def split(mesh: Mesh) -> list[Mesh]:
  """The part of each replica: a mesh with one device along `data`."""
  axis = mesh.axis_names.index("data")
  return [
    Mesh(
      mesh.devices.take([number], axis),
      mesh.axis_names,
      axis_types=mesh.axis_types,
    )
    for number in range(mesh.shape["data"])
  ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _News:
  """What a worker reports.

  Attributes:
    replica: Its number.
    events: Of its engine.
    gone: Cancelled requests that the engine has forgotten.
    failure: What the engine raised; nothing follows.
  """

  replica: int
  events: Sequence[Event] = ()
  gone: Sequence[str] = ()
  failure: BaseException | None = None


class _Worker:
  """An engine in a thread.

  Attributes:
    commands: What the thread does between two turns; `None` ends it.
  """

  def __init__(
    self, number: int, engine: Replica, news: "queue.SimpleQueue[_News]"
  ) -> None:
    self._number = number
    self._engine = engine
    self._news = news
    self._cancelled: list[str] = []
    self.commands: queue.SimpleQueue[Callable[[], None] | None] = (
      queue.SimpleQueue()
    )
    self.thread = threading.Thread(
      target=self._run, name=f"replica {number}", daemon=True
    )
    self.thread.start()

  def submit(self, request: Request) -> None:
    def obey() -> None:
      try:
        self._engine.submit(request)
      except (ValueError, QueueFull):
        # It was checked, and there was room.
        _log.exception("replica %d refuses a request", self._number)
        self._report(events=[Event(request_id=request.id, finish="error")])

    self.commands.put(obey)

  def cancel(self, request_id: str) -> None:
    def obey() -> None:
      self._engine.cancel(request_id)
      self._cancelled.append(request_id)

    self.commands.put(obey)

  def ask(
    self, question: Callable[[Replica], _T]
  ) -> "concurrent.futures.Future[_T]":
    answer: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def obey() -> None:
      try:
        answer.set_result(question(self._engine))
      except BaseException as error:
        answer.set_exception(error)
        raise

    self.commands.put(obey)
    return answer

  # What follows runs in the thread.

  def _report(self, **what: Any) -> None:
    self._news.put(_News(replica=self._number, **what))

  def _run(self) -> None:
    try:
      self._take_turns()
    except BaseException as error:
      _log.exception("replica %d has failed", self._number)
      self._report(failure=error)

  def _take_turns(self) -> None:
    while True:
      for command in self._waiting_commands():
        if command is None:
          return
        command()
      events = self._engine.step() if self._engine.has_work() else []
      # After a step the engine knows cancelled requests no longer.
      gone, self._cancelled = self._cancelled, []
      if events or gone:
        self._report(events=events, gone=gone)

  def _waiting_commands(self) -> Iterator[Callable[[], None] | None]:
    """What was asked for; waits for it when there is nothing else to do."""
    with contextlib.suppress(queue.Empty):
      yield self.commands.get(block=not self._engine.has_work())
      while True:
        yield self.commands.get_nowait()


_NOTHING = EngineStats(
  waiting=0,
  running=0,
  pages_total=0,
  pages_used=0,
  pages_cached=0,
  preemptions=0,
  tokens_generated=0,
  compilations=0,
)
