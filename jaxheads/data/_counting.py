"""Words that come often: the answer is all over the context."""

import dataclasses
import math

import numpy as np

from . import _prompts
from ._prompts import FIRST_NOISE, LIST, NEEDLE_VOCAB_SIZE, SEP, Example

_SYMBOLS = NEEDLE_VOCAB_SIZE - FIRST_NOISE
_COMMON = 10


@dataclasses.dataclass(frozen=True)
class FrequentWordsTask(_prompts.Task):
  """The second, third and fourth most frequent of words of two symbols.

  The word of rank i comes floor(W / (i^2 zeta(2))) times; the question names
  the most frequent one, which counts as noise and fills what is left.

  Source:
    Frequent words extraction of RULER, https://arxiv.org/abs/2404.06654.
  """

  def __str__(self) -> str:
    return "frequent words"

  def min_length(self) -> int:
    """Tokens of the shortest prompt in which ranks 2 to 5 differ."""
    return 64

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return 6

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; words are anywhere, whatever `depth` is."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    room = length - 5
    counts = zipf_counts(room // 2, max(8, length // 50))
    numbers = random.choice(_SYMBOLS**2, len(counts), replace=False)
    words = FIRST_NOISE + np.stack(
      [numbers // _SYMBOLS, numbers % _SYMBOLS], axis=-1
    )
    text = random.permutation(np.repeat(words, counts, axis=0)).ravel()
    context = [*text, *[SEP] * (room % 2)]
    return _prompts.framed(context, words[0], words[1:4].ravel(), start=0)


def zipf_counts(total: int, words: int) -> list[int]:
  """How often the word of each rank comes, most frequent first."""

  def counts(scale: int) -> list[int]:
    zeta = math.pi**2 / 6
    return [int(scale / (rank**2 * zeta)) for rank in range(1, words + 1)]

  scale = total
  while sum(counts(scale + 1)) <= total:
    scale += 1
  found = counts(scale)
  found[0] += total - sum(found)
  return found


@dataclasses.dataclass(frozen=True)
class CommonWordsTask(_prompts.Task):
  """The ten words that come ten times as often as the others, by their ids.

  Words are single symbols behind LIST each. Common ones come 6 times and the
  others once; in prompts that hold it, 30 times and 3 times, or more often
  still where symbols run out.

  Source:
    Common words extraction of RULER, https://arxiv.org/abs/2404.06654.
  """

  def __str__(self) -> str:
    return "common words"

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return 3 + 2 * (_COMMON * 6 + 2)

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    del length
    return _COMMON

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`; words are anywhere, whatever `depth` is."""
    random = self._start(length, seed=seed, index=index, depth=depth)
    slots = (length - 3) // 2
    often, rarely = 6, 1
    if slots >= _COMMON * 30 + 3 * _COMMON:
      rarely = 3
      while slots > rarely * (10 * _COMMON + _SYMBOLS - _COMMON):
        rarely += 1
      often = 10 * rarely
    others = min((slots - _COMMON * often) // rarely, _SYMBOLS - _COMMON)
    words = FIRST_NOISE + random.permutation(_SYMBOLS)[: _COMMON + others]
    counts = np.repeat([often, rarely], [_COMMON, others])
    text = random.permutation(np.repeat(words, counts))
    listed = np.stack([np.full_like(text, LIST), text], axis=-1).ravel()
    context = [*[SEP] * (length - 3 - len(listed)), *listed]
    answer = np.sort(words[:_COMMON])
    return _prompts.framed(context, [], answer, start=0)
