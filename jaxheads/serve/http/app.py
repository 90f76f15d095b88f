"""The server as an ASGI application."""

import asyncio
import contextlib
import importlib.resources
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from jaxheads.serve.http import schema
from jaxheads.serve.http.errors import ApiError, refusal, timeout
from jaxheads.serve.http.formats import ChatFormat, CompletionFormat
from jaxheads.serve.http.generation import Generation
from jaxheads.serve.http.incoming import read_body, unless_gone
from jaxheads.serve.http.metrics import Metrics
from jaxheads.serve.http.requests import engine_requests
from jaxheads.serve.http.served import Limits, Served
from jaxheads.serve.http.streams import Stream, events, whole
from jaxheads.serve.request import QueueFull
from jaxheads.serve.runner import Draining, EngineFailed, Runner

# Everything the page needs is in it.
_PAGE_HEADERS = {
  "content-security-policy": (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
  ),
  "x-content-type-options": "nosniff",
}


class _Api:
  """The handlers and what they share."""

  def __init__(self, runner: Runner, served: Served, limits: Limits) -> None:
    self.runner = runner
    self.served = served
    self.limits = limits
    self.metrics = Metrics()
    self._page = (
      importlib.resources.files("jaxheads.serve.http")
      .joinpath("page.html")
      .read_text("utf-8")
    )

  async def completions(self, request: Request) -> Response:
    """POST /v1/completions."""
    return await self._counted(request, schema.Completion, CompletionFormat)

  async def chat(self, request: Request) -> Response:
    """POST /v1/chat/completions."""
    return await self._counted(request, schema.Chat, ChatFormat)

  async def models(self, request: Request) -> Response:
    """GET /v1/models."""
    del request
    return JSONResponse({"object": "list", "data": [self._model()]})

  async def model(self, request: Request) -> Response:
    """GET /v1/models/NAME."""
    self._check_model(request.path_params["name"])
    return JSONResponse(self._model())

  async def heads(self, request: Request) -> Response:
    """GET /v1/heads: what each head of each running sequence keeps."""
    del request
    sequences, stats = await self.runner.ask(
      lambda engine: (engine.snapshot(), engine.stats())
    )
    return JSONResponse(
      {
        "model": self.served.name,
        **self.served.about,
        "waiting": stats.waiting,
        "running": stats.running,
        "pages_total": stats.pages_total,
        "pages_used": stats.pages_used,
        "pages_cached": stats.pages_cached,
        "sequences": sequences,
      }
    )

  async def health(self, request: Request) -> Response:
    """GET /health."""
    del request
    if self.runner.failure is not None:
      failure = repr(self.runner.failure)
      return JSONResponse({"status": "failed", "error": failure}, 503)
    if self.runner.draining:
      return JSONResponse({"status": "draining"}, 503)
    return JSONResponse({"status": "ok"})

  async def metrics_text(self, request: Request) -> Response:
    """GET /metrics."""
    del request
    # An engine that has failed, or compiles, tells no new numbers; the others
    # still matter.
    with contextlib.suppress(EngineFailed, TimeoutError):
      async with asyncio.timeout(1):
        ask = self.runner.ask(lambda engine: engine.stats())
        self.metrics.stats = await ask
    return Response(
      self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )

  async def page(self, request: Request) -> Response:
    """GET /."""
    del request
    return HTMLResponse(self._page, headers=_PAGE_HEADERS)

  def _model(self) -> dict[str, Any]:
    return {
      "id": self.served.name,
      "object": "model",
      "created": self.served.created,
      "owned_by": "jaxheads",
      "max_model_len": self.served.context,
    }

  def _check_model(self, name: str | None) -> None:
    if name not in (None, self.served.name):
      raise ApiError(
        404,
        f"there is no model {str(name)[:100]!r} here, only "
        f"{self.served.name!r}",
        param="model",
        code="model_not_found",
      )

  def _count(self, outcome: str) -> None:
    self.metrics.requests.labels(outcome).inc()

  async def _counted(
    self,
    request: Request,
    kind: type[schema.Completion] | type[schema.Chat],
    form: type[CompletionFormat] | type[ChatFormat],
  ) -> Response:
    """An answered request, or an error; streams count when they end."""
    try:
      response = await self._answer(request, kind, form)
    except ClientDisconnect:
      self._count("cancelled")
      return Response(status_code=499)  # Nobody reads it.
    except ApiError as error:
      self._count(error.outcome)
      raise
    except Exception:
      self._count("error")
      raise
    if not isinstance(response, Stream):
      self._count("ok")
    return response

  async def _answer(
    self,
    request: Request,
    kind: type[schema.Completion] | type[schema.Chat],
    form: type[CompletionFormat] | type[ChatFormat],
  ) -> Response:
    if self.runner.draining:  # Before the body is waited for.
      raise refusal(Draining(), self.limits)
    asked = schema.parse(kind, await read_body(request, self.limits))
    self._check_model(asked.model)
    requests = await engine_requests(asked, self.served, self.limits)
    deadline = asyncio.get_running_loop().time() + self.limits.seconds
    began = time.monotonic()
    try:
      async with asyncio.timeout_at(deadline):
        answers = await self.runner.submit(requests)
    except (ValueError, QueueFull, Draining, EngineFailed) as error:
      raise refusal(error, self.limits) from error
    except TimeoutError:
      raise timeout(self.limits) from None
    # All answers to a prompt share it.
    lengths = [len(each.prompt) for each in requests[:: asked.n or 1]]
    self.metrics.prompt_tokens.inc(sum(lengths))
    request_ids = [request.id for request in requests]
    stops = asked.stop
    if isinstance(asked, schema.Chat):
      stops = (*stops, schema.CHAT_STOP)
    generation = Generation(
      answers,
      request_ids,
      tokenizer=self.served.tokenizer,
      stops=stops,
      prompt_lengths=lengths,
      clock=self.metrics.clock(len(requests), began),
    )
    format_ = form(
      id=request_ids[0].rpartition("-")[0],
      model=self.served.name,
      tokenizer=self.served.tokenizer,
      logprobs=asked.most_likely is not None,
    )
    if asked.stream:
      options = asked.stream_options
      body = events(
        generation,
        format_,
        len(requests),
        with_usage=bool(options and options.include_usage),
        deadline=deadline,
        limits=self.limits,
        count=self._count,
      )
      return Stream(body, answers, deadline)
    async with answers:
      try:
        async with asyncio.timeout_at(deadline):
          pieces = await unless_gone(request, whole(generation, len(requests)))
      except TimeoutError:
        raise timeout(self.limits) from None
    return JSONResponse(format_.whole(pieces, generation.usage))


