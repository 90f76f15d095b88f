"""The policy of a model: the user's, except where heads have contexts."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int

from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.shard_only import ShardOnly
from jaxheads.s2 import Pattern


@dataclasses.dataclass(frozen=True)
class LayerPolicies(Policy):
  """Layers with contexts keep what their heads can still see, others obey.

  Attributes:
    policy: Of layers in which every head sees everything.
    contexts: Of each layer, `ModelConfig.contexts`.
  """

  policy: Policy
  contexts: tuple[Pattern | None, ...]

  @property
  def window(self) -> int:
    return self.policy.window

  @property
  def knows_lengths(self) -> bool:
    return self.policy.knows_lengths

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    plan = self.policy.plan(length, budget, shape)
    sharded = self._sharded
    if sharded is None:
      return plan
    own = sharded.plan(length, budget, shape)
    assert own.heads is not None
    theirs = np.arange(shape.num_kv_heads) if plan.heads is None else plan.heads
    has_context = self._has_context
    return Plan(
      np.where(has_context, own.lengths, plan.lengths),
      np.where(has_context, own.rings, plan.rings),
      plan.layers,
      np.where(has_context, own.heads, theirs).astype(np.int32),
    )

  def keep_in(
    self, context: Pattern | None, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    """`keep` of a layer with this context."""
    if context is None:
      return self.policy.keep(window, layer)
    alone = ShardOnly(patterns=(context,))
    return alone.keep(window, {"pattern": 0})

  def drops(
    self, position: int, page_size: int, shape: CacheShape
  ) -> Int[np.ndarray, "R K"] | None:
    sharded = self._sharded
    if sharded is None:
      return self.policy.drops(position, page_size, shape)
    dropped = sharded.drops(position, page_size, shape)
    return np.where(self._has_context, dropped, -1).astype(np.int32)

  @property
  def _sharded(self) -> ShardOnly | None:
    if not any(self.contexts):
      return None
    return ShardOnly(patterns=self.contexts)

  @property
  def _has_context(self) -> Bool[np.ndarray, "R 1"]:
    return np.asarray([[context is not None] for context in self.contexts])
