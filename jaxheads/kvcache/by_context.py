"""A policy for models of which some layers have contexts."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.shard_only import ShardOnly
from jaxheads.s2 import Pattern


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByContext(Policy):
  """Layers with contexts keep what their heads can still see; others obey.

  Attributes:
    policy: Of layers in which every head sees everything; it gives no pages up
      while decoding.
    contexts: Of each layer, see `jaxheads.models.ModelConfig.contexts`; not
      all `None`.
  """

  policy: Policy
  contexts: tuple[Pattern | None, ...]

  @property
  def window(self) -> int:
    return self.policy.window

  @property
  def knows_lengths(self) -> bool:
    return self.policy.knows_lengths

  @property
  def knows_heads(self) -> bool:
    return self.policy.knows_heads

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    plan = self.policy.plan(length, budget, shape)
    sharded = self._sharded.plan(length, budget, shape)
    has_context = np.asarray([[c is not None] for c in self.contexts])
    heads = plan.heads
    if heads is None:  # Rows alike, or not asked for: nothing is given up.
      heads = np.broadcast_to(np.arange(shape.num_kv_heads), shape)
    assert sharded.heads is not None
    return Plan(
      np.where(has_context, sharded.lengths, plan.lengths),
      np.where(has_context, sharded.rings, plan.rings),
      {
        **plan.layers,
        **sharded.layers,
        "has_context": has_context[:, 0].astype(np.int32),
      },
      np.where(has_context, sharded.heads, heads).astype(np.int32),
    )

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    return jnp.where(
      layer["has_context"] > 0,
      self._sharded.keep(window, layer),
      self.policy.keep(window, layer),
    )

  def drops(
    self, position: int, page_size: int, shape: CacheShape
  ) -> Int[np.ndarray, "R K"]:
    # Layers without contexts are dense to it, and drop nothing.
    return self._sharded.drops(position, page_size, shape)

  @property
  def _sharded(self) -> ShardOnly:
    return ShardOnly(patterns=self.contexts)
