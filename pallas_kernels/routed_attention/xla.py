"""Routed attention in plain XLA: loops over tiles, nothing of size T x S.

A block of packed queries meets the key tiles it can see, with the softmax
computed online. Tiles that every query of the block sees whole carry no mask
arithmetic. Backward recomputes the weights from the saved log-sum-exp and
adds dk and dv tile by tile, in a fixed order: results repeat bit for bit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.packing import Packing
from pallas_kernels.routed_attention.tiling import Tiling

# Finite, so that a row that sees nothing yet has no inf - inf.
_MASKED = -1e30
_LN_2 = math.log(2.0)


class _Context(NamedTuple):
  """Everything that decides what a query sees; not differentiated."""

  packing: Packing
  q_offset: Int[Array, ""]
  mask: Bool[Array, "#B #N #T S"] | None
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: Int[Array, "B S"] | None


class _Residuals(NamedTuple):
  """What forward leaves for backward."""

  q: Float[Array, "rows H"]
  k: Float[Array, "B K S H"]
  v: Float[Array, "B K S H"]
  context: _Context
  out: Float[Array, "rows H"]
  lse: Float[Array, " rows"]


class _Options(NamedTuple):
  """Static settings."""

  scale: float
  is_causal: bool
  tiling: Tiling
  kv_length: int


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
  """See `pallas_kernels.routed_attention.routed_attention`."""
  kv_length = k.shape[1]
  pad = -kv_length % tiling.block_kv
  if mask is not None:
    mask = _pad(mask, 3, pad)
  if kv_segment_ids is not None:
    kv_segment_ids = _pad(kv_segment_ids, 1, pad)
  context = _Context(packing, q_offset, mask, q_segment_ids, kv_segment_ids)
  options = _Options(scale, is_causal, tiling, kv_length)
  # [B, K, S, H]: a tile of one head is contiguous.
  k = _pad(k.swapaxes(1, 2), 2, pad)
  v = _pad(v.swapaxes(1, 2), 2, pad)
  return _attend(options, q, k, v, context)


def _pad(x: Array, axis: int, amount: int) -> Array:
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, amount)
  return jnp.pad(x, widths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  options: _Options,
  q: Float[Array, "rows H"],
  k: Float[Array, "B K S H"],
  v: Float[Array, "B K S H"],
  context: _Context,
) -> Float[Array, "rows H"]:
  return _forward(options, q, k, v, context)[0]


def _attend_fwd(
  options: _Options, q: Array, k: Array, v: Array, context: _Context
) -> tuple[Array, _Residuals]:
  out, lse = _forward(options, q, k, v, context)
  return out, _Residuals(q, k, v, context, out, lse)


def _attend_bwd(
  options: _Options, residuals: _Residuals, d_out: Array
) -> tuple[Array, Array, Array, None]:
  return (*_backward(options, residuals, d_out), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


class _Block(NamedTuple):
  """One block of packed queries and the key tiles it visits."""

  start: Int[Array, ""]  # First row.
  batch: Int[Array, ""]
  kv_head: Int[Array, ""]
  head: Int[Array, ""]
  token: Int[Array, " block_q"]  # Clipped into the sequence.
  valid: Bool[Array, " block_q"]
  position: Int[Array, " block_q"]  # Among the keys; -1 for unused rows.
  num_full: Int[Array, ""]  # Leading key tiles that every query sees whole.
  num_keys: Int[Array, ""]  # Keys up to the last one that some query sees.


def _block(
  options: _Options, context: _Context, kv_heads: int, i: Int[Array, ""]
) -> _Block:
  packing = context.packing
  _, length, heads = packing.row_of.shape
  rows, block_kv = packing.block_rows, options.tiling.block_kv
  start = i * rows
  batch = packing.block_batch[i]
  head = packing.block_head[i]
  row_token = jax.lax.dynamic_slice_in_dim(packing.row_token, start, rows)
  token = row_token - batch * length
  valid = token < length
  token = jnp.minimum(token, length - 1)
  position = jnp.where(valid, token + context.q_offset, -1)

  num_keys = jnp.int32(options.kv_length)
  num_full = jnp.int32(options.kv_length // block_kv)
  if options.is_causal:
    num_keys = jnp.clip(position.max() + 1, 0, num_keys)
    first = jnp.where(valid, position, options.kv_length).min()
    num_full = jnp.clip((first + 1) // block_kv, 0, num_full)
  if _has_mask(context):
    num_full = jnp.int32(0)
  return _Block(
    start=start,
    batch=batch,
    head=head,
    kv_head=head // (heads // kv_heads),
    token=token,
    valid=valid,
    position=position,
    num_full=num_full,
    num_keys=num_keys,
  )


def _has_mask(context: _Context) -> bool:
  return context.mask is not None or context.q_segment_ids is not None


def _tile_mask(
  options: _Options,
  context: _Context,
  block: _Block,
  first: Int[Array, ""],
  width: int,
) -> Bool[Array, "block_q width"]:
  """What the block's queries see of the keys from `first` on."""
  index = first + jnp.arange(width)
  last = options.kv_length - 1
  if options.is_causal:
    visible = index <= jnp.minimum(block.position, last)[:, None]
  else:
    visible = (index <= last) & block.valid[:, None]
  if context.q_segment_ids is not None:
    assert context.kv_segment_ids is not None
    keys = jax.lax.dynamic_slice(
      context.kv_segment_ids, (block.batch, first), (1, width)
    )
    visible &= context.q_segment_ids[block.batch][block.token][:, None] == keys
  if context.mask is not None:
    sizes = context.mask.shape
    batch = block.batch if sizes[0] > 1 else 0
    head = block.head if sizes[1] > 1 else 0
    tile = jax.lax.dynamic_slice(
      context.mask, (batch, head, 0, first), (1, 1, sizes[2], width)
    )[0, 0]
    visible &= tile[block.token] if sizes[2] > 1 else tile
  return visible


