"""Facts that have to be put together: several values, sums, chains of names."""

import dataclasses

import numpy as np

from . import _prompts
from ._needle import VALUE_TOKENS, drawn_keys, drawn_values, needle
from ._prompts import ASSIGN, FIRST_VALUE, REF, SEP, Example

_KEY_TOKENS = 2
_DIGITS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class ManyValuesTask(_prompts.Task):
  """One key in several needles; all its values, in order of appearance.

  Source:
    niah-multivalue of RULER, https://arxiv.org/abs/2404.06654.
  """

  values: int = 4

  def __str__(self) -> str:
    return f"{self.values} values of a key"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return 5 + self.values * (2 + _KEY_TOKENS + VALUE_TOKENS)

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return self.values * VALUE_TOKENS

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; needles are anywhere, whatever `depth` is."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    (key,) = drawn_keys(random, 1, _KEY_TOKENS)
    values = drawn_values(random, self.values)
    pieces = [needle(key, value) for value in values]
    context, starts = _prompts.scattered(random, length - 5, pieces)
    return _prompts.framed(context, key, values.ravel(), start=starts[0])


@dataclasses.dataclass(frozen=True)
class SumTask(_prompts.Task):
  """The last digit of the sum of two needles' digits.

  A needle is SEP k1 k2 ASSIGN d; digits are the first ten values.
  """

  def __str__(self) -> str:
    return "two digits to add"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return 3 + 2 * _KEY_TOKENS + 2 * (3 + _KEY_TOKENS)

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return 1

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; needles are anywhere, whatever `depth` is."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    keys = drawn_keys(random, 2, _KEY_TOKENS)
    digits = random.integers(0, _DIGITS, 2)
    pieces = [
      needle(key, np.array([FIRST_VALUE + digit]))
      for key, digit in zip(keys, digits, strict=True)
    ]
    room = length - 3 - 2 * _KEY_TOKENS
    context, starts = _prompts.scattered(random, room, pieces)
    query = keys[:: 1 if random.random() < 0.5 else -1].ravel()
    answer = [FIRST_VALUE + int(digits.sum()) % _DIGITS]
    return _prompts.framed(context, query, answer, start=starts[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariablesTask(_prompts.Task):
  """All names of a value, which go from one to the next.

  SEP x0 ASSIGN value; SEP x1 ASSIGN REF x0; .. among noise and other chains;
  the question is the value, the answer x0 x1 ...

  Attributes:
    hops: References of every chain.
    decoys: Chains with other values, at most; each prompt draws how many.

  Source:
    Variable tracking of RULER, https://arxiv.org/abs/2404.06654.
  """

  hops: int = 2
  decoys: int = 3

  def __str__(self) -> str:
    return f"{1 + self.decoys} chains of {self.hops} hop(s)"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    chain = 2 + _KEY_TOKENS + VALUE_TOKENS
    chain += self.hops * (3 + 2 * _KEY_TOKENS)
    return 3 + VALUE_TOKENS + (1 + self.decoys) * chain

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return (1 + self.hops) * _KEY_TOKENS

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; statements are anywhere, whatever `depth` is."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    chains = 1 + int(random.integers(0, self.decoys + 1))
    names = drawn_keys(random, chains * (1 + self.hops), _KEY_TOKENS)
    names = names.reshape(chains, 1 + self.hops, _KEY_TOKENS)
    values = _different_values(random, chains)
    # Statements in the order of their chain; chains between each other.
    order = random.permutation(np.repeat(np.arange(chains), 1 + self.hops))
    said = [0] * chains
    pieces = []
    for chain in order:
      name, at = names[chain], said[chain]
      pieces.append(
        needle(name[0], values[chain])
        if at == 0
        else [SEP, *name[at], ASSIGN, REF, *name[at - 1]]
      )
      said[chain] += 1
    room = length - 3 - VALUE_TOKENS
    context, starts = _prompts.scattered(random, room, pieces)
    start = starts[int(np.argmax(order == 0))]
    return _prompts.framed(context, values[0], names[0].ravel(), start=start)


def _different_values(random: np.random.Generator, count: int) -> np.ndarray:
  while True:
    values = drawn_values(random, count)
    if len(np.unique(values, axis=0)) == count:
      return values
