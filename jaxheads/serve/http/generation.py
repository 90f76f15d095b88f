"""From the engine's events to the text of a response's answers."""

import dataclasses
from collections.abc import AsyncIterator, Sequence

from jaxheads.data import Tokenizer
from jaxheads.serve.http.errors import ApiError
from jaxheads.serve.http.metrics import TokenClock
from jaxheads.serve.request import Event, FinishReason
from jaxheads.serve.runner import Answers, SlowReader
from jaxheads.serve.text import StopStrings, TextStream


@dataclasses.dataclass
class Piece:
  """What is new of one answer.

  Attributes:
    text: Follows the text so far.
    tokens: The events of the tokens whose text begins in `text`, and the
      index of that character in the answer.
    finish: Why nothing follows; None if more does.
  """

  text: str = ""
  tokens: list[tuple[int, Event]] = dataclasses.field(default_factory=list)
  finish: FinishReason | None = None


class Answer:
  """The text of one answer, cut at stop strings.

  Attributes:
    num_tokens: Tokens of it so far, with those that ended it.
    finish: Why it ended; None before.
  """

  def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
    self._stream = TextStream(tokenizer.decode)
    self._stops = StopStrings(stops)
    self._waiting: list[tuple[int, Event]] = []  # Their text is held back.
    self._decoded = 0  # Characters, of which the stops may hold back some.
    self._told = 0
    self.num_tokens = 0
    self.finish: FinishReason | None = None

  def push(self, event: Event, piece: Piece) -> None:
    """Adds to `piece` what `event` brings; nothing after the end."""
    if self.finish is not None:
      return
    text = ""
    if event.token is not None:
      self.num_tokens += 1
      # A stop token is no part of the text.
      if event.finish != "stop":
        self._waiting.append((self._decoded, event))
        text = self._stream.push(event.token)
    if event.finish is not None:
      text += self._stream.flush()
    self._decoded += len(text)
    text = self._stops.push(text)
    self.finish = "stop" if self._stops.found else event.finish
    if self.finish is not None:
      text += self._stops.flush()
    self._told += len(text)
    while self._waiting and (
      self._waiting[0][0] < self._told
      or (self.finish is not None and not self._stops.found)
    ):
      piece.tokens.append(self._waiting.pop(0))
    piece.text += text
    piece.finish = self.finish


class Generation:
  """The answers of one response.

  Args:
    answers: Of the engine.
    request_ids: By the index of the answer.
    stops: Stop strings.
    prompt_lengths: Tokens of each prompt; all have as many answers.
    clock: Told when tokens come.
  """

  def __init__(
    self,
    answers: Answers,
    request_ids: Sequence[str],
    *,
    tokenizer: Tokenizer,
    stops: Sequence[str],
    prompt_lengths: Sequence[int],
    clock: TokenClock,
  ) -> None:
    self._answers = answers
    self._index = {name: index for index, name in enumerate(request_ids)}
    self._texts = [Answer(tokenizer, stops) for _ in request_ids]
    self._prompt_tokens = sum(prompt_lengths)
    of_each = len(request_ids) // len(prompt_lengths)
    kept = sum(
      length * fraction
      for length, fraction in zip(
        prompt_lengths, answers.kept_fractions[::of_each], strict=True
      )
    )
    self._kept_fraction = kept / self._prompt_tokens
    self._clock = clock

  async def pieces(self) -> AsyncIterator[dict[int, Piece]]:
    """What is new, by the index of the answer.

    Raises:
      ApiError: The engine failed, or stopped before the end.
    """
    while True:
      try:
        batch = await anext(self._answers)
      except StopAsyncIteration:
        return
      except SlowReader:
        raise ApiError(
          408, "the answer was not read fast enough", code="reader_too_slow"
        ) from None
      pieces: dict[int, Piece] = {}
      for stamp, event in batch:
        index = self._index[event.request_id]
        text = self._texts[index]
        if text.finish is not None:
          continue
        if event.finish == "error":
          raise ApiError(500, "the engine has failed", code="engine_failed")
        if event.finish == "cancelled":
          raise ApiError(
            503, "the server stopped before the end", code="stopped", retry_s=5
          )
        if event.token is not None:
          self._clock.token(index, stamp)
        text.push(event, pieces.setdefault(index, Piece()))
        if text.finish is not None and event.finish is None:
          self._answers.cancel(event.request_id)  # At a stop string.
      if pieces:
        yield pieces

  @property
  def usage(self) -> dict[str, int | float]:
    """Tokens of the prompts and of the answers so far.

    And, beyond the schema, the effective budget: the share of the prompts'
    cache that was kept.
    """
    completion = sum(text.num_tokens for text in self._texts)
    return {
      "prompt_tokens": self._prompt_tokens,
      "completion_tokens": completion,
      "total_tokens": self._prompt_tokens + completion,
      "kept_fraction": self._kept_fraction,
    }
