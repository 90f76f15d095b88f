"""Heads that are full or streaming for every prompt alike."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxheads.kvcache.budgets import (
  Parts,
  at_least,
  check_prompt,
  share,
  split,
)
from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.select import keep_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class StaticHeads(Policy):
  """The heads with the largest gates keep everything, the others stream.

  As many heads of all layers are full as the budget of the whole cache allows
  when the others keep `sinks` and `recent` tokens; what is left goes to the
  recent tokens of those. Generated tokens overwrite the oldest of them.

  Attributes:
    gates: How much each head of each layer needs the past, found beforehand.
      The lower layer, then the lower head wins a tie.
    sinks, recent: Tokens of streaming heads; fewer if the budget is too small.

  Source:
    DuoAttention, https://arxiv.org/abs/2410.10819. Differs: the budget counts
    tokens, not heads.
  """

  gates: tuple[tuple[float, ...], ...] = ()
  sinks: int = 16
  recent: int = 64

  def __post_init__(self) -> None:
    # Lists, as JSON gives them, would leave the policy unhashable.
    object.__setattr__(self, "gates", tuple(map(tuple, self.gates)))
    at_least(0, sinks=self.sinks)
    at_least(1, recent=self.recent)
    sizes = {len(layer) for layer in self.gates}
    if len(sizes) != 1 or 0 in sizes:
      raise ValueError(
        "`gates` must hold as many numbers for each layer as it has KV heads, "
        f"got {self.gates}."
      )

  @property
  def knows_heads(self) -> bool:
    return True

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    check_prompt(length, budget)
    gates = np.asarray(self.gates, np.float64)
    if gates.shape != tuple(shape):
      raise ValueError(
        f"`gates` are for {gates.shape[0]} layers of {gates.shape[1]} KV "
        f"heads, got {shape}."
      )
    total = gates.size
    tokens = share(budget, total * length)
    base = self.sinks + self.recent
    if tokens == total * length:
      count, streaming = total, Parts(length, 0, 0)
    else:
      spare = max(0, tokens - total * base)
      count = min(spare // max(1, length - base), total - 1)
      each = max(1, (tokens - count * length) // (total - count))
      streaming = split(each, self.sinks, each, 1)
    full = np.zeros(total, bool)
    full[np.argsort(-gates, axis=None, kind="stable")[:count]] = True
    full = full.reshape(shape)
    parts = {
      name: np.where(full, *pair).astype(np.int32)
      for name, pair in zip(
        Parts._fields,
        zip(Parts(length, 0, 0), streaming, strict=True),
        strict=True,
      )
    }
    slots = np.arange(shape.num_kv_heads) < full.sum(axis=-1, keepdims=True)
    by_head = np.where(full, length, streaming.tokens)
    return Plan(
      np.where(slots, length, streaming.tokens).astype(np.int32),
      np.where(slots, 0, max(1, streaming.recent)).astype(np.int32),
      parts,
      np.argsort(-by_head, axis=-1, kind="stable").astype(np.int32),
    )

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    tokens, heads, _ = window.k.shape
    return keep_parts(jnp.zeros((heads, tokens)), window.length, layer)