async def _api_error(request: Request, error: Exception) -> Response:
  del request
  assert isinstance(error, ApiError)
  return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
  """No such path, or no such method there."""
  assert isinstance(error, HTTPException)
  what = f"{request.method} {request.url.path[:100]}"
  code = error.detail.lower().replace(" ", "_")
  told = ApiError(error.status_code, f"{what}: {error.detail}", code=code)
  response = told.response()
  response.headers.update(error.headers or {})
  return response


async def _engine_failed(request: Request, error: Exception) -> Response:
  del request, error
  return ApiError(500, "the engine has failed", code="engine_failed").response()


async def _unexpected(request: Request, error: Exception) -> Response:
  """Our own defect: the log has the traceback."""
  del request, error
  return ApiError(500, "internal error", code="internal").response()


def create_app(
  runner: Runner, served: Served, limits: Limits | None = None
) -> Starlette:
  """The application.

  Args:
    runner: Started and stopped by the caller.
    served: The model.
    limits: What one request may ask for.
  """
  api = _Api(runner, served, limits or Limits())
  return Starlette(
    routes=[
      Route("/", api.page),
      Route("/health", api.health),
      Route("/metrics", api.metrics_text),
      Route("/v1/models", api.models),
      Route("/v1/models/{name}", api.model),
      Route("/v1/heads", api.heads),
      Route("/v1/completions", api.completions, methods=["POST"]),
      Route("/v1/chat/completions", api.chat, methods=["POST"]),
    ],
    exception_handlers={
      ApiError: _api_error,
      HTTPException: _http_error,
      EngineFailed: _engine_failed,
      Exception: _unexpected,
    },
  )
