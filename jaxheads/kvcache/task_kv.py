"""Task-KV: heads that say something of their own keep the whole prompt."""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxheads.kvcache.budgets import (
  Parts,
  as_layers,
  at_least,
  check_choice,
  check_prompt,
  descending_heads,
  full_and_parts,
  share,
)
from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.select import keep_parts, largest
from jaxheads.kvcache.window import (
  GroupReduce,
  PoolScope,
  Space,
  over_group,
  pooled_attention,
  prompt_tokens,
  semantic_vectors,
  window_attention,
)

Center = Literal["included", "extra", "off"]
Ranking = Literal["farthest", "nearest", "vnorm", "random", "static"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskKV(Policy):
  """Two classes of heads, told apart by each prompt, counted by depth.

  Heads are compared by their semantic vectors, see
  `jaxheads.kvcache.window.semantic_vectors`. Those farthest from the layer's
  mean, and the one nearest to it, keep everything. The others keep sinks,
  recent tokens, and the middle tokens with most window attention (smoothed);
  how many follows from the layer's budget, the same in every layer.

  Budgets too small for the full heads make them fewer; see
  `jaxheads.kvcache.budgets.full_and_parts` and `Plan.kept_fraction`. The
  published settings need 40 to 60 %.

  Attributes:
    window: Last queries that are looked at.
    sinks, recent: Tokens at both ends that every head keeps; `recent` holds
      the window.
    top: Tokens that enter a semantic vector.
    beta: Share of full heads in the first layer.
    m: Full heads in the last layer; a line in between.
    kernel: Tokens of the average that smooths attention, odd.
    pool_scope: Smooth the "middle" alone, so that sinks do not leak into it,
      or "all" tokens.
    center: The head nearest to the mean is "included" in the count of full
      heads (while that is 2 or more), is an "extra" one, or is not added
      ("off"). Goes with every ranking.
    ranking: Which heads are full: those "farthest" from the mean; or, to
      compare with, those "nearest" to it, those with the largest vectors
      ("vnorm"), "random" ones, or a "static" list.
    space: Where vectors are compared: each head's own "value" space as in the
      paper, or behind the output projection, "wo".
    renorm, group_reduce: See `semantic_vectors`.
    heads: For "static": the heads of each layer, the most important first;
      heads that are missing follow in their order.
    seed: For "random".
    decode: Compressed heads "append" generated tokens, or let them "roll" over
      the oldest recent ones.

  Raises:
    ValueError: A setting is out of range; the message names it.

  Source:
    Task-KV, https://arxiv.org/abs/2501.15113. Differs: KV heads decide for
    their group, and small budgets have rules. "extra", "wo" and all rankings
    but "farthest" are ours.
  """

  window: int = 32
  sinks: int = 16
  recent: int = 256
  top: int = 256
  beta: float = 0.25
  m: int = 1
  kernel: int = 7
  pool_scope: PoolScope = "middle"
  center: Center = "included"
  ranking: Ranking = "farthest"
  space: Space = "value"
  renorm: bool = False
  group_reduce: GroupReduce = "mean"
  heads: tuple[tuple[int, ...], ...] = ()
  seed: int = 0
  decode: Literal["append", "roll"] = "append"

  def __post_init__(self) -> None:
    at_least(1, window=self.window, top=self.top, kernel=self.kernel)
    at_least(0, sinks=self.sinks, m=self.m, seed=self.seed)
    if self.recent < self.window:
      raise ValueError(
        f"`recent` must be at least `window` ({self.window}), got "
        f"{self.recent}."
      )
    if not self.kernel % 2:
      raise ValueError(f"`kernel` must be odd, got {self.kernel}.")
    if not 0 <= self.beta <= 1:
      raise ValueError(f"`beta` must be in [0, 1], got {self.beta}.")
    check_choice(self, "pool_scope", ("middle", "all"))
    check_choice(self, "center", ("included", "extra", "off"))
    check_choice(
      self, "ranking", ("farthest", "nearest", "vnorm", "random", "static")
    )
    check_choice(self, "space", ("value", "wo"))
    check_choice(self, "group_reduce", ("mean", "max"))
    check_choice(self, "decode", ("append", "roll"))
    if (self.ranking == "static") != bool(self.heads):
      raise ValueError(
        f"`heads` must be given for `ranking` 'static' and only for it, got "
        f"{self.heads} for {self.ranking!r}."
      )

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    check_prompt(length, budget)
    heads = shape.num_kv_heads
    tokens = share(budget, heads * length)
    wanted = Parts(self.sinks, self.recent, 0)
    counts = descending_heads(shape, self.beta, self.m)
    if self.center == "extra":
      counts = np.minimum(counts + 1, heads)
    layers = [
      full_and_parts(length, tokens, heads, int(count), wanted, self.window)
      for count in counts
    ]
    full = np.asarray([count for count, _ in layers], np.int32)
    parts = as_layers([parts for _, parts in layers])
    compressed = np.arange(heads) >= full[:, None]
    each = parts["sinks"] + parts["recent"] + parts["middle"]
    lengths = np.where(compressed, each[:, None], np.int32(length))
    rings = np.zeros(shape, np.int32)
    if self.decode == "roll":
      ring = np.maximum(parts["recent"], 1)
      rings = np.where(compressed, ring[:, None], np.int32(0))
    # The nearest head is one of the full ones.
    least = {"included": 2, "extra": 1, "off": math.inf}[self.center]
    nearest = (full >= least).astype(np.int32)
    layer = {**parts, "full": full, "nearest": nearest}
    if self.ranking in ("random", "static"):
      layer["order"] = self._order(shape)
    return Plan(lengths, rings, layer)

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    attention = window_attention(window)
    vectors = semantic_vectors(
      window,
      attention,
      top=self.top,
      space=self.space,
      reduce=self.group_reduce,
      renorm=self.renorm,
    )
    distances = jnp.linalg.norm(vectors - vectors.mean(axis=0)[None], axis=-1)
    if self.ranking == "vnorm":
      scores = jnp.linalg.norm(vectors, axis=-1)
    elif self.ranking in ("farthest", "nearest"):
      scores = distances if self.ranking == "farthest" else -distances
    else:
      scores = -layer["order"].astype(jnp.float32)
    full = separate(scores, distances, layer["full"], layer["nearest"])
    pooled = pooled_attention(
      over_group(attention, len(vectors), self.group_reduce),
      window.length,
      layer,
      kernel=self.kernel,
      scope=self.pool_scope,
    )
    rest = keep_parts(pooled, window.length, layer)
    return jnp.where(full[:, None], prompt_tokens(window)[None], rest)

  def _order(self, shape: CacheShape) -> Int[np.ndarray, "R K"]:
    """Place of each head, 0 the first to be full."""
    layers, heads = shape
    if self.ranking == "random":
      rng = np.random.Generator(np.random.Philox(self.seed))
      return np.argsort(rng.random(shape), axis=-1).astype(np.int32)
    if len(self.heads) != layers:
      raise ValueError(
        f"`heads` must list the heads of {layers} layers, got "
        f"{len(self.heads)}."
      )
    order = np.empty(shape, np.int32)
    for layer, first in enumerate(self.heads):
      listed = dict.fromkeys((*first, *range(heads)))
      if len(set(first)) < len(first) or len(listed) > heads:
        raise ValueError(
          f"`heads[{layer}]` must hold different heads in [0, {heads}), got "
          f"{first}."
        )
      order[layer, list(listed)] = np.arange(heads)
    return order


def separate(
  scores: Float[Array, " K"],
  distances: Float[Array, " K"],
  full: Int[Array, ""],
  nearest: Int[Array, ""],
) -> Bool[Array, " K"]:
  """Heads that are full: the best by score, and the nearest of the others.

  Ties go to the lower head.

  Args:
    scores: Of each head, larger is better.
    distances: Of each head from the layer's mean.
    full: How many heads.
    nearest: How many of them, 0 or 1, are the nearest head.
  """
  best = largest(scores, (full - nearest)[None])
  rest = jnp.where(best, -jnp.inf, -distances)
  return best | largest(rest, nearest[None])
