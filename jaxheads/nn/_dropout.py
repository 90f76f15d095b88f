"""Dropout of attention weights."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


def resolve_deterministic(
  call: bool | None, constructor: bool | None, dropout_rate: float
) -> bool:
  """The call's flag, else the constructor's, else False if nothing drops."""
  deterministic = constructor if call is None else call
  if deterministic is None:
    if dropout_rate > 0:
      raise ValueError(
        "`deterministic` must be given, to the call or the constructor, "
        "because `dropout_rate` > 0."
      )
    deterministic = False
  return deterministic


def next_key(
  rngs: nnx.Rngs | nnx.RngStream | None, own: nnx.RngStream | None
) -> Array:
  """A key of the call's stream, or else of the module's own."""
  if rngs is None:
    rngs = own
  stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
  if stream is None:
    raise ValueError(
      "`rngs` must be given to the call: the module was made with "
      "`keep_rngs=False`."
    )
  return stream()


def drop(weights: Array, key: Array, *, rate: float, broadcast: bool) -> Array:
  """Zeroes a fraction of the weights [B, N, T, S] and scales the others.

  Args:
    weights: After the softmax.
    key: PRNG key.
    rate: Fraction to drop.
    broadcast: One mask [T, S] for the whole batch and all heads.
  """
  shape = (1, 1, *weights.shape[-2:]) if broadcast else weights.shape
  keep = jax.random.bernoulli(key, 1.0 - rate, shape)
  return jnp.where(keep, weights / (1.0 - rate), 0.0)
