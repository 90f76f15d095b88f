"""Keys and values of earlier tokens, for decoding."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
  """The variables of one layer, as `nnx.MultiHeadAttention` names them."""

  cached_key: nnx.Cache  # [B, slots, K, H]
  cached_value: nnx.Cache  # [B, slots, K, H]
  cache_index: nnx.Cache  # Tokens so far, int32 scalar.


def empty(
  input_shape: tuple[int, ...], num_kv_heads: int, head_dim: int, dtype: Any
) -> Cache:
  """A cache for inputs of shape (*batch, max length, features)."""
  size = 1
  for axis in input_shape[:-2]:
    size *= axis
  shape = (size, input_shape[-2], num_kv_heads, head_dim)
  return Cache(
    nnx.Cache(jnp.zeros(shape, dtype)),
    nnx.Cache(jnp.zeros(shape, dtype)),
    nnx.Cache(jnp.zeros((), jnp.int32)),
  )


def tokens_so_far(cache: Cache, k: Float[Array, "B T K H"]) -> Int[Array, ""]:
  """Tokens in the cache, which `k` continues.

  Raises:
    ValueError: There is no cache, or `k` does not fit in it.
  """
  if cache.cached_key is None or cache.cache_index is None:
    raise ValueError("The cache is not there: call `init_cache` first.")
  batch, max_length, kv_heads, head_dim = cache.cached_key.shape
  expected = (batch, kv_heads, head_dim)
  got = (k.shape[0], k.shape[2], k.shape[3])
  if got != expected or k.shape[1] > max_length:
    raise ValueError(
      f"`inputs_q` does not fit the cache: keys are {k.shape}, the cache is "
      f"{cache.cached_key.shape}."
    )
  return cache.cache_index[...]


def append(
  cache: Cache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> tuple[Float[Array, "B slots K H"], Float[Array, "B slots K H"]]:
  """Writes new keys and values; returns all slots, in their dtype."""
  index = cache.cache_index[...]
  start = (jnp.zeros_like(index), index, 0, 0)
  cached = []
  for variable, new in ((cache.cached_key, k), (cache.cached_value, v)):
    value = variable[...]
    value = jax.lax.dynamic_update_slice(value, new.astype(value.dtype), start)
    variable[...] = value
    cached.append(value.astype(new.dtype))
  cache.cache_index[...] = index + k.shape[1]
  return cached[0], cached[1]
