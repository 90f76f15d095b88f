"""How many tokens: the host's integer arithmetic of cache budgets.

Devices get the integers as data, so there is no traced twin to keep equal.
"""

import math
from fractions import Fraction
from numbers import Integral
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxheads.kvcache.policy import CacheShape


class Parts(NamedTuple):
  """What a row keeps: first tokens, last tokens, and the best in between."""

  sinks: int
  recent: int
  middle: int

  @property
  def tokens(self) -> int:
    """Tokens in all."""
    return sum(self)


def check_prompt(length: int, budget: float) -> None:
  """Raises a ValueError that names what is out of range."""
  if length < 1:
    raise ValueError(f"`length` must be at least 1, got {length}.")
  if not 0 < budget <= 1:
    raise ValueError(f"`budget` must be in (0, 1], got {budget}.")


def share(fraction: float, tokens: int) -> int:
  """The whole tokens in a fraction of them.

  The fraction counts as the decimal it prints as: 0.29 of 100 tokens are 29,
  although the float 0.29 is a little less than that.
  """
  return math.floor(Fraction(str(fraction)) * tokens)


def even_share(length: int, budget: float, heads: int) -> int:
  """Tokens of each head when a layer's budget is dealt evenly; at least 1."""
  return max(1, share(budget, heads * length) // heads)


def split(tokens: int, sinks: int, recent: int, least: int) -> Parts:
  """The parts of a row of so many tokens.

  What sinks and recent tokens leave is for the best of the middle. Too few
  tokens take from the recent ones, down to `least`, then from the sinks, down
  to 1 if there were any, then from the recent ones again.

  Source:
    Task-KV, https://arxiv.org/abs/2501.15113, Eq. 17, with rules for the
    budgets on which it is silent.
  """
  if tokens >= sinks + recent:
    return Parts(sinks, recent, tokens - sinks - recent)
  sinks = min(sinks, max(1, tokens - least))
  return Parts(sinks, tokens - sinks, 0)


def descending_heads(
  shape: CacheShape, beta: float, m: int
) -> Int[np.ndarray, " R"]:
  """Heads that stay full in each layer: a line from beta K down to m.

  Rounded to the nearest integer, halves upward, and clipped to [0, K]. A single
  layer takes the line's start.

  Source:
    Task-KV, https://arxiv.org/abs/2501.15113, Eq. 16.
  """
  layers, heads = shape
  first = Fraction(str(beta)) * heads
  step = (first - m) / max(1, layers - 1)
  counts = [
    math.floor(first - r * step + Fraction(1, 2)) for r in range(layers)
  ]
  return np.clip(counts, 0, heads).astype(np.int32)


def full_and_parts(
  length: int, tokens: int, heads: int, full: int, wanted: Parts, least: int
) -> tuple[int, Parts]:
  """Full heads of a layer, and what each of its other heads keeps.

  Each of the other heads keeps what the full ones leave of the layer's tokens,
  divided evenly and rounded down. As long as that is less than the sinks and
  `least` recent tokens, there is one full head less. Prompts no longer than
  sinks and recent tokens are kept whole, whatever the budget.

  Args:
    length: Tokens of the prompt.
    tokens: Budget of the layer.
    heads: KV heads.
    full: Full heads that are wanted.
    wanted: Sinks and recent tokens that are wanted; its middle is not read.
    least: Recent tokens that another head needs, while any is full.
  """
  sinks, recent, _ = wanted
  everything = heads, Parts(length, 0, 0)
  if length <= sinks + recent or tokens >= heads * length:
    return everything
  full = min(full, heads - 1)  # There is no room for all.
  while full and (tokens - full * length) // (heads - full) < sinks + least:
    full -= 1
  each = max(1, (tokens - full * length) // (heads - full))
  return full, split(each, sinks, recent, least)


def as_layers(parts: list[Parts]) -> dict[str, np.ndarray]:
  """The parts of each layer, as `Policy.keep` takes them."""
  columns = np.asarray(parts, np.int32).T
  return dict(zip(Parts._fields, columns, strict=True))


def at_least(least: int, **numbers: int) -> None:
  """Raises a ValueError that names the first smaller number, or no integer."""
  for name, number in numbers.items():
    if not isinstance(number, Integral):
      raise ValueError(f"`{name}` must be an integer, got {number!r}.")
    if number < least:
      raise ValueError(f"`{name}` must be at least {least}, got {number}.")


def check_choice(owner: object, name: str, choices: tuple[str, ...]) -> None:
  """Raises a ValueError if the attribute is none of the choices."""
  value = getattr(owner, name)
  if value not in choices:
    listed = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")
