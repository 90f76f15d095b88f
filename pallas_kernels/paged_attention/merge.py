"""Softmax over the parts of a row: how several steps become one output."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Greatest logit of a part that sees nothing: finite, so that no inf - inf
# appears.
LOWEST = -1e30

# Weighted sum of the values, greatest logit, sum of the weights.
Parts = tuple[Float[Array, "W Q H"], Float[Array, "W Q"], Float[Array, "W Q"]]


def merge(
  parts: Parts, row: Int[Array, " W"], rows: int
) -> Float[Array, "R Q H"]:
  """Softmax over all pages of a row; 0 where there is nothing."""
  values, peak, total = parts

  def add(x: Array) -> Array:
    return jax.ops.segment_sum(x, row, rows, indices_are_sorted=True)

  highest = jax.ops.segment_max(peak, row, rows, indices_are_sorted=True)
  share = jnp.exp(peak - highest.at[row].get(mode="clip"))
  total = add(total * share)
  values = add(values * share[..., None])
  return values / jnp.where(total > 0, total, 1.0)[..., None]
