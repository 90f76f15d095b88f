"""The server as an ASGI application."""

import asyncio
import contextlib
import dataclasses
import importlib.resources
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.responses import StreamingResponse as _StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxheads.data import Tokenizer
from jaxheads.serve import request as engine_request
from jaxheads.serve.http import schema
from jaxheads.serve.http.errors import ApiError
from jaxheads.serve.http.formats import ChatFormat, CompletionFormat, Format
from jaxheads.serve.http.generation import Generation, Piece
from jaxheads.serve.http.metrics import Metrics
from jaxheads.serve.request import QueueFull
from jaxheads.serve.runner import Answers, Draining, EngineFailed, Runner

_T = TypeVar("_T")
_log = logging.getLogger("jaxheads")

# Everything the page needs is in it.
_PAGE_HEADERS = {
  "content-security-policy": (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
  ),
  "x-content-type-options": "nosniff",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What one request may ask of the server.

  Attributes:
    body_bytes: Size of its body.
    body_s: Seconds that it may take to send it.
    answers: Answers of one response: prompts times `n`.
    seconds: Seconds from there to the end of the response.
    retry_s: What a client is told to wait when the queue is full.
  """

  body_bytes: int = 1 << 20
  body_s: float = 30.0
  answers: int = 32
  seconds: float = 600.0
  retry_s: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """What is served.

  Attributes:
    name: The model's, as clients call it.
    tokenizer: Text to tokens and back.
    context: Tokens that prompt and answer may have together.
    created: When it was trained, in seconds since 1970.
    about: What /v1/heads says of the cache besides: policy, budget and so on.
  """

  name: str
  tokenizer: Tokenizer
  context: int
  created: int = 0
  about: dict[str, Any] = dataclasses.field(default_factory=dict)


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
    # A failed engine has no numbers; the others still matter.
    with contextlib.suppress(EngineFailed):
      self.metrics.stats = await self.runner.ask(lambda engine: engine.stats())
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
      self._count(_outcome(error))
      raise
    except Exception:
      self._count("error")
      raise
    if not isinstance(response, _Stream):
      self._count("ok")
    return response

  async def _answer(
    self,
    request: Request,
    kind: type[schema.Completion] | type[schema.Chat],
    form: type[CompletionFormat] | type[ChatFormat],
  ) -> Response:
    if self.runner.draining:  # Before the body is waited for.
      raise _refusal(Draining(), self.limits)
    asked = schema.parse(kind, await _body(request, self.limits))
    self._check_model(asked.model)
    requests = await self._requests(asked)
    deadline = asyncio.get_running_loop().time() + self.limits.seconds
    began = time.monotonic()
    try:
      async with asyncio.timeout_at(deadline):
        answers = await self.runner.submit(requests)
    except (ValueError, QueueFull, Draining, EngineFailed) as error:
      raise _refusal(error, self.limits) from error
    except TimeoutError:
      raise _timeout(self.limits) from None
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
      events = _events(
        generation,
        format_,
        len(requests),
        with_usage=bool(options and options.include_usage),
        deadline=deadline,
        limits=self.limits,
        count=self._count,
      )
      return _Stream(events, answers, deadline)
    async with answers:
      try:
        async with asyncio.timeout_at(deadline):
          pieces = await _unless_gone(
            request, _whole(generation, len(requests))
          )
      except TimeoutError:
        raise _timeout(self.limits) from None
    return JSONResponse(format_.whole(pieces, generation.usage))

  async def _requests(
    self, asked: schema.Completion | schema.Chat
  ) -> list[engine_request.Request]:
    """What the engine is asked for: `n` times each prompt, one by one.

    Raises:
      ApiError: Too much is asked for, or what no engine could do.
    """
    answers = len(asked.prompt) * (asked.n or 1)
    if answers > self.limits.answers:
      raise ApiError(
        400,
        f"prompts times `n` must be at most {self.limits.answers}, got "
        f"{answers}",
        param="n",
        code="out_of_range",
      )
    # Not in the event loop: a long text may take a tokenizer a while.
    prompts = await asyncio.to_thread(
      lambda: [self._tokens(prompt) for prompt in asked.prompt]
    )
    prefix = "chatcmpl" if isinstance(asked, schema.Chat) else "cmpl"
    name = f"{prefix}-{uuid.uuid4().hex}"
    eot = self.served.tokenizer.eot
    requests: list[engine_request.Request] = []
    for prompt in prompts:
      sampling = asked.sampling(
        max_tokens=self._max_tokens(asked, len(prompt)),
        stop_tokens=() if eot is None else (eot,),
      )
      for params in sampling:
        requests.append(
          engine_request.Request(
            id=f"{name}-{len(requests)}",
            prompt=prompt,
            params=params,
            budget=asked.budget,
          )
        )
    return requests

  def _tokens(self, prompt: schema.Prompt) -> tuple[int, ...]:
    tokenizer = self.served.tokenizer
    if not isinstance(prompt, str):
      wrong = [
        token for token in prompt if not 0 <= token < tokenizer.vocab_size
      ]
      if wrong:
        raise ApiError(
          400,
          f"`prompt` must be of tokens in [0, {tokenizer.vocab_size}), got "
          f"{str(wrong[0])[:30]}",
          param="prompt",
          code="out_of_range",
        )
      return prompt
    tokens = tuple(tokenizer.encode(prompt).tolist())
    if not tokens:
      if tokenizer.eot is None:
        raise ApiError(
          400,
          "`prompt` must not be empty with this tokenizer",
          param="prompt",
          code="invalid_value",
        )
      return (tokenizer.eot,)  # The start of a new document.
    return tokens

  def _max_tokens(
    self, asked: schema.Completion | schema.Chat, prompt_length: int
  ) -> int:
    room = self.served.context - prompt_length
    if room < 1 or (asked.limit is not None and asked.limit > room):
      param = "messages" if isinstance(asked, schema.Chat) else "prompt"
      wanted = "" if asked.limit is None else f" and {asked.limit} to generate"
      raise ApiError(
        400,
        f"the model's context is {self.served.context} tokens; the prompt has "
        f"{prompt_length}{wanted}",
        param=param,
        code="context_length_exceeded",
      )
    if asked.limit is not None:
      return asked.limit
    return room if isinstance(asked, schema.Chat) else min(16, room)


class _Stream(_StreamingResponse):
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


async def _events(
  generation: Generation,
  format_: Format,
  answers: int,
  *,
  with_usage: bool,
  deadline: float,
  limits: Limits,
  count: Callable[[str], None],
) -> AsyncGenerator[bytes, None]:
  """The body of a stream."""
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
    yield _event(_timeout(limits).body)
  except ApiError as error:
    outcome = _outcome(error)
    yield _event(error.body)
  finally:
    late = asyncio.get_running_loop().time() >= deadline
    count("timeout" if outcome == "cancelled" and late else outcome)


async def _whole(generation: Generation, answers: int) -> dict[int, Piece]:
  """All pieces of each answer as one."""
  whole = {index: Piece() for index in range(answers)}
  async for pieces in generation.pieces():
    for index, piece in pieces.items():
      whole[index].text += piece.text
      whole[index].tokens += piece.tokens
      whole[index].finish = piece.finish
  return whole


def _event(value: dict[str, Any]) -> bytes:
  text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
  return f"data: {text}\n\n".encode()


async def _body(request: Request, limits: Limits) -> bytes:
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


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T:
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


def _timeout(limits: Limits) -> ApiError:
  return ApiError(
    504,
    f"the answer took longer than {limits.seconds:g} seconds",
    code="timeout",
  )


def _refusal(error: Exception, limits: Limits) -> ApiError:
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


def _outcome(error: ApiError) -> str:
  outcomes = {408: "timeout", 429: "busy", 503: "draining", 504: "timeout"}
  return outcomes.get(
    error.status, "error" if error.status >= 500 else "invalid"
  )


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
