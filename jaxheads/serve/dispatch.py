"""Which replica serves which request: pure Python, the same every time."""

import collections
import dataclasses

from jaxheads.serve.request import QueueFull, Request


@dataclasses.dataclass(slots=True)
class _Entry:
  """A request that has not ended.

  Attributes:
    replica: Who holds it; `None` while it waits.
    cancelled: Whether nobody wants to hear of it any more.
  """

  replica: int | None = None
  cancelled: bool = False


class Dispatcher:
  """First come, first served, by the replica that holds fewest requests.

  A request that no replica has room for waits here, so that one which fails
  takes none of those with it. Not safe for use by several threads at once.

  Args:
    replicas: How many there are; they are numbered.
    capacity: Requests that each holds at most.
    max_waiting: Requests that wait at most.
  """

  def __init__(self, replicas: int, *, capacity: int, max_waiting: int) -> None:
    self._loads = [0] * replicas
    self._capacity = capacity
    self._max_waiting = max_waiting
    self._failed: set[int] = set()
    self._entries: dict[str, _Entry] = {}
    self._queue: collections.deque[Request] = collections.deque()

  @property
  def num_waiting(self) -> int:
    """Requests that no replica holds."""
    return len(self._queue)

  @property
  def is_idle(self) -> bool:
    """Whether no request is here or with a replica."""
    return not self._entries

  @property
  def working(self) -> list[int]:
    """Replicas that have not failed."""
    return [n for n in range(len(self._loads)) if n not in self._failed]

  def add(self, request: Request) -> None:
    """Puts a request at the end of the queue.

    Raises:
      ValueError: Its id is in use.
      QueueFull: `max_waiting` requests wait already.
    """
    if request.id in self._entries:
      raise ValueError(f"`id` must be unique, {request.id!r} is in use.")
    if self.num_waiting >= self._max_waiting:
      raise QueueFull(f"{self.num_waiting} requests are waiting.")
    self._entries[request.id] = _Entry()
    self._queue.append(request)

  def assign(self) -> list[tuple[int, Request]]:
    """Takes from the queue what replicas have room for: (replica, request)."""
    given = []
    while self._queue:
      free = [n for n in self.working if self._loads[n] < self._capacity]
      if not free:
        break
      replica = min(free, key=lambda n: self._loads[n])
      request = self._queue.popleft()
      self._entries[request.id].replica = replica
      self._loads[replica] += 1
      given.append((replica, request))
    return given

  def cancel(self, request_id: str) -> tuple[bool, int | None]:
    """Ends a request for its caller.

    Returns:
      Whether it had not ended, and the replica that must be told. That one
      holds it until `end`.
    """
    entry = self._entries.get(request_id)
    if entry is None or entry.cancelled:
      return False, None
    if entry.replica is None:
      self._queue = collections.deque(
        request for request in self._queue if request.id != request_id
      )
      del self._entries[request_id]
      return True, None
    entry.cancelled = True
    return True, entry.replica

  def is_heard(self, replica: int, request_id: str) -> bool:
    """Whether what a replica says of a request is told to its caller."""
    entry = self._entries.get(request_id)
    return (
      entry is not None and entry.replica == replica and not entry.cancelled
    )

  def end(self, replica: int, request_id: str) -> None:
    """A replica holds a request no longer; nothing happens if it did not."""
    entry = self._entries.get(request_id)
    if entry is not None and entry.replica == replica:
      del self._entries[request_id]
      self._loads[replica] -= 1

  def fail(self, replica: int) -> list[str]:
    """A replica is no more; returns whose requests are lost with it."""
    self._failed.add(replica)
    held = {
      name: entry
      for name, entry in self._entries.items()
      if entry.replica == replica
    }
    for name in held:
      self.end(replica, name)
    return [name for name, entry in held.items() if not entry.cancelled]
