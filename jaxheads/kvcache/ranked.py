"""A scorer and how its budget is dealt: SnapKV, PyramidKV, AdaKV and others."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxheads.kvcache.budgets import (
  Parts,
  as_layers,
  at_least,
  check_prompt,
  even_share,
  share,
  split,
)
from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.scorers import Scorer, WindowAttention
from jaxheads.kvcache.select import keep_parts, largest, middle
from jaxheads.kvcache.window import prompt_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked(Policy):
  """Sinks, recent tokens, and the middle tokens with the best scores.

    slope  floor
      1      1     as many for every head and layer: SnapKV, with its scorer
     20      1     fewer in deep layers: PyramidKV
      1     0.2    heads of a layer compete: AdaKV
     20     0.2    both: Ada-PyramidKV

  Attributes:
    scorer: What a token is worth.
    sinks, recent: Tokens at both ends that every head keeps, fewer if the
      budget is too small; recent `None` is the scorer's window.
    slope: Middle tokens of the average layer over those of the last; layers
      before it follow a line, as far up as the prompt is long.
    floor: Share of an even budget that each head gets for its own best tokens;
      the rest of the layer's goes to the best scores of any head. Below 1
      lengths depend on the prompt.

  Raises:
    ValueError: A setting is out of range; the message names it.

  Source:
    SnapKV, https://arxiv.org/abs/2404.14469; PyramidKV,
    https://arxiv.org/abs/2406.02069; AdaKV, https://arxiv.org/abs/2407.11550.
    Differs: PyramidKV's budget is a fraction of the prompt, and never exceeded.
  """

  scorer: Scorer = dataclasses.field(default_factory=WindowAttention)
  sinks: int = 0
  recent: int | None = None
  slope: float = 1.0
  floor: float = 1.0

  def __post_init__(self) -> None:
    at_least(0, sinks=self.sinks, recent=self.recent or 0)
    if not 1 <= self.slope < math.inf:
      raise ValueError(f"`slope` must be at least 1, got {self.slope}.")
    if not 0 <= self.floor <= 1:
      raise ValueError(f"`floor` must be in [0, 1], got {self.floor}.")

  @property
  def window(self) -> int:
    return self.scorer.window

  @property
  def knows_lengths(self) -> bool:
    return self.floor == 1

  @property
  def knows_heads(self) -> bool:
    return self.floor == 1

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    check_prompt(length, budget)
    layers, heads = shape
    tokens = even_share(length, budget, heads)
    if tokens == length:
      parts = [Parts(length, 0, 0)] * layers
    else:
      recent = self.scorer.window if self.recent is None else self.recent
      even = split(tokens, self.sinks, recent, min(1, recent))
      most = length - even.sinks - even.recent
      parts = [
        even._replace(middle=count)
        for count in _line(even.middle, most, self.slope, layers)
      ]
    each = np.asarray([part.tokens for part in parts], np.int32)
    layer = as_layers(parts)
    own = [
      max(0, share(self.floor, part.tokens) - part.sinks - part.recent)
      for part in parts
    ]
    layer["own"] = np.asarray(own, np.int32)
    # The j-th longest row is longest when j rows are as long, and the others
    # have what is their own.
    longer = np.arange(1, heads + 1)
    least = (each - layer["middle"] + layer["own"])[:, None]
    bound = (heads * each[:, None] - (heads - longer) * least) // longer
    lengths = np.minimum(bound, length).astype(np.int32)
    return Plan(lengths, np.zeros(shape, np.int32), layer)

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    scores = self.scorer.scores(window, layer)
    if self.floor == 1:
      return keep_parts(scores, window.length, layer)
    return _compete(scores, window, layer)


def _line(even: int, most: int, slope: float, layers: int) -> list[int]:
  """Middle tokens of each layer, falling; on average at most `even`."""
  last = Fraction(even) / Fraction(str(slope))
  first = 2 * even - last
  if first > most:
    first, last = Fraction(most), Fraction(2 * even - most)
  if layers == 1:
    return [even]
  step = (first - last) / (layers - 1)
  return [math.floor(first - r * step) for r in range(layers)]


def _compete(
  scores: Float[Array, "K S"], window: LayerWindow, layer: dict[str, Any]
) -> Bool[Array, "K S"]:
  """The best middle tokens of all heads, after each head's own best."""
  heads, tokens = scores.shape
  between = middle(tokens, window.length, layer)
  scores = jnp.where(between, scores, -jnp.inf)
  own = largest(scores, layer["own"][None, None])
  scores = jnp.where(own & between, jnp.inf, scores)
  best = largest(scores.reshape(-1), heads * layer["middle"][None])
  best = between & best.reshape(heads, tokens)
  return best | (prompt_tokens(window)[None] & ~between)
