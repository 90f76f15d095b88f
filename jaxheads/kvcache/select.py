"""From scores to keep sets; every count is data, so nothing recompiles."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def largest(
  scores: Float[Array, "*K S"], count: Int[Array, "*#K 1"]
) -> Bool[Array, "*K S"]:
  """The `count` largest scores of each row; the lowest index wins ties."""
  ordered = jnp.sort(scores, axis=-1, descending=True)
  last = jnp.clip(count - 1, 0, scores.shape[-1] - 1)
  least = jnp.take_along_axis(ordered, last, axis=-1)
  more, equal = scores > least, scores == least
  room = count - more.sum(axis=-1, keepdims=True, dtype=jnp.int32)
  place = jnp.cumsum(equal, axis=-1, dtype=jnp.int32)
  return more | (equal & (place <= room))


def middle(
  size: int, length: Int[Array, ""], parts: dict[str, Any]
) -> Bool[Array, "#K S"]:
  """Tokens that are neither sinks nor recent; see `keep_parts`."""
  at = jnp.arange(size)[None]
  sinks, recent = by_head(parts["sinks"]), by_head(parts["recent"])
  return (at >= sinks) & (at < length - recent)


def keep_parts(
  scores: Float[Array, "K S"], length: Int[Array, ""], parts: dict[str, Any]
) -> Bool[Array, "K S"]:
  """First and last tokens of each head, and the best in between.

  Args:
    scores: Of each token; only those in between are compared.
    length: Tokens of the prompt.
    parts: The integers "sinks", "recent" and "middle", see
      `jaxheads.kvcache.budgets.Parts`; of all heads, or one a head, [K].
  """
  size = scores.shape[-1]
  between = middle(size, length, parts)
  scores = jnp.where(between, scores, -jnp.inf)
  best = largest(scores, by_head(parts["middle"]))
  outside = (jnp.arange(size) < length)[None] & ~between
  return outside | (between & best)


def by_head(number: Int[Array, "*K"]) -> Int[Array, "#K 1"]:
  """A number of all heads, or one of each, beside their tokens."""
  return jnp.atleast_1d(number)[:, None]
