"""Answers as JSON objects: those of completions and those of chats."""

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

from jaxheads.data import Tokenizer
from jaxheads.serve.http.generation import Piece
from jaxheads.serve.request import Event


class Format(Protocol):
  """How one response tells its answers."""

  def whole(
    self, pieces: Mapping[int, Piece], usage: dict[str, int | float]
  ) -> dict[str, Any]:
    """The response, when it is not streamed."""

  def opening(self, index: int) -> dict[str, Any] | None:
    """What a stream tells of an answer before its first piece."""

  def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
    """One piece of a stream."""

  def closing(self, usage: dict[str, int | float]) -> dict[str, Any]:
    """The usage at the end of a stream."""


class _Format:
  def __init__(
    self, *, id: str, model: str, tokenizer: Tokenizer, logprobs: bool
  ) -> None:
    self._head = {"id": id, "created": int(time.time()), "model": model}
    self._tokenizer = tokenizer
    self._logprobs = logprobs
    self._texts: dict[int, str] = {}

  def _object(self, kind: str, choices: list, **more: Any) -> dict[str, Any]:
    return {**self._head, "object": kind, "choices": choices, **more}

  def _text(self, token: int | None) -> str:
    """A token's text, or `token_id:` and its number where it is none."""
    assert token is not None
    text = self._texts.get(token)
    if text is None:
      text = self._tokenizer.decode([token])
      if not text or "\ufffd" in text:
        text = f"token_id:{token}"
      self._texts[token] = text
    return text


def _finite(value: float | None) -> float | None:
  """JSON has no other numbers."""
  return value if value is not None and math.isfinite(value) else None


class CompletionFormat(_Format):
  """/v1/completions."""

  def whole(
    self, pieces: Mapping[int, Piece], usage: dict[str, int | float]
  ) -> dict[str, Any]:
    choices = [self._choice(index, piece) for index, piece in pieces.items()]
    return self._object("text_completion", choices, usage=usage)

  def opening(self, index: int) -> None:
    del index

  def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
    return self._object("text_completion", [self._choice(index, piece)])

  def closing(self, usage: dict[str, int | float]) -> dict[str, Any]:
    return self._object("text_completion", [], usage=usage)

  def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
    logprobs = None
    if self._logprobs:
      logprobs = {
        "tokens": [self._text(event.token) for _, event in piece.tokens],
        "token_logprobs": [_finite(event.logprob) for _, event in piece.tokens],
        "top_logprobs": [
          {
            self._text(token): _finite(value)
            for token, value in event.top_logprobs
          }
          for _, event in piece.tokens
        ],
        "text_offset": [offset for offset, _ in piece.tokens],
      }
    return {
      "index": index,
      "text": piece.text,
      "logprobs": logprobs,
      "finish_reason": piece.finish,
    }


class ChatFormat(_Format):
  """/v1/chat/completions."""

  def whole(
    self, pieces: Mapping[int, Piece], usage: dict[str, int | float]
  ) -> dict[str, Any]:
    choices = [
      self._choice(
        index, piece, message={"role": "assistant", "content": piece.text}
      )
      for index, piece in pieces.items()
    ]
    return self._object("chat.completion", choices, usage=usage)

  def opening(self, index: int) -> dict[str, Any]:
    choice = self._choice(
      index, Piece(), delta={"role": "assistant", "content": ""}
    )
    return self._object("chat.completion.chunk", [choice])

  def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
    delta = {"content": piece.text} if piece.text else {}
    choice = self._choice(index, piece, delta=delta)
    return self._object("chat.completion.chunk", [choice])

  def closing(self, usage: dict[str, int | float]) -> dict[str, Any]:
    return self._object("chat.completion.chunk", [], usage=usage)

  def _choice(self, index: int, piece: Piece, **what: Any) -> dict[str, Any]:
    logprobs = None
    if self._logprobs:
      content = [self._entry(event) for _, event in piece.tokens]
      logprobs = {"content": content, "refusal": None}
    return {
      "index": index,
      **what,
      "logprobs": logprobs,
      "finish_reason": piece.finish,
    }

  def _entry(self, event: Event) -> dict[str, Any]:
    return {
      **self._token(event.token, event.logprob),
      "top_logprobs": [
        self._token(token, value) for token, value in event.top_logprobs
      ],
    }

  def _token(self, token: int | None, logprob: float | None) -> dict[str, Any]:
    text = self._text(token)
    known = not text.startswith("token_id:")
    return {
      "token": text,
      "logprob": _finite(logprob),
      "bytes": list(text.encode()) if known else None,
    }
