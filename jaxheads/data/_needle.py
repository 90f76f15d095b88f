"""Needles in a haystack: made-up text in which one fact can be asked for.

A prompt is noise with needles in it, and a question at its end:

  BOS noise SEP k1 k2 ASSIGN v1 v2 v3 v4 noise ... QRY k1 k2 ANS

and its answer v1 v2 v3 v4 EOS. Nothing but finding the needle helps. Further
questions, with their answers, may stand before the last one; one question may
also ask for several needles.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from . import _prompts
from ._prompts import (
  ANS,
  ASSIGN,
  BOS,
  EOS,
  FIRST_KEY,
  FIRST_NOISE,
  FIRST_VALUE,
  KEY_SYMBOLS,
  QRY,
  SEP,
  Example,
)

VALUE_TOKENS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTask(_prompts.Task):
  """What a prompt hides.

  Attributes:
    needles: Needles with different keys, of which the last question asks for
      one.
    questions: Questions, each for another needle; all but the last are
      answered in the prompt.
    noise: "random" symbols, each on its own, or a "cycle" of 20 symbols.
    key_tokens: Symbols of a key.
    asked: Keys that a question names; their values follow in this order.
  """

  needles: int = 1
  questions: int = 1
  noise: Literal["random", "cycle"] = "random"
  key_tokens: int = 2
  asked: int = 1

  def __post_init__(self) -> None:
    for name in ("needles", "key_tokens", "asked"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"`{name}` must be at least 1, got {getattr(self, name)}."
        )
    if not 1 <= self.questions <= self.needles:
      raise ValueError(
        f"`questions` must be in [1, {self.needles}], the number of needles, "
        f"got {self.questions}."
      )
    if self.questions * self.asked > self.needles:
      raise ValueError(
        f"`asked` must be at most `needles` / `questions`, got {self.asked} "
        f"for {self}."
      )
    if self.noise not in ("random", "cycle"):
      raise ValueError(
        f"`noise` must be 'random' or 'cycle', got {self.noise!r}."
      )

  def __str__(self) -> str:
    return f"{self.needles} needle(s) and {self.questions} question(s)"

  @property
  def _needle_tokens(self) -> int:
    """SEP key ASSIGN value."""
    return 2 + self.key_tokens + VALUE_TOKENS

  @property
  def _rounds_tokens(self) -> int:
    """QRY keys ANS values, of all questions but the last."""
    pair = self.key_tokens + VALUE_TOKENS
    return (self.questions - 1) * (2 + self.asked * pair)

  @property
  def _frame_tokens(self) -> int:
    """BOS in front, QRY keys ANS at the end."""
    return 1 + 2 + self.asked * self.key_tokens

  def min_length(self) -> int:
    """Tokens of the shortest prompt that holds the needles at any depth."""
    # On either side of the asked needle, less than a needle's length may be
    # left over.
    spare = 0 if self.needles == 1 else self._needle_tokens - 1
    needles = self._needle_tokens * self.needles
    return self._frame_tokens + self._rounds_tokens + needles + spare

  def at_turn(self, index: int) -> "NeedleTask":
    """With fewer needles and questions, by turns; at least what is asked."""
    turn, needles = divmod(index, self.needles - self.asked + 1)
    needles += self.asked
    questions = 1 + turn % min(needles // self.asked, self.questions)
    return dataclasses.replace(self, needles=needles, questions=questions)

  def asking_once(self) -> "NeedleTask":
    """With one question."""
    return dataclasses.replace(self, questions=1)

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return self.asked * VALUE_TOKENS

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; `depth` is that of the first needle asked for last.

    Source:
      niah-single, niah-multikey and niah-multiquery of RULER,
      https://arxiv.org/abs/2404.06654, in a size that can be learnt from
      scratch.
    """
    random = self._start(length, seed=seed, index=index, depth=depth)
    room = length - self._frame_tokens - self._rounds_tokens
    if self.noise == "cycle":
      context = FIRST_NOISE + np.arange(room) % 20
    else:
      context = _prompts.noise(random, room)
    if depth is None:
      depth = _prompts.drawn_depth(random)
    before = round(depth * (room - self._needle_tokens))
    starts = [before, *self._other_starts(random, room, before)]
    keys = drawn_keys(random, len(starts), self.key_tokens)
    values = drawn_values(random, len(starts))
    for start, key, value in zip(starts, keys, values, strict=True):
      context[start : start + self._needle_tokens] = needle(key, value)
    tokens = [BOS, *context]
    for number in reversed(range(self.questions)):
      asked = slice(number * self.asked, (number + 1) * self.asked)
      tokens += [QRY, *keys[asked].flat, ANS, *values[asked].flat]
    return Example(
      tokens=np.array([*tokens, EOS], np.int32),
      length=length,
      start=1 + before,
      questions_start=1 + room,
    )

  def _other_starts(
    self, random: np.random.Generator, room: int, before: int
  ) -> list[int]:
    """Where the needles begin that are not the first, none upon another."""
    size = self._needle_tokens
    after = room - before - size
    fit_before, fit_after = before // size, after // size
    count = self.needles - 1
    count_before = int(random.binomial(count, before / max(1, before + after)))
    count_before = min(max(count_before, count - fit_after), fit_before)
    starts = []
    for first, space, number in (
      (0, before, count_before),
      (before + size, after, count - count_before),
    ):
      starts += [
        first + start for start in _prompts.gaps(random, space, [size] * number)
      ]
    if self.asked > 1:
      # Which of the others are asked for must not depend on their places.
      random.shuffle(starts)
    return starts


def needle(
  key: Int[np.ndarray, " key"], value: Int[np.ndarray, " value"]
) -> list[int]:
  """One fact as tokens."""
  return [SEP, *key, ASSIGN, *value]


def drawn_keys(
  random: np.random.Generator, count: int, key_tokens: int
) -> Int[np.ndarray, "count key_tokens"]:
  """Different keys: numbers whose digits are symbols."""
  numbers = random.choice(KEY_SYMBOLS**key_tokens, count, replace=False)
  powers = KEY_SYMBOLS ** np.arange(key_tokens)[::-1]
  return FIRST_KEY + numbers[:, None] // powers[None] % KEY_SYMBOLS


def drawn_values(
  random: np.random.Generator, count: int
) -> Int[np.ndarray, "count value_tokens"]:
  """Values, each on its own."""
  return random.integers(FIRST_VALUE, FIRST_NOISE, (count, VALUE_TOKENS))
