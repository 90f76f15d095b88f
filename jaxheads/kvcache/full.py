"""Everything is kept."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxheads.kvcache.budgets import check_prompt
from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.window import prompt_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Policy):
  """Every head keeps every token, whatever the budget."""

  @property
  def knows_heads(self) -> bool:
    return True

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    check_prompt(length, budget)
    return Plan(np.full(shape, length, np.int32), np.zeros(shape, np.int32), {})

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    del layer
    tokens, heads, _ = window.k.shape
    return jnp.broadcast_to(prompt_tokens(window), (heads, tokens))
