"""A policy for caches whose heads lie on several devices."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Int

from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByShard(Policy):
  """What another policy keeps, with the row slots of a head on its device.

  Row slots are sorted on each device alone. Where the prompt decides which
  head keeps most, nobody knows beforehand on which device that is: lengths are
  then bounds until the prompt has been read.

  Attributes:
    policy: What is kept; it looks at all heads of a layer.
    shards: Devices that share the KV heads of a layer evenly, neighbours
      together.
  """

  policy: Policy
  shards: int

  @property
  def window(self) -> int:
    return self.policy.window

  @property
  def knows_lengths(self) -> bool:
    return self.policy.knows_lengths and self.policy.knows_heads

  @property
  def places_early(self) -> bool:
    return self.policy.places_early

  @property
  def knows_heads(self) -> bool:
    return self.policy.knows_heads

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    plan = self.policy.plan(length, budget, shape)
    if not self.knows_lengths:
      return self._bounds(plan)
    heads = plan.heads
    if heads is None:  # All alike.
      heads = np.broadcast_to(np.arange(shape.num_kv_heads), shape)
    slot_of_head = np.argsort(heads, axis=-1)
    lengths, rings = (
      self._by_shard(np.take_along_axis(x, slot_of_head, axis=-1))
      for x in (plan.lengths, plan.rings)
    )
    order = np.argsort(-lengths, axis=-1, kind="stable")
    first = np.arange(self.shards)[:, None] * lengths.shape[-1]
    lengths, rings = (
      np.take_along_axis(x, order, axis=-1).reshape(shape)
      for x in (lengths, rings)
    )
    heads = (order + first).reshape(shape).astype(np.int32)
    return Plan(lengths, rings, plan.layers, heads)

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    return self.policy.keep(window, layer)

  def drops(
    self, position: int, page_size: int, shape: CacheShape
  ) -> Int[np.ndarray, "R K"] | None:
    return self.policy.drops(position, page_size, shape)

  def _bounds(self, plan: Plan) -> Plan:
    """The j-th longest row of a device is at most the j-th longest of all."""
    size = plan.lengths.shape[-1] // self.shards
    # No row from there on has a smaller ring: 0 if any of them may grow.
    least = np.minimum.accumulate(plan.rings[:, ::-1], axis=-1)[:, ::-1]
    lengths, rings = (
      np.tile(x[:, :size], self.shards) for x in (plan.lengths, least)
    )
    return Plan(lengths, rings, plan.layers, rings_by_rank=plan.rings)

  def _by_shard(self, x: Int[np.ndarray, "R K"]) -> Int[np.ndarray, "R s k"]:
    return x.reshape(len(x), self.shards, -1)


def rings_of(by_rank: Any, lengths: Any, heads: Any, xp: Any = np) -> Any:
  """Rings of a prompt's row slots, now that it is known whose they are.

  Args:
    by_rank: `Plan.rings_by_rank`.
    lengths: Tokens that each row slot keeps, [R, K].
    heads: The KV head of each.
    xp: `numpy`, or `jax.numpy` for JAX arrays.
  """
  by_head = xp.take_along_axis(lengths, xp.argsort(heads, axis=-1), axis=-1)
  rank = xp.argsort(xp.argsort(-by_head, axis=-1, stable=True), axis=-1)
  rings = xp.take_along_axis(by_rank, rank, axis=-1)
  return xp.take_along_axis(rings, heads, axis=-1)
