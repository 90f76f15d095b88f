"""The policy of a model: the user's, except where heads have contexts."""

import dataclasses

import numpy as np
from jaxtyping import Int

from jaxheads.kvcache.policy import CacheShape, Plan, Policy
from jaxheads.kvcache.shard_only import ShardOnly
from jaxheads.s2 import Pattern


@dataclasses.dataclass(frozen=True)
class LayerPolicies:
  """Layers with contexts keep what their heads can still see, others obey.

  Attributes:
    policy: Of layers in which every head sees everything.
    contexts: Of each layer, `ModelConfig.contexts`.
  """

  policy: Policy
  contexts: tuple[Pattern | None, ...]

  @property
  def window(self) -> int:
    """See `Policy`."""
    return self.policy.window

  @property
  def knows_lengths(self) -> bool:
    """See `Policy`."""
    return self.policy.knows_lengths or None not in self.contexts

  def of(self, context: Pattern | None) -> Policy:
    """The policy of a layer with this context."""
    return self.policy if context is None else ShardOnly(context)

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    """See `Policy`."""
    plan = self.policy.plan(length, budget, shape)
    lengths, rings = plan.lengths.copy(), plan.rings.copy()
    for layer, context in enumerate(self.contexts):
      if context is not None:
        own = self.of(context).plan(length, budget, _one_layer(shape))
        lengths[layer], rings[layer] = own.lengths[0], own.rings[0]
    return Plan(lengths, rings, plan.layers)

  def drops(
    self, position: int, page_size: int, shape: CacheShape
  ) -> Int[np.ndarray, "R K"] | None:
    """See `Policy`."""
    dropped = [
      None
      if context is None
      else self.of(context).drops(position, page_size, _one_layer(shape))
      for context in self.contexts
    ]
    if all(layer is None for layer in dropped):
      return None
    nothing = np.full((1, shape.num_kv_heads), -1, np.int32)
    return np.concatenate(
      [nothing if layer is None else layer for layer in dropped]
    )


def _one_layer(shape: CacheShape) -> CacheShape:
  return shape._replace(num_layers=1)
