"""Answers on their way to the client, piece by piece or as a whole."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxheads.serve.http.errors import ApiError, timeout
from jaxheads.serve.http.formats import Format
from jaxheads.serve.http.generation import Generation, Piece
from jaxheads.serve.http.served import Limits
from jaxheads.serve.runner import Answers

_log = logging.getLogger("jaxheads")


class Stream(StreamingResponse):
  """Server-sent events, which end when the client leaves or time is over.

  A client that does not read holds up nothing but its own response.
  """

  media_type = "text/event-stream"

  def __init__(
    self, events: AsyncGenerator[bytes, None], answers: Answers, deadline: float
  ) -> None:
    super().__init__(
      events, headers={"cache-control": "no-store", "x-accel-buffering": "no"}
    )
    self._events = events
    self._answers = answers
    # The last words at the deadline have a second to get through.
    self._deadline = deadline + 1

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    try:
      async with self._answers, asyncio.timeout_at(self._deadline):
        await super().__call__(scope, receive, send)
    except TimeoutError:
      _log.warning("a client did not read its stream in time")
    finally:
      await self._events.aclose()


async def events(
  generation: Generation,
  format_: Format,
  answers: int,
  *,
  with_usage: bool,
  deadline: float,
  limits: Limits,
  count: Callable[[str], None],
) -> AsyncGenerator[bytes, None]:
  """The body of a stream.

  Args:
    generation: The answers.
    format_: How they are told.
    answers: How many there are.
    with_usage: Whether the usage is told at the end.
    deadline: When it must be over, by the event loop's clock.
    limits: Those that set the deadline.
    count: Told the outcome.
  """
  outcome = "cancelled"
  try:
    for index in range(answers):
      opening = format_.opening(index)
      if opening is not None:
        yield _event(opening)
    pieces = generation.pieces()
    while True:
      # Only waiting for the engine: `yield` must not be under a timeout.
      async with asyncio.timeout_at(deadline):
        news = await anext(pieces, None)
      if news is None:
        break
      for index, piece in news.items():
        if piece.text or piece.tokens or piece.finish:
          yield _event(format_.chunk(index, piece))
    if with_usage:
      yield _event(format_.closing(generation.usage))
    outcome = "ok"
    yield b"data: [DONE]\n\n"
  except TimeoutError:
    outcome = "timeout"
    yield _event(timeout(limits).body)
  except ApiError as error:
    outcome = error.outcome
    yield _event(error.body)
  finally:
    late = asyncio.get_running_loop().time() >= deadline
    count("timeout" if outcome == "cancelled" and late else outcome)


async def whole(generation: Generation, answers: int) -> dict[int, Piece]:
  """All pieces of each answer as one."""
  joined = {index: Piece() for index in range(answers)}
  async for pieces in generation.pieces():
    for index, piece in pieces.items():
      joined[index].text += piece.text
      joined[index].tokens += piece.tokens
      joined[index].finish = piece.finish
  return joined


def _event(value: dict[str, Any]) -> bytes:
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
  return f"data: {text}\n\n".encode()
