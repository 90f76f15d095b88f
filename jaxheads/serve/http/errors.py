"""Errors in the shape that clients of the OpenAI schema expect."""

from typing import Any

from starlette.responses import JSONResponse

from jaxheads.serve.http.served import Limits
from jaxheads.serve.request import QueueFull
from jaxheads.serve.runner import Draining, EngineFailed


class ApiError(Exception):
  """An answer that is no answer.

  Args:
    status: HTTP status, 4xx or 5xx.
    message: What was wrong, and what would be right.
    param: The field that it is about.
    code: A name that programs compare.
    retry_s: When to try again.
  """

  def __init__(
    self,
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_s: int | None = None,
  ) -> None:
    super().__init__(message)
    self.status = status
    self.message = message
    self.param = param
    self.code = code
    self.retry_s = retry_s

  @property
  def outcome(self) -> str:
    """What it is counted as."""
    other = "error" if self.status >= 500 else "invalid"
    outcomes = {408: "timeout", 429: "busy", 503: "draining", 504: "timeout"}
    return outcomes.get(self.status, other)

  @property
  def body(self) -> dict[str, Any]:
    """The JSON object."""
    kinds = {404: "not_found_error", 429: "rate_limit_error"}
    kind = "server_error" if self.status >= 500 else "invalid_request_error"
    return {
      "error": {
        "message": self.message,
        "type": kinds.get(self.status, kind),
        "param": self.param,
        "code": self.code,
      }
    }

  def response(self) -> JSONResponse:
    headers = {}
    if self.status in (408, 413):
      headers["connection"] = "close"  # Not to read what is still to come.
    if self.retry_s is not None:
      headers["retry-after"] = str(self.retry_s)
    return JSONResponse(self.body, self.status, headers)


def timeout(limits: Limits) -> ApiError:
  """There was no time for the whole answer."""
  return ApiError(
    504,
    f"the answer took longer than {limits.seconds:g} seconds",
    code="timeout",
  )


def refusal(error: Exception, limits: Limits) -> ApiError:
  """What the engine's refusal is to a client."""
  if isinstance(error, QueueFull):
    return ApiError(
      429,
      "too many requests wait; try again later",
      code="queue_full",
      retry_s=limits.retry_s,
    )
  if isinstance(error, Draining):
    return ApiError(
      503, "the server is about to stop", code="draining", retry_s=5
    )
  if isinstance(error, EngineFailed):
    return ApiError(500, "the engine has failed", code="engine_failed")
  message = str(error)
  named = message.split("`")[1] if message.count("`") >= 2 else None
  return ApiError(400, message, param=named, code="invalid_value")
