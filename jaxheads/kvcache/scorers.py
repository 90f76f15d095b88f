"""What a cached token is worth: scores that `Ranked` allocates a budget by."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxheads.kvcache.budgets import at_least, check_choice
from jaxheads.kvcache.policy import LayerWindow
from jaxheads.kvcache.window import (
  GroupReduce,
  over_group,
  pooled_attention,
  window_attention,
)


class Scorer(Protocol):
  """Scores every token of every head; a hashable value."""

  @property
  def window(self) -> int:
    """Last queries that are looked at."""
    return 1

  def scores(
    self, window: LayerWindow, parts: dict[str, Any]
  ) -> Float[Array, "K S"]:
    """Finite float32 scores, larger is better.

    Args:
      window: One layer of one prompt. Scores from its `length` on may be
        anything, but not depend on what is there.
      parts: Which tokens are kept anyway, see
        `jaxheads.kvcache.select.keep_parts`.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowAttention(Scorer):
  """Attention of the last queries, smoothed over neighbours.

  Attributes:
    window: Queries.
    kernel: Tokens of the moving average, odd.
    group_reduce: How the query heads of a KV head make one score.

  Source:
    SnapKV, https://arxiv.org/abs/2404.14469.
  """

  window: int = 32
  kernel: int = 7
  group_reduce: GroupReduce = "mean"

  def __post_init__(self) -> None:
    at_least(1, window=self.window, kernel=self.kernel)
    if not self.kernel % 2:
      raise ValueError(f"`kernel` must be odd, got {self.kernel}.")
    check_choice(self, "group_reduce", ("mean", "max"))

  def scores(
    self, window: LayerWindow, parts: dict[str, Any]
  ) -> Float[Array, "K S"]:
    attention = over_group(
      window_attention(window), window.k.shape[1], self.group_reduce
    )
    return pooled_attention(attention, window.length, parts, kernel=self.kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyNorm(Scorer):
  """Small keys first, a control that reads no query.

  Source:
    https://arxiv.org/abs/2406.11430.
  """

  def scores(
    self, window: LayerWindow, parts: dict[str, Any]
  ) -> Float[Array, "K S"]:
    del parts
    return -jnp.linalg.norm(window.k.astype(jnp.float32), axis=-1).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chance(Scorer):
  """Random tokens, the same for every prompt: a control."""

  seed: int = 0

  def scores(
    self, window: LayerWindow, parts: dict[str, Any]
  ) -> Float[Array, "K S"]:
    del parts
    tokens, heads, _ = window.k.shape
    key = jax.random.fold_in(jax.random.key(self.seed), window.layer)
    # By token, so that padding changes nothing.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(tokens))
    return jax.vmap(lambda key: jax.random.uniform(key, (heads,)))(keys).T
