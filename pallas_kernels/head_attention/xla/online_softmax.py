"""The arithmetic of one tile, for many heads at once.

A unit is a set of rows (queries of one or several heads) with keys of its
own; XLA runs the units of a batched product concurrently on a CPU.
Letters: U units, R rows, W keys of a tile, H and Hv head sizes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Hidden logits lie far below the first maximum, so their weights are exactly
# zero, also in rows that have seen nothing yet; and both are finite, so there
# is no inf - inf.
_HIDDEN = -1e30
_FIRST_MAX = -5e29


class Tile(NamedTuple):
  """Keys that all units meet in one step."""

  k: Float[Array, "U W H"]
  v: Float[Array, "U W Hv"]
  visible: Bool[Array, "U|1 R W"] | None  # None: all of it.


class Softmax(NamedTuple):
  """An online softmax."""

  m: Float[Array, "U R"]
  l: Float[Array, "U R"]
  acc: Float[Array, "U R Hv"]


class Rows(NamedTuple):
  """What backward knows of the rows."""

  q: Float[Array, "U R H"]  # Scaled.
  d_out: Float[Array, "U R Hv"]
  lse: Float[Array, "U R"]  # +inf where the row sees nothing.
  delta: Float[Array, "U R"]


# Full float32 products also where the hardware has cheaper ones.
_matmul = functools.partial(
  jnp.einsum,
  precision=jax.lax.Precision.HIGHEST,
  preferred_element_type=jnp.float32,
)


def start(q: Float[Array, "U R H"], head_size: int) -> Softmax:
  """These rows have seen nothing yet."""
  rows = q.shape[:2]
  return Softmax(
    jnp.full(rows, _FIRST_MAX, jnp.float32),
    jnp.zeros(rows, jnp.float32),
    jnp.zeros((*rows, head_size), jnp.float32),
  )


def extend(
  softmax: Softmax,
  q: Float[Array, "U R H"],
  tiles: list[Tile],
  cap: float | None,
) -> Softmax:
  """Also sees `tiles`, in one step; q is scaled, all are float32."""
  m, l, acc = softmax
  m_new = m
  logits = []
  for tile in tiles:
    raw = _matmul("urh,uwh->urw", q, tile.k)
    if cap is not None:
      raw = cap * jnp.tanh(raw / cap)
    if tile.visible is not None:
      raw = jnp.where(tile.visible, raw, _HIDDEN)
    m_new = jnp.maximum(m_new, raw.max(-1))
    logits.append(raw)
  shrink = jnp.exp(m - m_new)
  l = l * shrink
  acc = acc * shrink[..., None]
  for tile, raw in zip(tiles, logits, strict=True):
    weights = jnp.exp(raw - m_new[..., None])
    l = l + weights.sum(-1)
    acc = acc + _matmul("urw,uwh->urh", weights, tile.v)
  return Softmax(m_new, l, acc)


def finish(
  softmax: Softmax,
) -> tuple[Float[Array, "U R Hv"], Float[Array, "U R"]]:
  """Output and log-sum-exp; 0 and -inf for rows that saw nothing."""
  m, l, acc = softmax
  empty = l == 0
  l = jnp.where(empty, 1.0, l)
  # A division a row: XLA writes the output from one thread.
  out = acc * jnp.where(empty, 0.0, 1 / l)[..., None]
  return out, jnp.where(empty, -jnp.inf, m + jnp.log(l))


def gradients(
  rows: Rows,
  tile: Tile,
  k_transposed: Float[Array, "U H W"],
  cap: float | None,
) -> tuple[
  Float[Array, "U H R"], Float[Array, "U W H"], Float[Array, "U W Hv"]
]:
  """What one tile adds to dq (transposed; of the scaled q), dk and dv.

  Keys go down and queries across: then no product contracts the first axis of
  its left operand, which is two to three times slower on CPUs.
  """
  visible = None
  if tile.visible is not None:
    visible = tile.visible.swapaxes(1, 2)
  logits = _matmul("uwh,urh->uwr", tile.k, rows.q)
  slope = None
  if cap is not None:
    tanh = jnp.tanh(logits / cap)
    logits, slope = cap * tanh, 1 - tanh * tanh
  if visible is not None:
    logits = jnp.where(visible, logits, _HIDDEN)
  weights = jnp.exp(logits - rows.lse[:, None])
  d_weights = _matmul("uwh,urh->uwr", tile.v, rows.d_out)
  d_logits = weights * (d_weights - rows.delta[:, None])
  if slope is not None:
    d_logits = d_logits * slope
  if visible is not None:
    # Hidden keys and values may be so large that their products overflow.
    d_logits = jnp.where(visible, d_logits, 0.0)
  dq = _matmul("uhw,uwr->uhr", k_transposed, d_logits)
  dk = _matmul("uwr,urh->uwh", d_logits, rows.q)
  dv = _matmul("uwr,urh->uwh", weights, rows.d_out)
  return dq, dk, dv