def _tile(
  x: Float[Array, "B K S H"], block: _Block, first: Array, width: int
) -> Float[Array, "width H"]:
  start = (block.batch, block.kv_head, first, 0)
  return jax.lax.dynamic_slice(x, start, (1, 1, width, x.shape[3]))[0, 0]


def _matmul(spec: str, a: Array, b: Array) -> Array:
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _forward(
  options: _Options, q: Array, k: Array, v: Array, context: _Context
) -> tuple[Float[Array, "rows H"], Float[Array, " rows"]]:
  """Output and log-sum-exp (base 2) of every row."""
  rows = context.packing.block_rows
  head_dim = q.shape[1]

  def block_step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    block = _block(options, context, k.shape[1], i)
    block_q = jax.lax.dynamic_slice_in_dim(q, block.start, rows)
    block_q = _scale_q(block_q, options)

    def tile_step(width: int, masked: bool, first: Array, state: Any) -> Any:
      m, l, acc = state
      logits = _matmul("qh,sh->qs", block_q, _tile(k, block, first, width))
      if masked:
        visible = _tile_mask(options, context, block, first, width)
        logits = jnp.where(visible, logits, _MASKED)
      m_new = jnp.maximum(m, logits.max(-1))
      weights = jnp.exp2(logits - m_new[:, None])
      if masked:
        weights = jnp.where(visible, weights, 0.0)
      shrink = jnp.exp2(m - m_new)
      out = _matmul(
        "qs,sh->qh", weights.astype(v.dtype), _tile(v, block, first, width)
      )
      return (
        m_new,
        l * shrink + weights.sum(-1),
        acc * shrink[:, None] + out,
      )

    state = (
      jnp.full((rows,), _MASKED, jnp.float32),
      jnp.zeros((rows,), jnp.float32),
      jnp.zeros((rows, head_dim), jnp.float32),
    )
    m, l, acc = _for_tiles(options, context, block, tile_step, state)
    empty = (l == 0) | ~block.valid
    l = jnp.where(empty, 1.0, l)
    out = jnp.where(empty[:, None], 0.0, acc / l[:, None]).astype(q.dtype)
    lse = jnp.where(empty, -jnp.inf, m + jnp.log2(l))
    return _write(carry[0], out, block.start), _write(
      carry[1], lse, block.start
    )

  init = (jnp.zeros_like(q), jnp.full(q.shape[:1], -jnp.inf, jnp.float32))
  return jax.lax.fori_loop(0, context.packing.num_blocks, block_step, init)


