"""Bodies of requests: the OpenAI schema, as much of it as there is here.

Fields are checked for their type here and for their range where they are used.
What is not known is refused, and so is what OpenAI knows and this server does
not do, unless it asks for nothing.
"""

import secrets
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic_core import ErrorDetails, PydanticCustomError

from jaxheads.serve.http.errors import ApiError
from jaxheads.serve.request import SamplingParams

MOST_ANSWERS = 128
MOST_STOP_STRINGS = 4
MOST_STOP_CHARACTERS = 256

Prompt = str | tuple[int, ...]

_SAMPLING = (
  "temperature",
  "top_k",
  "top_p",
  "min_p",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
)


def _wrong(message: str) -> PydanticCustomError:
  # Braces would be read as places to fill in.
  return PydanticCustomError("wrong", "{message}", {"message": message})


def _is_token(value: Any) -> bool:
  return type(value) is int


def _prompts(value: Any) -> tuple[Prompt, ...]:
  if isinstance(value, str):
    return (value,)
  if isinstance(value, list) and value:
    if all(isinstance(item, str) for item in value):
      return tuple(value)
    if all(map(_is_token, value)):
      return (tuple(value),)
    if all(
      isinstance(item, list) and item and all(map(_is_token, item))
      for item in value
    ):
      return tuple(map(tuple, value))
  raise _wrong(
    "must be a string, a list of strings, a list of token ids or a list of "
    "lists of them, none of them empty"
  )


def _stops(value: Any) -> tuple[str, ...]:
  if value is None:
    return ()
  stops = [value] if isinstance(value, str) else value
  if (
    not isinstance(stops, list)
    or len(stops) > MOST_STOP_STRINGS
    or not all(
      isinstance(stop, str) and 1 <= len(stop) <= MOST_STOP_CHARACTERS
      for stop in stops
    )
  ):
    raise _wrong(
      f"must be a string or at most {MOST_STOP_STRINGS} strings, of 1 to "
      f"{MOST_STOP_CHARACTERS} characters each"
    )
  return tuple(stops)


def _content(value: Any) -> str:
  if isinstance(value, str):
    return value
  if isinstance(value, list) and all(
    isinstance(part, dict)
    and part.keys() == {"type", "text"}
    and part["type"] == "text"
    and isinstance(part["text"], str)
    for part in value
  ):
    return "".join(part["text"] for part in value)
  raise _wrong('must be a string or a list of {"type": "text", "text": ...}')


def _only(*neutral: Any) -> Any:
  """The type of a field that may only ask for what happens anyway."""

  def check(value: Any) -> None:
    if value is not None and value not in neutral:
      raise _wrong("is not supported by this server")

  return Annotated[Any, pydantic.BeforeValidator(check)]


# Far from what float32 cannot hold.
_Moderate = Annotated[float, pydantic.Field(ge=-1e6, le=1e6)]


