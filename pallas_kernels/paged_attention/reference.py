"""Paged attention by the definition: the oracle of the fast paths."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.operands import Operands, Settings


def attention(settings: Settings, operands: Operands) -> Float[Array, "R Q H"]:
  """Every row against all that the table could hold, in float32."""
  q, k_pages, v_pages, table, seen, k_scales, v_scales = operands
  rows, entries = q.shape[0], table.pages.shape[0]
  page_size, size = k_pages.shape[1:]
  at = table.starts[:, None] + jnp.arange(entries)
  pages = table.pages.at[at].get(mode="clip")  # [R, entries]
  k, v = (
    _taken(x, scales, pages).reshape(rows, entries * page_size, size)
    for x, scales in ((k_pages, k_scales), (v_pages, v_scales))
  )
  visible = jnp.arange(entries * page_size) < seen[..., None]  # [R, Q, tokens]
  # What no row holds may be anything.
  held = visible.any(axis=1)[..., None]
  k, v = (jnp.where(held, x, 0.0) for x in (k, v))
  logits = settings.scale * jnp.einsum("rqh,rsh->rqs", q.astype(jnp.float32), k)
  logits = jnp.where(visible, logits, -jnp.inf)
  peak = jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
  weights = jnp.where(visible, jnp.exp(logits - peak), 0.0)
  total = weights.sum(-1, keepdims=True)
  weights /= jnp.where(total > 0, total, 1.0)
  return jnp.einsum("rqs,rsh->rqh", weights, v).astype(q.dtype)


def _taken(
  pool: Float[Array, "P page H"],
  scales: Float[Array, " P"] | None,
  pages: Int[Array, "R entries"],
) -> Float[Array, "R entries page H"]:
  """Pages by number, in float32."""
  taken = pool.at[pages].get(mode="clip").astype(jnp.float32)
  if scales is None:
    return taken
  scale = scales.astype(jnp.float32).at[pages].get(mode="clip")
  return taken * scale[..., None, None]
