"""Attention through the whole weight matrix."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attention_mask(
  q_length: int,
  kv_length: int,
  *,
  is_causal: bool = False,
  q_offset: Int[Array, ""] | int = 0,
  mask: Bool[Array, "#B #N #T S"] | None = None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
) -> Bool[Array, "#B #N T S"] | None:
  """Which keys each query sees, as one dense mask; `None` means all."""
  visible = []
  if is_causal:
    q_index = jnp.arange(q_length)[:, None] + q_offset
    visible.append((q_index >= jnp.arange(kv_length)[None])[None, None])
  if mask is not None:
    visible.append(mask)
  if q_segment_ids is not None and kv_segment_ids is not None:
    same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    visible.append(same[:, None])
  if not visible:
    return None
  result = visible[0]
  for other in visible[1:]:
    result = result & other
  return result


def dense_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  mask: Bool[Array, "#B #N #T S"] | None = None,
  scale: float,
  weights_fn: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
  """Attention of all heads through the whole weight matrix.

  Logits and softmax are float32. A query that sees no key gives 0.
  """
  batch, length, heads, head_dim = q.shape
  kv_length, kv_heads = k.shape[1:3]
  grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
  logits = scale * jnp.einsum(
    "btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32
  )
  logits = logits.reshape(batch, heads, length, kv_length)
  if mask is None:
    weights = jax.nn.softmax(logits)
  else:
    # Finite, so that a row without keys has no NaN; such a row is zeroed.
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits)
    weights = jnp.where(mask.any(-1, keepdims=True), weights, 0.0)
  if weights_fn is not None:
    weights = weights_fn(weights)
  weights = weights.reshape(batch, kv_heads, -1, length, kv_length)
  out = jnp.einsum(
    "bkgts,bskh->btkgh",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return out.reshape(q.shape).astype(q.dtype)
