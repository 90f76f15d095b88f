"""From the client: its body, and whether it is still there."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect, Request

from jaxheads.serve.http.errors import ApiError
from jaxheads.serve.http.served import Limits

_T = TypeVar("_T")


async def read_body(request: Request, limits: Limits) -> bytes:
  """The request's body.

  Raises:
    ApiError: It is too large, or takes too long.
    ClientDisconnect: The client left.
  """
  too_large = ApiError(
    413,
    f"the body is larger than {limits.body_bytes:,} bytes",
    code="body_too_large",
  )
  try:
    length = int(request.headers.get("content-length", 0))
  except ValueError:
    length = 0
  if length > limits.body_bytes and "expect" in request.headers:
    raise too_large
  body = bytearray()
  size = 0
  try:
    async with asyncio.timeout(limits.body_s):
      async for chunk in request.stream():
        size += len(chunk)
        # Clients that send without asking only read the answer afterwards, so
        # some of what is too much is thrown away before it.
        if size > 16 * limits.body_bytes:
          break
        if size <= limits.body_bytes:
          body += chunk
  except TimeoutError:
    raise ApiError(
      408,
      f"the body did not come within {limits.body_s:g} seconds",
      code="body_too_slow",
    ) from None
  if size > limits.body_bytes:
    raise too_large
  return bytes(body)


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
  """What `work` returns; `ClientDisconnect` if the client leaves before."""

  async def gone() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
  try:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    if not tasks[0].done():
      raise ClientDisconnect
    return tasks[0].result()
  finally:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
