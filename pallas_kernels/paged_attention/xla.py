"""Paged attention in plain JAX: a few pages at a time, then a merge by row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.merge import LOWEST, Parts, merge
from pallas_kernels.paged_attention.operands import (
  Operands,
  Settings,
  as_floats,
)
from pallas_kernels.paged_attention.steps import make_steps

# Tokens of a turn of the loop: their keys and values stay in a core's cache
# (measured with `experiments/bench_decode.py` on a CPU).
_TOKENS = 4096


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Nothing is refused."""
  del settings, operands
  return None


def attention(settings: Settings, operands: Operands) -> Float[Array, "R Q H"]:
  """See `operands.Implementation`."""
  q, k_pages, v_pages, table, seen, k_scales, v_scales = operands
  rows, queries, size = q.shape
  page_size = operands.page_size
  steps = make_steps(table, page_size, page_size)
  turn = max(1, min(_TOKENS // page_size, steps.row.shape[0]))
  padding = -steps.row.shape[0] % turn
  row = jnp.pad(steps.row, (0, padding), constant_values=rows)
  first = jnp.pad(steps.first, (0, padding))

  def attend(index: Array, parts: Parts) -> Parts:
    at = index * turn
    which, start = (
      jax.lax.dynamic_slice_in_dim(x, at, turn) for x in (row, first)
    )
    entry = table.starts.at[which].get(mode="clip") + start // page_size
    page = table.pages.at[entry].get(mode="clip")
    limit = seen.at[which].get(mode="fill", fill_value=0) - start[:, None]
    new = _part(
      settings.scale,
      q.at[which].get(mode="clip"),
      _take(k_pages, page),
      _take(v_pages, page),
      limit,
      *(
        None if x is None else x.at[page].get(mode="clip")
        for x in (k_scales, v_scales)
      ),
    )
    return jax.tree.map(
      lambda all_, some: jax.lax.dynamic_update_slice_in_dim(all_, some, at, 0),
      parts,
      new,
    )

  length = row.shape[0]
  empty = (
    jnp.zeros((length, queries, size), jnp.float32),
    jnp.full((length, queries), LOWEST, jnp.float32),
    jnp.zeros((length, queries), jnp.float32),
  )
  turns = -(-steps.num_steps // turn)
  parts = jax.lax.fori_loop(jnp.zeros_like(turns), turns, attend, empty)
  return merge(parts, row, rows).astype(q.dtype)


def _take(
  pool: Float[Array, "P page H"], page: Int[Array, " c"]
) -> Float[Array, "c page H"]:
  """Pages by number."""
  if jnp.issubdtype(pool.dtype, jnp.unsignedinteger):
    return as_floats(pool.at[page].get(mode="clip"))
  # As integers, and inside the loop: XLA's CPU compiler would otherwise make a
  # float32 copy of the whole of a bfloat16 pool.
  pool, page = jax.lax.optimization_barrier((pool, page))
  bits = jnp.dtype(f"uint{8 * pool.dtype.itemsize}")
  taken = jax.lax.bitcast_convert_type(pool, bits).at[page].get(mode="clip")
  return jax.lax.bitcast_convert_type(taken, pool.dtype)


def _part(
  scale: float,
  q: Float[Array, "c Q H"],
  k: Float[Array, "c page H"],
  v: Float[Array, "c page H"],
  limit: Int[Array, "c Q"],
  k_scale: Float[Array, " c"] | None,
  v_scale: Float[Array, " c"] | None,
) -> Parts:
  """Of one page each; a query sees tokens before its limit."""
  tokens = jnp.arange(k.shape[1], dtype=jnp.int32)
  held = (tokens < limit.max(axis=1, keepdims=True))[..., None]
  # What no query sees may be anything.
  v = jnp.where(held, v.astype(jnp.float32), 0.0)
  logits = scale * jnp.einsum(
    "cqh,cph->cqp", q.astype(jnp.float32), k.astype(jnp.float32)
  )
  if k_scale is not None:
    logits *= k_scale.astype(jnp.float32)[:, None, None]
  visible = tokens < limit[..., None]
  logits = jnp.where(visible, logits, LOWEST)
  peak = logits.max(axis=-1)
  weights = jnp.where(visible, jnp.exp(logits - peak[..., None]), 0.0)
  values = jnp.einsum("cqp,cph->cqh", weights, v)
  if v_scale is not None:
    seen = limit.max(axis=1) > 0
    v_scale = jnp.where(seen, v_scale.astype(jnp.float32), 0.0)
    values *= v_scale[:, None, None]
  return values, peak, weights.sum(axis=-1)
