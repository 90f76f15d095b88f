"""Small problems on XLA: every query against every key, masked, as one tile.

The loops of the other modules cost more than they save there.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.head_attention import reference
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.xla import online_softmax

# Measured on a CPU of two cores, eight heads of 64: at 256 queries and keys one
# tile takes 0.8 (forward) and 0.97 (backward) of the loops' time, at 512 with
# a sparse pattern 1.4 and 2.0.
_PAIRS = 256 * 256
# A few queries against many keys see only some of those.
_KEYS = 512
# So that no batch makes the logits large.
_LOGITS = 2**23


def fits(settings: Settings, operands: Operands) -> bool:
  """Whether the problem is small enough, and no tiles were asked for."""
  if settings.tiling is not None:
    return False
  batch, length, heads = operands.q.shape[:3]
  kv_length = operands.k.shape[1]
  pairs = length * kv_length
  return (
    pairs <= _PAIRS and kv_length <= _KEYS and batch * heads * pairs <= _LOGITS
  )


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """See `xla.forward`."""
  q, tile = _tile(settings, operands)
  softmax = online_softmax.start(q, tile.v.shape[-1])
  softmax = online_softmax.extend(softmax, q, [tile], settings.logits_soft_cap)
  out, lse = online_softmax.finish(softmax)
  batch, length, heads = operands.q.shape[:3]
  out = _unpack(operands, out).astype(operands.q.dtype)
  return out, lse.reshape(batch, heads, length)


def backward(
  settings: Settings,
  operands: Operands,
  lse: Float[Array, "B N T"],
  delta: Float[Array, "B N T"],
  d_out: Float[Array, "B T N Hv"],
) -> tuple[
  Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]
]:
  """Gradients, in float32; `lse` and `delta` as in `online_softmax.Rows`."""
  q, tile = _tile(settings, operands)
  rows = online_softmax.Rows(
    q,
    _pack(operands, d_out),
    lse.reshape(q.shape[:2]),
    delta.reshape(q.shape[:2]),
  )
  dq, dk, dv = online_softmax.gradients(
    rows, tile, tile.k.swapaxes(1, 2), settings.logits_soft_cap
  )
  dq = _unpack(operands, dq.swapaxes(1, 2)) * settings.scale
  batch, _, kv_heads = operands.k.shape[:3]
  dk, dv = (
    x.reshape(batch, kv_heads, *x.shape[1:]).swapaxes(1, 2) for x in (dk, dv)
  )
  return dq, dk, dv


def _tile(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "U R H"], online_softmax.Tile]:
  """Scaled queries and all the keys; a unit is a KV head."""
  k, v = (
    x.astype(jnp.float32).swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])
    for x in operands[1:3]
  )
  q = _pack(operands, operands.q) * settings.scale
  visible = _visible(settings, operands).reshape(q.shape[0], q.shape[1], -1)
  return q, online_softmax.Tile(k, v, visible)


def _visible(settings: Settings, operands: Operands) -> Bool[Array, "B N T S"]:
  q, k, _, q_segments, kv_segments, q_offset = operands
  if settings.q_offset is not None:
    q_offset = jnp.int32(settings.q_offset)
  positions = q_offset + jnp.arange(q.shape[1], dtype=jnp.int32)
  visible = reference.visible(settings.pattern, positions, k.shape[1])[None]
  if q_segments is not None and kv_segments is not None:
    same = q_segments[:, :, None] == kv_segments[:, None, :]
    visible = visible & same[:, None]
  return jnp.broadcast_to(visible, (q.shape[0], *visible.shape[1:]))


def _pack(operands: Operands, x: Array) -> Float[Array, "U R H"]:
  """[B, T, N, H] with the query heads of a KV head as rows of one unit."""
  units = x.shape[0] * operands.k.shape[2]
  x = x.astype(jnp.float32).swapaxes(1, 2)
  return x.reshape(units, -1, x.shape[3])


def _unpack(operands: Operands, x: Array) -> Float[Array, "B T N H"]:
  batch, length, heads = operands.q.shape[:3]
  return x.reshape(batch, heads, length, -1).swapaxes(1, 2)
