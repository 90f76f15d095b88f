"""Paged attention in plain JAX: a few pages at a time, then a merge by row.

A step is a few pages of a row, and a turn of the loop computes many steps: the
time follows the pages that are there, however uneven the rows are.
"""

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

# Tokens of a turn of the loop: their keys and values stay in a core's cache.
_TOKENS = 4096
# Tokens of a step, unless a page is longer: smaller products are slower than
# the tokens that the last step of a row computes in vain.
_STEP = 256


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Nothing is refused."""
  del settings, operands
  return None


def attention(settings: Settings, operands: Operands) -> Float[Array, "R Q H"]:
  """See `operands.Implementation`."""
  q, k_pages, v_pages, table, seen, k_scales, v_scales = operands
  rows, queries, size = q.shape
  page_size = operands.page_size
  pages = max(1, _STEP // page_size)
  tokens = pages * page_size
  steps = make_steps(table, tokens, page_size)
  turn = max(1, min(_TOKENS // tokens, steps.row.shape[0]))
  padding = -steps.row.shape[0] % turn
  row = jnp.pad(steps.row, (0, padding), constant_values=rows)
  first = jnp.pad(steps.first, (0, padding))

  def attend(index: Array, parts: Parts) -> Parts:
    at = index * turn
    which, start = (
      jax.lax.dynamic_slice_in_dim(x, at, turn) for x in (row, first)
    )
    entry = table.starts.at[which].get(mode="clip") + start // page_size
    page = table.pages.at[entry[:, None] + jnp.arange(pages)].get(mode="clip")
    limit = seen.at[which].get(mode="fill", fill_value=0) - start[:, None]

    def per_token(scales: Array | None) -> Array | None:
      if scales is None:
        return None
      scales = scales.astype(jnp.float32).at[page].get(mode="clip")
      return jnp.repeat(scales, page_size, axis=1)

    new = _part(
      settings.scale,
      q.at[which].get(mode="clip"),
      _take(k_pages, page),
      _take(v_pages, page),
      limit,
      per_token(k_scales),
      per_token(v_scales),
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
  pool: Float[Array, "P page H"], page: Int[Array, "c pages"]
) -> Float[Array, "c tokens H"]:
  """Pages by number."""
  if jnp.issubdtype(pool.dtype, jnp.unsignedinteger):
    taken = as_floats(pool.at[page].get(mode="clip"))
  else:
    # As integers, and inside the loop: XLA's CPU compiler would otherwise make
    # a float32 copy of the whole of a bfloat16 pool.
    pool, page = jax.lax.optimization_barrier((pool, page))
    bits = jnp.dtype(f"uint{8 * pool.dtype.itemsize}")
    taken = jax.lax.bitcast_convert_type(pool, bits).at[page].get(mode="clip")
    taken = jax.lax.bitcast_convert_type(taken, pool.dtype)
  return taken.reshape(page.shape[0], -1, pool.shape[2])


def _part(
  scale: float,
  q: Float[Array, "c Q H"],
  k: Float[Array, "c tokens H"],
  v: Float[Array, "c tokens H"],
  limit: Int[Array, "c Q"],
  k_scale: Float[Array, "c tokens"] | None,
  v_scale: Float[Array, "c tokens"] | None,
) -> Parts:
  """Of one step each; a query sees tokens before its limit."""
  tokens = jnp.arange(k.shape[1], dtype=jnp.int32)
  held = tokens < limit.max(axis=1, keepdims=True)
  # What no query sees may be anything.
  v = jnp.where(held[..., None], v.astype(jnp.float32), 0.0)
  logits = scale * jnp.einsum(
    "cqh,cth->cqt", q.astype(jnp.float32), k.astype(jnp.float32)
  )
  if k_scale is not None:
    logits *= k_scale[:, None]
  visible = tokens < limit[..., None]
  logits = jnp.where(visible, logits, LOWEST)
  peak = logits.max(axis=-1)
  weights = jnp.where(visible, jnp.exp(logits - peak[..., None]), 0.0)
  total = weights.sum(axis=-1)
  if v_scale is not None:
    weights *= jnp.where(held, v_scale, 0.0)[:, None]
  return jnp.einsum("cqt,cth->cqh", weights, v), peak, total