class _Model(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(
    allow_inf_nan=False, extra="forbid", frozen=True, strict=True
  )


class StreamOptions(_Model):
  """How a streamed answer is told."""

  include_usage: bool | None = None


class _Generation(_Model):
  """What both kinds of request share."""

  model: str | None = None
  n: Annotated[int, pydantic.Field(ge=1, le=MOST_ANSWERS)] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None
  stop: Annotated[tuple[str, ...], pydantic.BeforeValidator(_stops)] = ()
  max_tokens: int | None = None
  seed: int | None = None
  temperature: _Moderate | None = None
  top_p: float | None = None
  presence_penalty: _Moderate | None = None
  frequency_penalty: _Moderate | None = None
  user: str | None = None  # Read by nobody.
  logit_bias: _only({}) = None  # type: ignore[valid-type]
  # Beyond OpenAI; the names are vLLM's, except `budget`.
  top_k: Annotated[int, pydantic.Field(lt=2**31)] | None = None
  min_p: float | None = None
  repetition_penalty: _Moderate | None = None
  budget: float | None = None

  @pydantic.model_validator(mode="after")
  def _check(self) -> "_Generation":
    if self.stream_options is not None and not self.stream:
      raise _wrong("`stream_options` needs `stream` to be true")
    return self

  @property
  def most_likely(self) -> int | None:
    """Of how many tokens log-probabilities are told; None tells none."""
    raise NotImplementedError

  @property
  def limit(self) -> int | None:
    """Tokens to generate at most, if said."""
    return self.max_tokens

  def sampling(
    self, *, max_tokens: int, stop_tokens: tuple[int, ...]
  ) -> list[SamplingParams]:
    """How each of the `n` answers is drawn: with seeds that count up.

    Raises:
      ApiError: A number is out of range.
    """
    seed = secrets.randbits(62) if self.seed is None else self.seed
    given = {
      name: value
      for name in _SAMPLING
      if (value := getattr(self, name)) is not None
    }
    try:
      return [
        SamplingParams(
          **given,
          max_tokens=max_tokens,
          seed=seed + choice,
          stop_tokens=stop_tokens,
          logprobs=self.most_likely,
        )
        for choice in range(self.n or 1)
      ]
    except ValueError as error:
      message = str(error)
      raise ApiError(
        400,
        message,
        param=message.split("`")[1],
        code="out_of_range",
      ) from error


class Completion(_Generation):
  """Body of /v1/completions."""

  prompt: Annotated[tuple[Prompt, ...], pydantic.BeforeValidator(_prompts)]
  logprobs: int | None = None
  echo: _only(False) = None  # type: ignore[valid-type]
  suffix: _only("") = None  # type: ignore[valid-type]
  best_of: _only(1) = None  # type: ignore[valid-type]

  @property
  def most_likely(self) -> int | None:
    return self.logprobs


class Message(_Model):
  """One turn of a chat."""

  role: Literal["system", "developer", "user", "assistant"]
  content: Annotated[str, pydantic.BeforeValidator(_content)]


class Chat(_Generation):
  """Body of /v1/chat/completions."""

  messages: Annotated[list[Message], pydantic.Field(min_length=1)]
  max_completion_tokens: int | None = None
  logprobs: bool | None = None
  top_logprobs: int | None = None
  tools: _only([]) = None  # type: ignore[valid-type]
  tool_choice: _only("none") = None  # type: ignore[valid-type]
  response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]

  @property
  def most_likely(self) -> int | None:
    return (self.top_logprobs or 0) if self.logprobs else None

  @property
  def limit(self) -> int | None:
    if self.max_completion_tokens is not None:
      return self.max_completion_tokens
    return self.max_tokens

  @property
  def prompt(self) -> tuple[Prompt, ...]:
    return (chat_prompt(self.messages),)


# A model that has read transcripts would go on with the user's next line.
CHAT_STOP = "\nuser:"


def chat_prompt(messages: Iterable[Message]) -> str:
  r"""The messages as a transcript, up to where the assistant's answer begins.

  >>> chat_prompt([Message(role="user", content="Hello!")])
  'user: Hello!\nassistant:'
  """
  lines = (f"{message.role}: {message.content}\n" for message in messages)
  return f"{''.join(lines)}assistant:"


_G = TypeVar("_G", bound=_Generation)


def parse(kind: type[_G], body: bytes) -> _G:
  """The request in `body`.

  Raises:
    ApiError: It is not UTF-8 or not JSON, or a field is unknown, missing or of
      another type; the error names it.
  """
  try:
    return kind.model_validate_json(body)
  except pydantic.ValidationError as error:
    raise _told(error.errors(include_url=False)[0]) from None


def _told(error: ErrorDetails) -> ApiError:
  """The first thing wrong, for people."""
  param = ""
  for part in error["loc"]:
    param += f"[{part}]" if isinstance(part, int) else f".{part}"
  param = param.removeprefix(".")[:100]
  kind, message = error["type"], error["msg"]
  if kind == "json_invalid":
    return ApiError(
      400, f"the body is not JSON in UTF-8: {message}", code="invalid_json"
    )
  if kind == "extra_forbidden":
    return ApiError(
      400, f"unknown field `{param}`", param=param, code="unknown_field"
    )
  if kind == "missing":
    return ApiError(
      400, f"`{param}` is missing", param=param, code="missing_field"
    )
  if kind == "wrong":
    message = f"`{param}` {message}" if param else message
  elif param:
    message = f"`{param}`: {message}"
  return ApiError(400, message, param=param or None, code="invalid_value")
