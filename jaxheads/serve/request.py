"""What goes into the engine and what comes out of it."""

import dataclasses
import numbers
from collections.abc import Collection
from typing import Any, Literal

MOST_LOGPROBS = 20
# Far beyond any use, and far from what float32 logits cannot bear.
_LARGEST = 1e6

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How tokens are drawn.

  Attributes:
    max_tokens: Tokens to generate at most.
    temperature: Divides the logits; 0 always takes the likeliest token, the
      lowest id among equals.
    top_k: Draw from so many likeliest tokens; 0 is all.
    top_p: Draw from the likeliest tokens that together reach this probability.
    min_p: Draw from tokens at least so likely, relative to the likeliest.
    repetition_penalty: Divides positive and multiplies negative logits of
      tokens in the prompt or the answer so far.
    presence_penalty: Subtracted from logits of tokens in the answer so far.
    frequency_penalty: Likewise, times how often they are in it.
    seed: The same seed gives the same answer, whatever runs beside it.
    stop_tokens: Any of them ends the answer, and is its last token.
    logprobs: Report log-probabilities of each token and of so many likeliest
      ones; `None` reports none.

  Raises:
    ValueError: A number is out of range; the message names it.
  """

  max_tokens: int = 16
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  seed: int = 0
  stop_tokens: tuple[int, ...] = ()
  logprobs: int | None = None

  def __post_init__(self) -> None:
    def check(name: str, holds: bool, what: str) -> None:
      if not holds:
        raise ValueError(
          f"`{name}` must be {what}, got {getattr(self, name)!r}."
        )

    for name in (
      "temperature",
      "top_p",
      "min_p",
      "repetition_penalty",
      "presence_penalty",
      "frequency_penalty",
    ):
      value = getattr(self, name)
      check(name, isinstance(value, numbers.Real), "a number")
      check(name, abs(value) <= _LARGEST, f"finite and at most {_LARGEST:.0f}")
    for name in ("max_tokens", "top_k", "seed"):
      check(name, _is_integer(getattr(self, name)), "an integer")
    check("max_tokens", self.max_tokens >= 1, "at least 1")
    check("temperature", self.temperature >= 0, "0 or more")
    check("top_k", self.top_k >= 0, "0 or more")
    check("top_p", 0 < self.top_p <= 1, "in (0, 1]")
    check("min_p", 0 <= self.min_p <= 1, "in [0, 1]")
    check(
      "repetition_penalty",
      self.repetition_penalty >= 1 / _LARGEST,
      f"positive and at least {1 / _LARGEST:f}",
    )
    check("seed", 0 <= self.seed < 2**63, "in [0, 2**63)")
    check(
      "stop_tokens",
      isinstance(self.stop_tokens, Collection)
      and all(map(_is_integer, self.stop_tokens)),
      "a tuple of integers",
    )
    check(
      "logprobs",
      self.logprobs is None
      or (_is_integer(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS),
      f"None or an integer in [0, {MOST_LOGPROBS}]",
    )


def _is_integer(value: Any) -> bool:
  return isinstance(value, numbers.Integral)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One prompt to continue.

  Attributes:
    id: Unique among the requests in the engine.
    prompt: Token ids, at least one.
    params: How tokens are drawn.
    budget: Fraction of the cache that the prompt may keep, in (0, 1]; `None`
      takes the engine's.
  """

  id: str
  prompt: tuple[int, ...]
  params: SamplingParams = SamplingParams()
  budget: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """What happened to a request: a token, its end, or both.

  Attributes:
    request_id: Whose.
    token: The new token, if there is one.
    logprob: Its log-probability, if asked for: of the model's distribution,
      before penalties, temperature and filters.
    top_logprobs: The likeliest tokens and their log-probabilities, if asked
      for.
    finish: Why nothing follows; `None` if more does.
  """

  request_id: str
  token: int | None = None
  logprob: float | None = None
  top_logprobs: tuple[tuple[int, float], ...] = ()
  finish: FinishReason | None = None


class QueueFull(RuntimeError):
  """The engine takes no more requests now; try again later."""
