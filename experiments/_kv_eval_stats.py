"""How sure a difference of a few samples is."""

import functools
import itertools
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

# Two-sided 95 % of a normal distribution.
_Z = 1.959964
_RESAMPLES = 2000


class Interval(NamedTuple):
  """An estimate, and the ends of its 95 % interval."""

  mean: float
  low: float
  high: float

  def verdict(self) -> str:
    """What a positive difference would claim: "yes", "no" or "too small"."""
    if self.low > 0:
      return "yes"
    return "no" if self.high < 0 else "too small to tell"


def proportion(successes: int, samples: int) -> Interval:
  """A share of successes, with Wilson's interval.

  Source:
    Wilson, 1927, https://doi.org/10.1080/01621459.1927.10502953.
  """
  p, z2 = successes / samples, _Z**2
  middle = (p + z2 / (2 * samples)) / (1 + z2 / samples)
  reach = _Z / (1 + z2 / samples)
  reach *= math.sqrt(p * (1 - p) / samples + z2 / (4 * samples**2))
  # Rounding must not leave the share itself outside.
  return Interval(
    p, min(p, max(0.0, middle - reach)), max(p, min(1.0, middle + reach))
  )


def paired_difference(
  first: list[Float[np.ndarray, " samples"]],
  second: list[Float[np.ndarray, " samples"]],
) -> Interval:
  """Mean of `first` over `second`, each a list of one array per cell.

  Entry i of every array is of the same prompts in both. Cells count alike;
  bootstrap over the samples of each cell, percentiles.
  """
  differences = [
    np.asarray(a, float) - np.asarray(b, float)
    for a, b in zip(first, second, strict=True)
  ]
  means = sum(
    _resampled(len(cell), number) @ cell
    for number, cell in enumerate(differences)
  )
  low, high = np.percentile(means / len(differences), [2.5, 97.5])
  mean = float(np.mean([cell.mean() for cell in differences]))
  return Interval(mean, float(low), float(high))


@functools.lru_cache(maxsize=64)
def _resampled(
  samples: int, number: int
) -> Float[np.ndarray, "resamples samples"]:
  """Weights of each sample in each resample, the same for every method."""
  random = np.random.default_rng(number)
  even = np.full(samples, 1 / samples)
  return random.multinomial(samples, even, size=_RESAMPLES) / samples


def overlap(
  first: Bool[np.ndarray, "prompts R K"],
  second: Bool[np.ndarray, "prompts R K"],
) -> Float[np.ndarray, "prompts prompts"]:
  """Jaccard index of head sets, for every pair of prompts.

  Layers without a full head in either do not count; NaN if there is none.
  """
  both = np.einsum("iRK,jRK->ijR", first.astype(int), second.astype(int))
  either = first.sum(-1)[:, None] + second.sum(-1)[None] - both
  index = np.divide(
    both, either, out=np.full(both.shape, np.nan), where=either > 0
  )
  with np.errstate(invalid="ignore"):
    return np.nanmean(index, axis=-1)


def overlap_gap(
  sets: dict[str, Bool[np.ndarray, "prompts R K"]], *, seed: int = 0
) -> tuple[Interval, float, float]:
  """Overlap within tasks over that across tasks, then both means.

  Bootstrap over the prompts of each task, at least two; a prompt is never
  compared with itself.
  """
  random = np.random.default_rng(seed)
  names = list(sets)
  tables = {
    (a, b): overlap(sets[a], sets[b])
    for a, b in itertools.combinations_with_replacement(names, 2)
  }

  def means(picks: dict[str, np.ndarray]) -> tuple[float, float]:
    within, across = [], []
    for (a, b), table in tables.items():
      values = table[np.ix_(picks[a], picks[b])]
      if a == b:
        other = picks[a][:, None] != picks[a][None]
        within.append(np.nanmean(values[other]))
      else:
        across.append(np.nanmean(values))
    return float(np.mean(within)), float(np.mean(across))

  inside, outside = means({name: np.arange(len(sets[name])) for name in names})

  def redrawn(count: int) -> np.ndarray:
    while True:
      picks = random.integers(0, count, count)
      if len(np.unique(picks)) > 1:
        return picks

  gaps = []
  for _ in range(_RESAMPLES // 10):
    drawn = means({name: redrawn(len(sets[name])) for name in names})
    gaps.append(drawn[0] - drawn[1])
  low, high = np.percentile(gaps, [2.5, 97.5])
  return Interval(inside - outside, float(low), float(high)), inside, outside
