"""Keys and values of earlier tokens, for decoding."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxheads.decoding import cache_slots
from pallas_kernels.head_attention import HeadContexts
from pallas_kernels.value_checks import check_values


class Cache(NamedTuple):
  """The variables of one layer, as `nnx.MultiHeadAttention` names them."""

  cached_key: nnx.Cache  # [B, K, slots, H]: what one KV head reads is together
  cached_value: nnx.Cache  # [B, K, slots, H]
  cache_index: nnx.Cache  # Tokens so far, int32 scalar.


def empty(
  input_shape: tuple[int, ...],
  num_kv_heads: int,
  head_dim: int,
  dtype: Any,
  pattern: HeadContexts | None,
) -> Cache:
  """A cache for inputs of shape (*batch, max length, features).

  It holds whole pages, hence sometimes more tokens than asked for.
  """
  slots = cache_slots(input_shape[-2], pattern)
  shape = (math.prod(input_shape[:-2]), num_kv_heads, slots, head_dim)
  return Cache(
    nnx.Cache(jnp.zeros(shape, dtype)),
    nnx.Cache(jnp.zeros(shape, dtype)),
    nnx.Cache(jnp.zeros((), jnp.int32)),
  )


def tokens_so_far(cache: Cache, k: Float[Array, "B T K H"]) -> Int[Array, ""]:
  """Tokens in the cache, which `k` continues.

  Raises:
    ValueError: There is no cache, or `k` does not fit in it. How full it is is
      known outside of jit only; under it see `jaxheads.checks`.
  """
  if cache.cached_key is None or cache.cache_index is None:
    raise ValueError("The cache is not there: call `init_cache` first.")
  batch, kv_heads, max_length, head_dim = cache.cached_key.shape
  expected = (batch, kv_heads, head_dim)
  got = (k.shape[0], k.shape[2], k.shape[3])
  if got != expected or k.shape[1] > max_length:
    raise ValueError(
      f"`inputs_q` does not fit the cache: keys are {k.shape}, the cache has "
      f"room for {(batch, max_length, kv_heads, head_dim)}."
    )
  index = cache.cache_index[...]
  most = max_length - k.shape[1]
  check_values(
    "cache_index",
    (index,),
    lambda index: ((index >= 0) & (index <= most), index),
    f"be in [0, {most}], so that the cache of {max_length} tokens has room for "
    f"the {k.shape[1]} tokens of `inputs_q`",
  )
  return index


def append(
  cache: Cache, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> None:
  """Writes new keys and values."""
  index = cache.cache_index[...]
  zero = jnp.zeros_like(index)
  for variable, new in ((cache.cached_key, k), (cache.cached_value, v)):
    value = variable[...]
    new = new.swapaxes(1, 2).astype(value.dtype)
    variable[...] = _write(value, new, (zero, zero, index, zero))
  cache.cache_index[...] = index + k.shape[1]


def _write(value: Array, new: Array, start: tuple[Array, ...]) -> Array:
  """As `jax.lax.dynamic_update_slice`, in place."""
  # In a loop, of one turn that XLA does not know to be one: its CPU compiler
  # fuses a bare update into every reader, each with a copy of the cache.
  return jax.lax.fori_loop(
    0,
    jnp.minimum(start[2] + 1, 1),
    lambda _, value: jax.lax.dynamic_update_slice(value, new, start),
    value,
  )


def slots(
  cache: Cache, dtype: Any
) -> tuple[Float[Array, "B slots K H"], Float[Array, "B slots K H"]]:
  """All keys and values, as attention takes them; a copy."""
  k, v = (
    variable[...].swapaxes(1, 2).astype(dtype)
    for variable in (cache.cached_key, cache.cached_value)
  )
  return k, v
