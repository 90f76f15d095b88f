"""Attention that queries to come are expected to pay."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxheads.kvcache.budgets import at_least
from jaxheads.kvcache.policy import LayerWindow
from jaxheads.kvcache.scorers import Scorer
from jaxheads.kvcache.select import middle
from jaxheads.kvcache.window import softmax_over
from jaxheads.rope import apply_rope, rope_angles, rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Scorer):
  """Expected attention of future queries, times the size of the value.

  Queries are taken for Gaussian: mean mu and covariance Sigma of the last ones
  with their rotation undone, then rotated by the average of the next `future`
  positions' rotations. The expectation of exp(q k / sqrt(H)) is

    exp(k mu / sqrt(H) + k Sigma k / (2 H))

  normalised over the tokens that are neither sinks nor recent, averaged over
  the query heads of a KV head, and multiplied by |v|.

  Attributes:
    window: Queries that give the statistics; those of sinks are left out.
    future: Positions that the expectation looks ahead.
    theta: Base of the model's rotary embedding.

  Source:
    Expected Attention, https://arxiv.org/abs/2510.00636. Differs: statistics
    of the last queries, not of the whole prompt's.
  """

  window: int = 128
  future: int = 512
  theta: float = 10_000.0

  def __post_init__(self) -> None:
    at_least(1, window=self.window, future=self.future)
    if not self.theta > 0:
      raise ValueError(f"`theta` must be positive, got {self.theta}.")

  def scores(
    self, window: LayerWindow, parts: dict[str, Any]
  ) -> Float[Array, "K S"]:
    tokens, kv_heads, size = window.k.shape
    mean, covariance = self._next_queries(window, parts)
    mean = mean.reshape(kv_heads, -1, size)
    covariance = covariance.reshape(kv_heads, -1, size, size)
    k = window.k.astype(jnp.float32)
    linear = jnp.einsum("skh,kgh->kgs", k, mean, precision="highest")
    spread = jnp.einsum("skh,kghi->kgsi", k, covariance, precision="highest")
    quadratic = jnp.einsum("kgsi,ski->kgs", spread, k, precision="highest")
    logits = linear * size**-0.5 + quadratic / (2 * size)
    between = middle(tokens, window.length, parts)
    expected = softmax_over(between[:, None], logits).mean(axis=1)
    norms = jnp.linalg.norm(window.v.astype(jnp.float32), axis=-1).T
    return jnp.where(between, expected * norms, 0.0)

  def _next_queries(
    self, window: LayerWindow, parts: dict[str, Any]
  ) -> tuple[Float[Array, "N H"], Float[Array, "N H H"]]:
    """Mean and covariance of the queries to come."""
    rows, _, size = window.q.shape
    position = window.length - rows + jnp.arange(rows)
    counts = (position >= parts["sinks"]) & (position >= 0)
    q = jnp.where(counts[:, None, None], window.q.astype(jnp.float32), 0.0)
    q = apply_rope(q, -position, theta=self.theta)
    count = jnp.maximum(counts.sum(), 1).astype(jnp.float32)
    mean = q.sum(axis=0) / count
    centred = jnp.where(counts[:, None, None], q - mean[None], 0.0)
    covariance = jnp.einsum(
      "lnh,lni->nhi", centred, centred, precision="highest"
    )
    ahead = window.length + jnp.arange(self.future)
    cos, sin = rope_angles(ahead, size, theta=self.theta)
    cos, sin = cos.mean(axis=0)[None], sin.mean(axis=0)[None]
    covariance = rotate(covariance / count, cos[None], sin[None])
    covariance = rotate(covariance.mT, cos[None], sin[None])
    return rotate(mean, cos, sin), covariance
