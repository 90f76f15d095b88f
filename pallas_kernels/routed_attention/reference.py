"""Routed attention by the definition: the oracle of the fast paths."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.packing import Packing
from pallas_kernels.routed_attention.tiling import Tiling


def routed_attention(
  q: Float[Array, "rows H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  packing: Packing,
  *,
  scale: float,
  is_causal: bool,
  q_offset: Int[Array, ""],
  mask: Bool[Array, "#B #N #T S"] | None,
  q_segment_ids: Int[Array, "B T"] | None,
  kv_segment_ids: Int[Array, "B S"] | None,
  tiling: Tiling,
) -> Float[Array, "rows H"]:
  """Every row against every key, in float32; takes rows x S x H memory."""
  del tiling  # Nothing is tiled.
  _, length, heads = packing.row_of.shape
  batch, head = packing.row_batch, packing.row_head
  kv_head = head // (heads // k.shape[2])
  token = jnp.clip(packing.row_position, 0, length - 1)
  row_k = k[batch, :, kv_head].astype(jnp.float32)
  row_v = v[batch, :, kv_head].astype(jnp.float32)
  logits = scale * jnp.einsum("rh,rsh->rs", q.astype(jnp.float32), row_k)
  visible = jnp.broadcast_to(packing.row_valid[:, None], logits.shape)
  if is_causal:
    visible &= jnp.arange(k.shape[1]) <= (token + q_offset)[:, None]
  if mask is not None:
    full = jnp.broadcast_to(mask, (k.shape[0], heads, length, k.shape[1]))
    visible &= full[batch, head, token]
  if q_segment_ids is not None and kv_segment_ids is not None:
    visible &= q_segment_ids[batch, token][:, None] == kv_segment_ids[batch]
  logits = jnp.where(visible, logits, -jnp.inf)
  peak = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
  weights = jnp.where(visible, jnp.exp(logits - peak), 0.0)
  total = weights.sum(-1, keepdims=True)
  weights /= jnp.where(total > 0, total, 1.0)
  return jnp.einsum("rs,rsh->rh", weights, row_v).astype(q.dtype)
