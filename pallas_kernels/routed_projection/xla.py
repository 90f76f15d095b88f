"""Routed projections in plain XLA, block of rows by block of rows.

With weights as [N, H, D] both directions and all gradients are made of three
loops: gather tokens and multiply, multiply and add to tokens, and the
gradient of the weights. A block's gathered tokens stay in cache; a copy of x
for every active head is never stored.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.packing import Packing


def project_in(
  x: Float[Array, "B T D"], w: Float[Array, "D N H"], packing: Packing
) -> Float[Array, "rows H"]:
  """See `pallas_kernels.routed_projection.project_in`."""
  tokens = jnp.asarray(x).reshape(-1, x.shape[-1])
  return _gather_matmul(tokens, w.transpose(1, 2, 0), packing)


def project_out(
  rows: Float[Array, "rows H"], w: Float[Array, "N H Dout"], packing: Packing
) -> Float[Array, "B T Dout"]:
  """See `pallas_kernels.routed_projection.project_out`."""
  tokens = _matmul_scatter(rows, w, packing)
  return tokens.reshape(*packing.row_of.shape[:2], w.shape[-1])


@jax.custom_vjp
def _gather_matmul(
  tokens: Float[Array, "tokens D"], w: Float[Array, "N H D"], packing: Packing
) -> Float[Array, "rows H"]:
  def step(i: Int[Array, ""], rows: Array) -> Array:
    block = _matmul(
      "qd,hd->qh", _block_tokens(tokens, packing, i), w[packing.block_head[i]]
    )
    block = jnp.where(_block_valid(packing, i), block, 0.0)
    return jax.lax.dynamic_update_slice(
      rows, block.astype(rows.dtype), (i * packing.block_rows, 0)
    )

  init = jnp.zeros((packing.num_rows, w.shape[1]), tokens.dtype)
  return _for_blocks(packing, step, init)


@jax.custom_vjp
def _matmul_scatter(
  rows: Float[Array, "rows H"], w: Float[Array, "N H D"], packing: Packing
) -> Float[Array, "tokens D"]:
  batch, length, _ = packing.row_of.shape

  def step(i: Int[Array, ""], tokens: Array) -> Array:
    block = _matmul(
      "qh,hd->qd", _block_rows(rows, packing, i), w[packing.block_head[i]]
    )
    # Unused rows come first and fall outside; then tokens ascend and differ.
    index = jnp.where(
      _block_valid(packing, i)[:, 0], _block_index(packing, i), -1
    )
    return tokens.at[index].add(
      block, mode="drop", indices_are_sorted=True, wrap_negative_indices=False
    )

  init = jnp.zeros((batch * length, w.shape[2]), jnp.float32)
  tokens = _for_blocks(packing, step, init)
  return tokens.astype(rows.dtype)


def _weight_gradient(
  rows: Float[Array, "rows H"],
  tokens: Float[Array, "tokens D"],
  packing: Packing,
) -> Float[Array, "N H D"]:
  """Sum over the rows of each head of row x token."""

  def step(i: Int[Array, ""], dw: Array) -> Array:
    head = packing.block_head[i]
    block = _matmul(
      "qh,qd->hd",
      _block_rows(rows, packing, i),
      _block_tokens(tokens, packing, i),
    )
    return jax.lax.dynamic_update_slice(
      dw, (block + dw[head])[None], (head, 0, 0)
    )

  shape = (packing.num_heads, rows.shape[1], tokens.shape[1])
  init = jnp.zeros(shape, jnp.float32)
  return _for_blocks(packing, step, init)


def _gather_matmul_fwd(
  tokens: Array, w: Array, packing: Packing
) -> tuple[Array, Any]:
  return _gather_matmul(tokens, w, packing), (tokens, w, packing)


def _gather_matmul_bwd(residuals: Any, d_rows: Array) -> tuple[Any, ...]:
  tokens, w, packing = residuals
  d_tokens = _matmul_scatter(d_rows, w, packing)
  dw = _weight_gradient(d_rows, tokens, packing).astype(w.dtype)
  return d_tokens, dw, None


def _matmul_scatter_fwd(
  rows: Array, w: Array, packing: Packing
) -> tuple[Array, Any]:
  return _matmul_scatter(rows, w, packing), (rows, w, packing)


def _matmul_scatter_bwd(residuals: Any, d_tokens: Array) -> tuple[Any, ...]:
  rows, w, packing = residuals
  d_rows = _gather_matmul(d_tokens, w, packing)
  dw = _weight_gradient(rows, d_tokens, packing).astype(w.dtype)
  return d_rows, dw, None


_gather_matmul.defvjp(_gather_matmul_fwd, _gather_matmul_bwd)
_matmul_scatter.defvjp(_matmul_scatter_fwd, _matmul_scatter_bwd)


def _for_blocks(
  packing: Packing, step: Callable[[Int[Array, ""], Array], Array], init: Array
) -> Array:
  """Folds `step` over the blocks in use."""
  used = jnp.clip(packing.num_blocks, 0, packing.block_head.shape[0])
  return jax.lax.fori_loop(0, used, step, init)


def _block_index(packing: Packing, i: Int[Array, ""]) -> Int[Array, " q"]:
  start = i * packing.block_rows
  return jax.lax.dynamic_slice_in_dim(
    packing.row_token, start, packing.block_rows
  )


def _block_valid(packing: Packing, i: Int[Array, ""]) -> Array:
  batch, length, _ = packing.row_of.shape
  return (_block_index(packing, i) < batch * length)[:, None]


def _block_tokens(
  tokens: Float[Array, "tokens D"], packing: Packing, i: Int[Array, ""]
) -> Float[Array, "q D"]:
  # Clipping gives unused rows some token's finite values: rows decide.
  return tokens.at[_block_index(packing, i)].get(mode="clip")


def _block_rows(
  rows: Float[Array, "rows H"], packing: Packing, i: Int[Array, ""]
) -> Float[Array, "q H"]:
  start = i * packing.block_rows
  block = jax.lax.dynamic_slice_in_dim(rows, start, packing.block_rows)
  return jnp.where(_block_valid(packing, i), block, 0)


def _matmul(spec: str, a: Array, b: Array) -> Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
