"""Routed attention in plain XLA: loops over tiles, nothing of size T x S.

A block of packed queries meets the key tiles it can see, with the softmax
computed online. Tiles that every query of the block sees whole carry no mask
arithmetic. Backward recomputes the weights from the saved log-sum-exp and
adds dk and dv tile by tile, in a fixed order: results repeat bit for bit.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.routed_attention.operands import (
  Operands,
  Settings,
  row_positions,
  seen_up_to,
)
from pallas_kernels.routed_attention.xla.blocks import (
  Block,
  Context,
  Heads,
  block_range,
  padded_length,
  read_block,
  visit_all,
)
from pallas_kernels.routed_attention.xla.keys import KeyTile

# Finite, so that a row that sees nothing yet has no inf - inf.
_MASKED = -1e30
_LN_2 = math.log(2.0)


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Everything is covered."""
  del settings, operands
  return None


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "rows H"], Float[Array, " rows"]]:
  """Output and log-sum-exp; see `operands.Implementation`."""
  problem = _Problem(settings, operands)
  q = operands.q
  rows = operands.packing.block_rows

  def of_block(block: Block, heads: Heads, carry: Any) -> Any:
    block_q = jax.lax.dynamic_slice_in_dim(q, block.start, rows)
    block_q = _scale_q(block_q, settings)

    def step(tile: KeyTile, visible: Array | None, state: Any) -> Any:
      m, l, acc = state
      logits = _matmul("qh,sh->qs", block_q, tile.read(problem.k))
      if visible is not None:
        logits = jnp.where(visible, logits, _MASKED)
      m_new = jnp.maximum(m, logits.max(-1))
      weights = jnp.exp2(logits - m_new[:, None])
      if visible is not None:
        weights = jnp.where(visible, weights, 0.0)
      shrink = jnp.exp2(m - m_new)
      v = tile.read(problem.v)
      out = _matmul("qs,sh->qh", weights.astype(v.dtype), v)
      return (
        m_new,
        l * shrink + weights.sum(-1),
        acc * shrink[:, None] + out,
      )

    state = (
      jnp.full((rows,), _MASKED, jnp.float32),
      jnp.zeros((rows,), jnp.float32),
      jnp.zeros((rows, q.shape[1]), jnp.float32),
    )
    m, l, acc = visit_all(heads, problem.context, block, step, state)
    empty = (l == 0) | (block.limit < 0)
    l = jnp.where(empty, 1.0, l)
    out = jnp.where(empty[:, None], 0.0, acc / l[:, None]).astype(q.dtype)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log2(l))
    return (
      _write(carry[0], out, block.start),
      _write(carry[1], lse, block.start),
    )

  init = (jnp.zeros_like(q), jnp.full(q.shape[:1], -jnp.inf, jnp.float32))
  return problem.for_blocks(of_block, init)


