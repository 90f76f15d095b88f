"""Repeating what stood earlier: easier to learn than facts, and a way there."""

import dataclasses

import numpy as np

from . import _prompts
from ._needle import VALUE_TOKENS
from ._prompts import (
  BOS,
  EOS,
  FIRST_KEY,
  FIRST_NOISE,
  NEEDLE_VOCAB_SIZE,
  QRY,
  Example,
)

_SHORTEST_COPY = 6
_SHORTEST_SEGMENT = 16


@dataclasses.dataclass(frozen=True)
class CopyTask(_prompts.Task):
  """A stretch of symbols to repeat, anywhere in noise; to learn from.

    BOS noise s1 .. sn noise QRY s1 .. sn EOS

  The prompt ends inside of the repetition: its last tokens are the answer. The
  stretch has few different symbols or many: with few, only what came before
  the last one tells where to go on.
  """

  def __str__(self) -> str:
    return "a stretch to copy"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return 3 * _SHORTEST_COPY

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return VALUE_TOKENS

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; `depth` is that of the stretch."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    total = length + VALUE_TOKENS + 1
    size = int(random.integers(_SHORTEST_COPY, total // 3 + 1))
    symbols = np.arange(FIRST_KEY, NEEDLE_VOCAB_SIZE)
    different = int(random.integers(_SHORTEST_COPY, 2 * size))
    symbols = random.choice(
      symbols, min(different, symbols.size), replace=False
    )
    stretch = random.choice(symbols, size)
    # BOS, QRY and EOS.
    room = total - 2 * size - 3
    noise = _prompts.noise(random, room)
    if depth is None:
      depth = _prompts.drawn_depth(random)
    before = round(depth * room)
    tokens = [BOS, *noise[:before], *stretch, *noise[before:]]
    return Example(
      tokens=np.array([*tokens, QRY, *stretch, EOS], np.int32),
      length=length,
      start=1 + before,
      questions_start=len(tokens),
    )


@dataclasses.dataclass(frozen=True)
class SegmentTask(_prompts.Task):
  """A segment of keys and values in noise, to be repeated whole.

    BOS noise s1 .. sn noise QRY ANS

  The segment has 16 symbols to a quarter of the prompt, and begins in the
  first half of the context.
  """

  def __str__(self) -> str:
    return "a segment to repeat"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return 4 * _SHORTEST_SEGMENT

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    return length // 4

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; `depth` is that of the segment, at most one half."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    size = int(random.integers(_SHORTEST_SEGMENT, length // 4 + 1))
    segment = random.integers(FIRST_KEY, FIRST_NOISE, size)
    context = _prompts.noise(random, length - 3)
    if depth is None:
      depth = _prompts.drawn_depth(random) / 2
    start = round(depth * (len(context) - size))
    context[start : start + size] = segment
    return _prompts.framed(context, [], segment, start=start)


@dataclasses.dataclass(frozen=True)
class InductionTask(_prompts.Task):
  """The symbol that followed another one, which stands once in the noise.

  BOS noise a b noise QRY a ANS, then b.
  """

  def __str__(self) -> str:
    return "a pair of symbols"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return 6

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return 1

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; `depth` is that of the pair."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    first = int(random.integers(FIRST_NOISE, NEEDLE_VOCAB_SIZE))
    # Any symbol but the first.
    context = random.integers(FIRST_NOISE, NEEDLE_VOCAB_SIZE - 1, length - 4)
    context += context >= first
    if depth is None:
      depth = _prompts.drawn_depth(random)
    start = round(depth * (len(context) - 2))
    context[start] = first
    answer = [context[start + 1]]
    return _prompts.framed(context, [first], answer, start=start)
