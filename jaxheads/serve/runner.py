"""The engine in a thread of its own, and its asynchronous front."""

import asyncio
import collections
import concurrent.futures
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from jaxheads.serve.engine import EngineStats
from jaxheads.serve.request import Event, FinishReason, QueueFull, Request

_T = TypeVar("_T")
# Events that wait for a reader before it is given up, and what it gets at once:
# so that one reader neither fills the memory nor keeps the others waiting.
_MOST_WAITING = 8192
_MOST_AT_ONCE = 64
_log = logging.getLogger("jaxheads")


class AnyEngine(Protocol):
  """What the runner asks of an engine; all of it from one thread."""

  def submit(self, request: Request) -> None:
    """Takes a request; `ValueError` if it cannot, `QueueFull` if not now."""

  def kept_fraction(self, request: Request) -> float:
    """Share of the prompt's tokens that heads keep."""

  def cancel(self, request_id: str) -> None:
    """Ends a request early."""

  def step(self) -> list[Event]:
    """One turn; may return nothing."""

  def has_work(self) -> bool:
    """Whether another turn would do anything."""

  def stats(self) -> EngineStats: ...

  def snapshot(self) -> list[dict[str, Any]]:
    """What each running sequence keeps, by layer and head."""


class Draining(RuntimeError):
  """The runner is about to stop and takes no more requests."""


class SlowReader(RuntimeError):
  """Too much had come before the reader asked for it."""


class EngineFailed(RuntimeError):
  """The engine raised an exception; the message says which."""


class Answers:
  """What happens to the requests of one `Runner.submit`, as it happens.

  An asynchronous iterator over what came since it was last asked: non-empty
  lists of (time in seconds, event). It ends when every request has. A reader
  that is slow gets longer lists: nothing waits for it, and when it lags too far
  behind, its requests are cancelled and it gets a `SlowReader`.

  As a context manager it cancels, at its end, what still runs.

  Attributes:
    kept_fractions: Shares of the prompts' tokens that heads keep: the effective
      budgets, in the order of the requests.
  """

  def __init__(self, runner: "Runner", request_ids: Sequence[str]) -> None:
    self._runner = runner
    self._open = set(request_ids)
    self._arrived: collections.deque[tuple[float, Event]] = collections.deque()
    self._news = asyncio.Event()
    self._lost = False
    self.kept_fractions: tuple[float, ...] = ()

  def cancel(self, *request_ids: str) -> None:
    """Ends some of the requests, by default all; they report nothing more."""
    ended = self._open.intersection(request_ids or tuple(self._open))
    if ended:
      self._open -= ended
      self._runner._cancel(self, ended)
      self._news.set()

  def __aiter__(self) -> "Answers":
    return self

  async def __anext__(self) -> list[tuple[float, Event]]:
    while not self._arrived:
      if not self._open:
        raise StopAsyncIteration
      self._news.clear()
      await self._news.wait()
    await asyncio.sleep(0)  # Others may have less to read.
    if self._lost:
      raise SlowReader
    most = min(len(self._arrived), _MOST_AT_ONCE)
    return [self._arrived.popleft() for _ in range(most)]

  async def __aenter__(self) -> "Answers":
    return self

  async def __aexit__(self, *_: object) -> None:
    self.cancel()

  def _deliver(self, stamp: float, event: Event) -> None:
    if event.request_id not in self._open:
      return  # Cancelled while this was under way.
    if len(self._arrived) >= _MOST_WAITING:
      self._lost = True
      self.cancel()
      return
    self._arrived.append((stamp, event))
    if event.finish is not None:
      self._open.discard(event.request_id)
      if not self._open:
        self._runner._ended(self)
    self._news.set()

  def _abandon(self) -> None:
    """Ends the requests when the engine can no longer say so."""
    for request_id in tuple(self._open):
      self._deliver(
        time.monotonic(), Event(request_id=request_id, finish="cancelled")
      )