def backward(
  settings: Settings,
  operands: Operands,
  out: Float[Array, "rows H"],
  lse: Float[Array, " rows"],
  d_out: Float[Array, "rows H"],
) -> tuple[
  Float[Array, "rows H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
]:
  """Gradients of q, k and v; float32 sums, returned in their dtypes.

  Tiles are keys down, queries across: then no matrix multiplication contracts
  the first axis of its left operand, which is three times slower on CPUs.
  """
  problem = _Problem(settings, operands)
  q, k, v = operands.q, problem.k, problem.v
  rows = operands.packing.block_rows
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
  k_across = k.swapaxes(2, 3)

  def of_block(block: Block, heads: Heads, carry: Any) -> Any:
    dq, dk, dv = carry

    def rows_of(x: Array) -> Array:
      return jax.lax.dynamic_slice_in_dim(x, block.start, rows)

    # A row that saw nothing has log-sum-exp -inf and no gradient.
    empty = rows_of(lse) == -jnp.inf
    block_q = _scale_q(rows_of(q), settings)
    block_lse = jnp.where(empty, 0.0, rows_of(lse))
    block_delta = rows_of(delta)
    block_d_out = jnp.where(empty[:, None], 0, rows_of(d_out))

    def step(tile: KeyTile, visible: Array | None, state: Any) -> Any:
      block_dq, dk, dv = state
      products = _matmul("sh,qh->sq", tile.read(k), block_q)
      weights = jnp.exp2(products - block_lse)
      if visible is not None:
        weights = jnp.where(visible.T, weights, 0.0)
      d_weights = _matmul("sh,qh->sq", tile.read(v), block_d_out)
      d_logits = (weights * (d_weights - block_delta)).astype(q.dtype)
      block_dq += _matmul("hs,sq->hq", tile.read_across(k_across), d_logits)
      tile_dk = _matmul("sq,qh->sh", d_logits, block_q)
      tile_dv = _matmul("sq,qh->sh", weights.astype(v.dtype), block_d_out)
      return block_dq, tile.add(dk, tile_dk), tile.add(dv, tile_dv)

    block_dq = jnp.zeros((q.shape[1], rows), jnp.float32)
    block_dq, dk, dv = visit_all(
      heads, problem.context, block, step, (block_dq, dk, dv)
    )
    block_dq = (block_dq.T * settings.scale).astype(q.dtype)
    return _write(dq, block_dq, block.start), dk, dv

  init = (
    jnp.zeros_like(q),
    jnp.zeros(k.shape, jnp.float32),
    jnp.zeros(v.shape, jnp.float32),
  )
  dq, dk, dv = problem.for_blocks(of_block, init)
  # The rows carried log2(e), which the true gradient of k does not have.
  dk = (dk * _LN_2).astype(k.dtype)
  return dq, problem.unpadded(dk), problem.unpadded(dv.astype(v.dtype))


class _Problem:
  """Padded operands and the runs of heads.

  Attributes:
    k, v: [B, K, S, H] with S padded to whole tiles: a tile is contiguous.
    context: What decides what a query sees.
  """

  def __init__(self, settings: Settings, operands: Operands) -> None:
    self._packing = operands.packing
    self._kv_length, kv_heads = operands.k.shape[1:3]
    num_heads = operands.packing.num_heads
    runs = settings.runs(num_heads, looks_up_sinks=False)
    padded = padded_length(settings, runs, self._kv_length)
    self._heads = [
      Heads(
        run,
        settings,
        groups=num_heads // kv_heads,
        kv_length=self._kv_length,
        kv_padded=padded,
      )
      for run in runs
    ]
    pad = padded - self._kv_length
    mask, ids = operands.mask, operands.kv_segment_ids
    self.context = Context(
      operands.packing,
      row_positions(operands),
      seen_up_to(settings, operands),
      None if mask is None else _pad(mask, 3, pad),
      operands.q_segment_ids,
      None if ids is None else _pad(ids, 1, pad),
    )
    self.k = _pad(operands.k.swapaxes(1, 2), 2, pad)
    self.v = _pad(operands.v.swapaxes(1, 2), 2, pad)

  def for_blocks(
    self, of_block: Callable[[Block, Heads, Any], Any], carry: Any
  ) -> Any:
    """Folds `of_block` over all blocks that hold queries."""
    for heads in self._heads:

      def step(number: Array, carry: Any, heads: Heads = heads) -> Any:
        block = read_block(heads, self.context, number)
        return of_block(block, heads, carry)

      begin, end = block_range(self._packing, heads.run)
      carry = jax.lax.fori_loop(begin, end, step, carry)
    return carry

  def unpadded(self, x: Float[Array, "B K S H"]) -> Float[Array, "B S K H"]:
    """In the public layout."""
    return x[:, :, : self._kv_length].swapaxes(1, 2)


def _pad(x: Array, axis: int, amount: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, amount)
  return jnp.pad(x, widths)


def _matmul(spec: str, a: Array, b: Array) -> Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _scale_q(block_q: Array, settings: Settings) -> Array:
  """Queries whose logits are in base 2: exp2 is the cheaper exponential."""
  return (block_q * (settings.scale / _LN_2)).astype(block_q.dtype)


def _write(x: Array, rows: Array, start: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)