def _backward(
  options: _Options, residuals: _Residuals, d_out: Float[Array, "rows H"]
) -> tuple[Array, Array, Array]:
  """Gradients of q, k and v; float32 sums, returned in their dtypes.

  Tiles are keys down, queries across: then no matrix multiplication contracts
  the first axis of its left operand, which is three times slower on CPUs.
  """
  q, k, v, context, out, lse = residuals
  rows = context.packing.block_rows
  delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
  k_transposed = k.swapaxes(2, 3)

  def block_step(i: Array, carry: Any) -> Any:
    dq, dk, dv = carry
    block = _block(options, context, k.shape[1], i)

    def rows_of(x: Array) -> Array:
      return jax.lax.dynamic_slice_in_dim(x, block.start, rows)

    # A row that saw nothing has log-sum-exp -inf and no gradient.
    empty = rows_of(lse) == -jnp.inf
    block_q = _scale_q(rows_of(q), options)
    block_lse = jnp.where(empty, 0.0, rows_of(lse))
    block_delta = rows_of(delta)
    block_d_out = jnp.where(empty[:, None], 0, rows_of(d_out))

    def tile_step(width: int, masked: bool, first: Array, state: Any) -> Any:
      block_dq, dk, dv = state
      tile_k = _tile(k, block, first, width)
      tile_v = _tile(v, block, first, width)
      tile_kt = jax.lax.dynamic_slice(
        k_transposed,
        (block.batch, block.kv_head, 0, first),
        (1, 1, k.shape[3], width),
      )[0, 0]
      weights = jnp.exp2(_matmul("sh,qh->sq", tile_k, block_q) - block_lse)
      if masked:
        weights = jnp.where(
          _tile_mask(options, context, block, first, width).T, weights, 0.0
        )
      d_weights = _matmul("sh,qh->sq", tile_v, block_d_out)
      d_logits = (weights * (d_weights - block_delta)).astype(q.dtype)
      block_dq += _matmul("hs,sq->hq", tile_kt, d_logits)
      tile_dk = _matmul("sq,qh->sh", d_logits, block_q)
      tile_dv = _matmul("sq,qh->sh", weights.astype(v.dtype), block_d_out)
      start = (block.batch, block.kv_head, first, 0)

      def add(total: Array, tile: Array) -> Array:
        tile = tile + _tile(total, block, first, width)
        return jax.lax.dynamic_update_slice(total, tile[None, None], start)

      return block_dq, add(dk, tile_dk), add(dv, tile_dv)

    block_dq = jnp.zeros((q.shape[1], rows), jnp.float32)
    block_dq, dk, dv = _for_tiles(
      options, context, block, tile_step, (block_dq, dk, dv)
    )
    block_dq = (block_dq.T * options.scale).astype(q.dtype)
    return _write(dq, block_dq, block.start), dk, dv

  init = (
    jnp.zeros_like(q),
    jnp.zeros(k.shape, jnp.float32),
    jnp.zeros(v.shape, jnp.float32),
  )
  dq, dk, dv = jax.lax.fori_loop(
    0, context.packing.num_blocks, block_step, init
  )
  # The rows carried log2(e), which the true gradient of k does not have.
  return dq, (dk * _LN_2).astype(k.dtype), dv.astype(v.dtype)


def _scale_q(block_q: Array, options: _Options) -> Array:
  """Queries whose logits are in base 2: exp2 is the cheaper exponential."""
  return (block_q * (options.scale / _LN_2)).astype(block_q.dtype)


def _for_tiles(
  options: _Options,
  context: _Context,
  block: _Block,
  tile_step: Callable[[int, bool, Array, Any], Any],
  state: Any,
) -> Any:
  """Visits the block's keys in order.

  Tiles seen whole come first and have no mask arithmetic. The rest, around
  the diagonal, goes in narrower tiles, so that less is computed in vain.
  """
  full = options.tiling.block_kv
  edge = full if _has_mask(context) else options.tiling.block_edge
  state = jax.lax.fori_loop(
    0,
    block.num_full,
    lambda j, state: tile_step(full, False, j * full, state),
    state,
  )
  return jax.lax.fori_loop(
    block.num_full * (full // edge),
    (block.num_keys + edge - 1) // edge,
    lambda j, state: tile_step(edge, True, j * edge, state),
    state,
  )


def _write(x: Array, rows: Array, start: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=0)
