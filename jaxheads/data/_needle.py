"""Needles in a haystack: made-up text in which one fact can be asked for.

A prompt is noise with needles in it, and a question at its end:

  BOS noise SEP k1 k2 ASSIGN v1 v2 v3 v4 noise ... QRY k1 k2 ANS

and its answer v1 v2 v3 v4 EOS. Keys, values and noise are symbols of their
own, so nothing but finding the needle helps. Further questions, with their
answers, may stand before the last one.

To repeat a stretch of symbols is easier to learn, and teaches to look back:

  BOS noise s1 .. sn noise QRY s1 .. sn EOS

Every example is a function of its seed and number.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

PAD, BOS, SEP, QRY, ANS, EOS, ASSIGN, REF, LIST = range(9)
FIRST_KEY = 9
FIRST_VALUE = FIRST_KEY + 64
FIRST_NOISE = FIRST_VALUE + 64
NEEDLE_VOCAB_SIZE = FIRST_NOISE + 256

_KEY_TOKENS = 2
_VALUE_TOKENS = 4
# SEP k1 k2 ASSIGN v1 v2 v3 v4.
_NEEDLE_TOKENS = 2 + _KEY_TOKENS + _VALUE_TOKENS
# QRY k1 k2 ANS v1 v2 v3 v4.
_ROUND_TOKENS = 2 + _KEY_TOKENS + _VALUE_TOKENS
# BOS in front, QRY k1 k2 ANS at the end.
_FRAME_TOKENS = 1 + 2 + _KEY_TOKENS
_SHORTEST_COPY = 6
# Answer and EOS.
ANSWER_TOKENS = _VALUE_TOKENS + 1
# Seeds of examples to learn from and to be asked for never meet.
EVALUATION_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class NeedleExample:
  """One prompt with its answer.

  Attributes:
    tokens: Prompt, answer and EOS, int32 [length + ANSWER_TOKENS].
    length: Tokens of the prompt.
    start: Where the needle that is asked for, or the copied stretch, begins.
    questions_start: Where the first question begins.
  """

  tokens: Int[np.ndarray, " tokens"]
  length: int
  start: int
  questions_start: int

  @property
  def answer(self) -> Int[np.ndarray, " values"]:
    """The tokens asked for, without EOS."""
    return self.tokens[self.length : -1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTask:
  """What a prompt hides.

  Attributes:
    needles: Needles with different keys, of which the last question asks for
      one.
    questions: Questions, each for another needle; all but the last are
      answered in the prompt.
    noise: "random" symbols, each on its own, or a "cycle" of 20 symbols.
  """

  needles: int = 1
  questions: int = 1
  noise: Literal["random", "cycle"] = "random"

  def __post_init__(self) -> None:
    if self.needles < 1:
      raise ValueError(f"`needles` must be at least 1, got {self.needles}.")
    if not 1 <= self.questions <= self.needles:
      raise ValueError(
        f"`questions` must be in [1, {self.needles}], the number of needles, "
        f"got {self.questions}."
      )
    if self.noise not in ("random", "cycle"):
      raise ValueError(
        f"`noise` must be 'random' or 'cycle', got {self.noise!r}."
      )

  def __str__(self) -> str:
    return f"{self.needles} needle(s) and {self.questions} question(s)"

  def min_length(self) -> int:
    """Tokens of the shortest prompt that holds the needles at any depth."""
    # On either side of the asked needle, less than a needle's length may be
    # left over.
    spare = 0 if self.needles == 1 else _NEEDLE_TOKENS - 1
    rounds = _ROUND_TOKENS * (self.questions - 1)
    return _FRAME_TOKENS + rounds + _NEEDLE_TOKENS * self.needles + spare

  def at_turn(self, index: int) -> "NeedleTask":
    """With 1 to `needles` needles and 1 to `questions` questions, by turns."""
    turn, needles = divmod(index, self.needles)
    needles += 1
    questions = 1 + turn % min(needles, self.questions)
    return dataclasses.replace(self, needles=needles, questions=questions)

  def asking_once(self) -> "NeedleTask":
    """With one question."""
    return dataclasses.replace(self, questions=1)

  def draw(
    self,
    length: int,
    *,
    seed: int,
    index: int,
    depth: float | None = None,
  ) -> NeedleExample:
    """Example number `index` of a seed.

    Args:
      length: Tokens of the prompt, exactly.
      seed, index: Name the example; both at least 0.
      depth: Where the needle is, 0 at the start of the context and 1 at its
        end; `None` draws it, both ends more often than by chance.

    Raises:
      ValueError: `length` is too short for the needles, or `depth` is not in
        [0, 1].

    Source:
      niah-single and niah-multikey of RULER, https://arxiv.org/abs/2404.06654,
      in a size that can be learnt from scratch.
    """
    _check(self, length, depth)
    random = _random(seed, index)
    room = length - _FRAME_TOKENS - _ROUND_TOKENS * (self.questions - 1)
    if self.noise == "cycle":
      context = FIRST_NOISE + np.arange(room) % 20
    else:
      context = random.integers(FIRST_NOISE, NEEDLE_VOCAB_SIZE, room)
    if depth is None:
      depth = _depth(random)
    before = round(depth * (room - _NEEDLE_TOKENS))
    starts = [before, *_other_starts(random, self.needles, room, before)]
    # Different keys: numbers of pairs of symbols.
    pairs = random.choice(64**_KEY_TOKENS, len(starts), replace=False)
    keys = FIRST_KEY + np.stack([pairs // 64, pairs % 64], axis=-1)
    values = random.integers(
      FIRST_VALUE, FIRST_NOISE, (len(starts), _VALUE_TOKENS)
    )
    for start, key, value in zip(starts, keys, values, strict=True):
      context[start : start + _NEEDLE_TOKENS] = [SEP, *key, ASSIGN, *value]
    tokens = [BOS, *context]
    for asked in reversed(range(self.questions)):
      tokens += [QRY, *keys[asked], ANS, *values[asked]]
    return NeedleExample(
      tokens=np.array([*tokens, EOS], np.int32),
      length=length,
      start=1 + before,
      questions_start=1 + room,
    )


@dataclasses.dataclass(frozen=True)
class CopyTask:
  """A stretch of symbols to repeat, anywhere in noise.

  The stretch has few different symbols or many: with few, only what came
  before the last one tells where to go on.
  """

  def __str__(self) -> str:
    return "a stretch to copy"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return 3 * _SHORTEST_COPY

  def at_turn(self, index: int) -> "CopyTask":
    """Itself."""
    del index
    return self

  def asking_once(self) -> "CopyTask":
    """Itself."""
    return self

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> NeedleExample:
    """As `NeedleTask.draw`; `depth` is that of the stretch."""
    _check(self, length, depth)
    random = _random(seed, index)
    total = length + ANSWER_TOKENS
    size = int(random.integers(_SHORTEST_COPY, total // 3 + 1))
    symbols = np.arange(FIRST_KEY, NEEDLE_VOCAB_SIZE)
    different = int(random.integers(_SHORTEST_COPY, 2 * size))
    symbols = random.choice(
      symbols, min(different, symbols.size), replace=False
    )
    stretch = random.choice(symbols, size)
    # BOS, QRY and EOS.
    room = total - 2 * size - 3
    noise = random.integers(FIRST_NOISE, NEEDLE_VOCAB_SIZE, room)
    if depth is None:
      depth = _depth(random)
    before = round(depth * room)
    tokens = [BOS, *noise[:before], *stretch, *noise[before:]]
    return NeedleExample(
      tokens=np.array([*tokens, QRY, *stretch, EOS], np.int32),
      length=length,
      start=1 + before,
      questions_start=len(tokens),
    )


def _random(seed: int, index: int) -> np.random.Generator:
  return np.random.Generator(
    np.random.Philox(key=np.array([seed, index], np.uint64))
  )


def _depth(random: np.random.Generator) -> float:
  """Anywhere; about one time in twenty at the start, and as often at the end.

  In long prompts both look like nothing else, and would hardly come.
  """
  return float(np.clip(1.1 * random.random() - 0.05, 0.0, 1.0))


def _check(
  task: NeedleTask | CopyTask, length: int, depth: float | None
) -> None:
  if length < task.min_length():
    raise ValueError(
      f"`length` must be at least {task.min_length()} for {task}, got {length}."
    )
  if depth is not None and not 0 <= depth <= 1:
    raise ValueError(f"`depth` must be in [0, 1], got {depth}.")


def _other_starts(
  random: np.random.Generator, needles: int, room: int, before: int
) -> list[int]:
  """Where the needles that are not asked for begin, none upon another."""
  after = room - before - _NEEDLE_TOKENS
  fit_before, fit_after = before // _NEEDLE_TOKENS, after // _NEEDLE_TOKENS
  count = needles - 1
  count_before = int(random.binomial(count, before / max(1, before + after)))
  count_before = min(max(count_before, count - fit_after), fit_before)
  starts = []
  for first, size, number in (
    (0, before, count_before),
    (before + _NEEDLE_TOKENS, after, count - count_before),
  ):
    # Needles as single tokens among the noise, then at their full length.
    slots = size - (_NEEDLE_TOKENS - 1) * number
    chosen = np.sort(random.choice(slots, number, replace=False))
    starts += [
      first + int(slot) + (_NEEDLE_TOKENS - 1) * rank
      for rank, slot in enumerate(chosen)
    ]
  return starts
