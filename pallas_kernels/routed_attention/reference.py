"""Routed attention by the definition: the oracle of the fast paths."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.head_attention.reference import visible
from pallas_kernels.routed_attention.operands import Operands, Settings


def attention(settings: Settings, operands: Operands) -> Float[Array, "rows H"]:
  """Every row against every key, in float32; takes rows x S x H memory."""
  q, k, v, packing, q_offset, mask, q_segment_ids, kv_segment_ids = operands
  _, length, heads = packing.row_of.shape
  batch, head = packing.row_batch, packing.row_head
  kv_head = head // (heads // k.shape[2])
  token = jnp.clip(packing.row_position, 0, length - 1)
  row_k = k[batch, :, kv_head].astype(jnp.float32)
  row_v = v[batch, :, kv_head].astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    logits = jnp.einsum("rh,rsh->rs", q.astype(jnp.float32), row_k)
  logits *= settings.scale
  seen = jnp.broadcast_to(packing.row_valid[:, None], logits.shape)
  positions = jnp.arange(length) + q_offset
  if settings.pattern is not None:
    seen &= visible(settings.pattern, positions, k.shape[1])[head, token]
    seen &= (positions >= 0)[token][:, None]
  elif settings.is_causal:
    seen &= jnp.arange(k.shape[1]) <= positions[token][:, None]
  if mask is not None:
    full = jnp.broadcast_to(mask, (k.shape[0], heads, length, k.shape[1]))
    seen &= full[batch, head, token]
  if q_segment_ids is not None and kv_segment_ids is not None:
    seen &= q_segment_ids[batch, token][:, None] == kv_segment_ids[batch]
  logits = jnp.where(seen, logits, -jnp.inf)
  peak = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
  weights = jnp.where(seen, jnp.exp(logits - peak), 0.0)
  total = weights.sum(-1, keepdims=True)
  weights /= jnp.where(total > 0, total, 1.0)
  with jax.default_matmul_precision("highest"):
    out = jnp.einsum("rs,rsh->rh", weights, row_v)
  return out.astype(q.dtype)
