"""Errors in the shape that clients of the OpenAI schema expect."""

from typing import Any

from starlette.responses import JSONResponse


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
