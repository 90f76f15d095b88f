"""What prompts that ask for something are made of: symbols, frame, places.

A prompt is a context, and a question at its end:

  BOS context QRY query ANS

and what is to follow is its answer and EOS. Keys, values and noise are symbols
of their own. Every example is a function of its seed and number.
"""

import abc
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

PAD, BOS, SEP, QRY, ANS, EOS, ASSIGN, REF, LIST = range(9)
FIRST_KEY = 9
KEY_SYMBOLS = VALUE_SYMBOLS = 64
FIRST_VALUE = FIRST_KEY + KEY_SYMBOLS
FIRST_NOISE = FIRST_VALUE + VALUE_SYMBOLS
NEEDLE_VOCAB_SIZE = FIRST_NOISE + 256
# Seeds of examples to learn from and to be asked for never meet.
EVALUATION_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class Example:
  """One prompt with its answer.

  Attributes:
    tokens: Prompt, answer and EOS, int32.
    length: Tokens of the prompt.
    start: Where what is asked for begins, or the first part of it.
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


class Task(abc.ABC):
  """What prompts hide and ask for; a value."""

  @abc.abstractmethod
  def min_length(self) -> int:
    """Tokens of the shortest prompt."""

  @abc.abstractmethod
  def answer_tokens(self, length: int) -> int:
    """Tokens of the longest answer to a prompt of `length`, without EOS."""

  @abc.abstractmethod
  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """Example number `index` of a seed.

    Args:
      length: Tokens of the prompt, exactly.
      seed, index: Name the example; both at least 0.
      depth: Where the thing asked for is, 0 at the start of the context and 1
        at its end, of tasks that hide one; `None` draws it, both ends more
        often than by chance.

    Raises:
      ValueError: `length` is too short, or `depth` is not in [0, 1].
    """

  def at_turn(self, index: int) -> "Task":
    """What example `index` of a training batch is drawn from."""
    del index
    return self

  def asking_once(self) -> "Task":
    """With one question."""
    return self

  def _start(
    self, length: int, *, seed: int, index: int, depth: float | None
  ) -> np.random.Generator:
    """Random numbers of an example whose arguments fit."""
    if length < self.min_length():
      raise ValueError(
        f"`length` must be at least {self.min_length()} for {self}, "
        f"got {length}."
      )
    if depth is not None and not 0 <= depth <= 1:
      raise ValueError(f"`depth` must be in [0, 1], got {depth}.")
    return np.random.Generator(
      np.random.Philox(key=np.array([seed, index], np.uint64))
    )


def framed(
  context: Sequence[int] | Int[np.ndarray, " context"],
  query: Sequence[int] | Int[np.ndarray, " query"],
  answer: Sequence[int] | Int[np.ndarray, " answer"],
  *,
  start: int,
) -> Example:
  """BOS context QRY query ANS answer EOS; `start` counts from the context."""
  prompt = [BOS, *context, QRY, *query, ANS]
  return Example(
    tokens=np.array([*prompt, *answer, EOS], np.int32),
    length=len(prompt),
    start=1 + start,
    questions_start=1 + len(context),
  )


def drawn_depth(random: np.random.Generator) -> float:
  """Anywhere; about one time in twenty at the start, and as often at the end.

  In long prompts both look like nothing else, and would hardly come.
  """
  return float(np.clip(1.1 * random.random() - 0.05, 0.0, 1.0))


def noise(random: np.random.Generator, room: int) -> Int[np.ndarray, " room"]:
  """Symbols that mean nothing, each on its own."""
  return random.integers(FIRST_NOISE, NEEDLE_VOCAB_SIZE, room)


def gaps(
  random: np.random.Generator, room: int, sizes: Sequence[int]
) -> list[int]:
  """Where pieces of these sizes begin, in this order, none upon another."""
  # Pieces as single tokens among the noise, then at their full length.
  slots = room - sum(sizes) + len(sizes)
  chosen = np.sort(random.choice(slots, len(sizes), replace=False))
  before = np.cumsum([0, *sizes])[:-1] - np.arange(len(sizes))
  return [int(start) for start in chosen + before]


def scattered(
  random: np.random.Generator, room: int, pieces: Sequence[Sequence[int]]
) -> tuple[Int[np.ndarray, " room"], list[int]]:
  """Noise with these pieces in it, in this order, and where each begins."""
  context = noise(random, room)
  starts = gaps(random, room, [len(piece) for piece in pieces])
  for start, piece in zip(starts, pieces, strict=True):
    context[start : start + len(piece)] = piece
  return context, starts
