"""StreamingLLM: the first tokens and the last ones."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxheads.kvcache.budgets import (
  Parts,
  as_layers,
  at_least,
  check_prompt,
  even_share,
  split,
)
from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.select import keep_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
  """A few sinks, and for the rest of the budget the newest tokens.

  Generated tokens overwrite the oldest of those, so that rows do not grow;
  at budget 1 they are appended and nothing is lost.

  Attributes:
    sinks: First tokens that stay; fewer if the budget is smaller than that.

  Source:
    StreamingLLM, https://arxiv.org/abs/2309.17453.
  """

  sinks: int = 4

  def __post_init__(self) -> None:
    at_least(0, sinks=self.sinks)

  @property
  def knows_heads(self) -> bool:
    return True

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    check_prompt(length, budget)
    tokens = even_share(length, budget, shape.num_kv_heads)
    if tokens == length:
      parts, ring = Parts(length, 0, 0), 0
    else:
      parts = split(tokens, self.sinks, tokens, 1)
      ring = max(1, parts.recent)
    return Plan(
      np.full(shape, tokens, np.int32),
      np.full(shape, ring, np.int32),
      as_layers([parts] * shape.num_layers),
    )

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    tokens, heads, _ = window.k.shape
    return keep_parts(jnp.zeros((heads, tokens)), window.length, layer)
