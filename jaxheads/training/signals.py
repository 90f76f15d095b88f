"""SIGTERM and Ctrl-C as a polite request: finish the step, save, stop."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class StopRequest:
  """Set by the first SIGTERM or Ctrl-C.

  Attributes:
    name: "SIGTERM" or "SIGINT" once asked to stop, else None.
  """

  def __init__(self) -> None:
    self.name: str | None = None

  def __bool__(self) -> bool:
    return self.name is not None

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    # A second SIGTERM changes nothing: the save under way ends by itself. A
    # second Ctrl-C is a person who does not want to wait; a save cut short
    # leaves the earlier ones intact.
    if self.name is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.name = self.name or signal.Signals(number).name


def exit_on_sigterm() -> None:
  """For scripts: outside the training loop there is nothing to save."""

  def leave(number: int, frame: FrameType | None) -> None:
    del number, frame
    print("SIGTERM: nothing left to save", flush=True)
    sys.exit(0)

  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
  """Within it, SIGTERM and Ctrl-C only set the request.

  Outside the main thread, where Python cannot install handlers, signals keep
  their meaning.
  """
  request = StopRequest()
  if threading.current_thread() is not threading.main_thread():
    yield request
    return
  numbers = (signal.SIGTERM, signal.SIGINT)
  before = {
    number: signal.signal(number, request._handle) for number in numbers
  }
  try:
    yield request
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