class Runner:
  """Runs an engine in a thread; its methods belong to one event loop.

  An exception in the engine ends every request with an "error" event and every
  later one with `EngineFailed`; nobody waits for ever.

  Args:
    engine: Used by the runner's thread alone from `start` on.

  Attributes:
    failure: What the engine raised, if it did.
    draining: Whether `close` has been called.
  """

  def __init__(self, engine: AnyEngine) -> None:
    self.failure: BaseException | None = None
    self.draining = False
    self._engine = engine
    self._commands: queue.SimpleQueue[Callable[[], None] | None] = (
      queue.SimpleQueue()
    )
    self._thread = threading.Thread(
      target=self._run, name="engine", daemon=True
    )
    # Of the thread: who asked for what runs.
    self._owners: dict[str, Answers] = {}
    # Why nothing is asked of the engine any more.
    self._over: str | None = None
    # Of the event loop.
    self._active: set[Answers] = set()
    self._idle = asyncio.Event()
    self._idle.set()
    self._loop: asyncio.AbstractEventLoop

  def start(self) -> None:
    """Starts the thread; called from the event loop."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  async def submit(self, requests: Sequence[Request]) -> Answers:
    """Hands the engine all of `requests`, or none.

    Raises:
      ValueError: The engine cannot take one of them.
      QueueFull: It cannot take all of them now.
      Draining: The runner is about to stop.
      EngineFailed: The engine has failed.
    """
    if self.draining:
      raise Draining("the server is about to stop")
    answers = Answers(self, [request.id for request in requests])
    self._active.add(answers)
    self._idle.clear()
    try:
      await self.ask(lambda engine: self._admit(engine, requests, answers))
    except BaseException:
      # Also if nobody waits any more and the engine has taken them meanwhile.
      answers.cancel()
      raise
    return answers

  async def ask(self, question: Callable[[AnyEngine], _T]) -> _T:
    """What `question` returns of the engine, between two turns.

    Raises:
      EngineFailed: The engine has failed, or the runner has stopped.
    """
    answer: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def obey() -> None:
      if not answer.set_running_or_notify_cancel():
        return
      try:
        if self._over is not None:
          raise EngineFailed(self._over)
        answer.set_result(question(self._engine))
      except (ValueError, QueueFull, EngineFailed) as refusal:
        answer.set_exception(refusal)
      except BaseException as error:
        answer.set_exception(EngineFailed(_failed(error)))
        raise

    self._commands.put(obey)
    if not self._thread.is_alive():
      self._refuse_rest()
    return await asyncio.wrap_future(answer)

  async def close(self, *, grace_s: float, stop_s: float = 5.0) -> bool:
    """Takes nothing more, finishes what runs, then ends the thread.

    Args:
      grace_s: What is not finished after so many seconds is cancelled.
      stop_s: So long the engine may take for the turn that it is in.
    Returns:
      Whether the thread has ended.
    """
    self.draining = True
    with contextlib.suppress(TimeoutError):
      async with asyncio.timeout(grace_s):
        await self._idle.wait()
    self._commands.put(None)
    await asyncio.to_thread(self._thread.join, stop_s)
    stopped = not self._thread.is_alive()
    if stopped:
      self._refuse_rest()
    for answers in list(self._active):  # The thread is stuck in a turn.
      answers._abandon()
    return stopped

  def _refuse_rest(self) -> None:
    """Answers what was asked when the thread had ended."""
    with contextlib.suppress(queue.Empty):
      while True:
        command = self._commands.get_nowait()
        if command is not None:
          command()

  # Called by `Answers`, in the event loop.

  def _cancel(self, answers: Answers, request_ids: set[str]) -> None:
    if not answers._open:
      self._ended(answers)

    def obey() -> None:
      for request_id in request_ids:
        # Not the engine's any more, or never taken.
        owned = self._owners.pop(request_id, None) is not None
        if owned and self._over is None:
          self._engine.cancel(request_id)

    self._commands.put(obey)

  def _ended(self, answers: Answers) -> None:
    self._active.discard(answers)
    if not self._active:
      self._idle.set()

  # What follows runs in the thread.

  def _run(self) -> None:
    try:
      self._take_turns()
    except BaseException as error:
      _log.exception("the engine has failed")
      self.failure = error
      self._over = _failed(error)
      self._end_all("error")
      while (command := self._commands.get()) is not None:
        command()  # Refuses.
    else:
      self._over = "the engine has stopped"
      self._end_all("cancelled")

  def _take_turns(self) -> None:
    while True:
      for command in self._waiting_commands():
        if command is None:
          return
        command()
      if self._engine.has_work():
        self._tell(self._engine.step())

  def _end_all(self, finish: FinishReason) -> None:
    self._tell([Event(request_id=name, finish=finish) for name in self._owners])

  def _waiting_commands(self) -> Iterator[Callable[[], None] | None]:
    """What was asked for; waits for it when there is nothing else to do."""
    with contextlib.suppress(queue.Empty):
      yield self._commands.get(block=not self._engine.has_work())
      while True:
        yield self._commands.get_nowait()

  def _admit(
    self, engine: AnyEngine, requests: Sequence[Request], answers: Answers
  ) -> None:
    taken = []
    try:
      for request in requests:
        engine.submit(request)
        taken.append(request.id)
    except (ValueError, QueueFull):
      for request_id in taken:
        engine.cancel(request_id)
      raise
    answers.kept_fractions = tuple(map(engine.kept_fraction, requests))
    self._owners.update(dict.fromkeys(taken, answers))

  def _tell(self, events: Sequence[Event]) -> None:
    stamp = time.monotonic()
    told = []
    for event in events:
      owner = self._owners.get(event.request_id)
      if owner is not None:  # Else it was cancelled.
        told.append((owner, event))
        if event.finish is not None:
          del self._owners[event.request_id]
    if told and not self._loop.is_closed():
      self._loop.call_soon_threadsafe(_deliver, stamp, told)


def _failed(error: BaseException) -> str:
  return f"the engine has failed: {error!r}"


def _deliver(stamp: float, told: list[tuple[Answers, Event]]) -> None:
  for owner, event in told:
    owner._deliver(stamp, event)
