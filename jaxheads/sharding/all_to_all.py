"""Any heads of split sequences: every device gets all tokens of some heads.

Source:
  DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxheads.errors import UserError
from jaxheads.sharding.chunks import (
  Operands,
  as_stored,
  in_order,
  place,
)
from jaxheads.sharding.mesh import nearest_divisor
from jaxheads.sharding.partition import local_patterns
from pallas_kernels.head_attention import (
  Case,
  HeadContexts,
  Part,
  attend_case,
)
from pallas_kernels.packing import gather_rows, pack, scatter_rows
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import default_tiling


def kv_copies(
  num_heads: int, num_kv_heads: int, shards: int, devices: int
) -> int:
  """How often a key-value head is repeated before heads go to devices.

  Args:
    num_heads, num_kv_heads: Of the model.
    shards: Devices along `heads`, which divide both.
    devices: Devices along `context`.
  Raises:
    UserError: The query heads of `shards` do not divide by `devices` even so.
  """
  own, group = num_kv_heads // shards, num_heads // num_kv_heads
  copies = devices // math.gcd(own, devices)
  if group % copies:
    fits = nearest_divisor(devices, num_heads // shards)
    raise UserError(
      f"`--mesh`: context={devices} with heads={shards} does not divide the "
      f"{num_heads} query heads ({num_kv_heads} key-value heads) of a layer "
      "whose heads see other keys than a window and a residue; the nearest "
      f"that does is context={fits}"
    )
  return copies


def attend_by_heads(
  operands: Operands,
  *,
  pattern: HeadContexts,
  places: np.ndarray,
  shards: int,
  copies: int,
  num_active: int | None,
  implementation: str | None,
) -> Float[Array, "B T n Hv"]:
  """Of one device: all tokens of some heads, and back."""
  devices, slots = places.shape

  def to_heads(x: Array) -> Array:
    x = jax.lax.all_to_all(x, "context", 2, 1, tiled=True)
    split = x.reshape(x.shape[0], devices, slots, -1, *x.shape[2:])
    return in_order(split).reshape(x.shape)

  def to_tokens(x: Array) -> Array:
    split = x.reshape(x.shape[0], places.size, -1, *x.shape[2:])
    x = as_stored(split, slots).reshape(x.shape)
    return jax.lax.all_to_all(x, "context", 1, 2, tiled=True)

  def ids(x: Array | None) -> Array | None:
    if x is None:
      return None
    split = x.reshape(x.shape[0], slots, -1)
    every = jax.lax.all_gather(split, "context", axis=1)
    return in_order(every).reshape(x.shape[0], -1)

  q = to_heads(operands.q)
  k, v = (
    to_heads(jnp.repeat(x, copies, axis=2)) for x in (operands.k, operands.v)
  )
  segments = ids(operands.q_segment_ids), ids(operands.kv_segment_ids)
  patterns, which = local_patterns(pattern, q.shape[2]), place(devices)
  if operands.active is not None:
    out = _routed(
      q,
      k,
      v,
      to_heads(operands.active),
      segments,
      patterns=patterns,
      which=which,
      # A token may have all of its heads here.
      num_active=min(num_active or pattern.num_heads, q.shape[2]),
      share=(num_active or pattern.num_heads) / pattern.num_heads,
      implementation=implementation,
    )
    return to_tokens(out)
  rows = (0, q.shape[1])
  out = attend_case(
    q,
    ((k, v),),
    cases=tuple(
      Case(((rows, (Part(0, rows, local, 0),)),)) for local in patterns
    ),
    which=which,
    q_segment_ids=segments[0],
    kv_segment_ids=None if segments[1] is None else (segments[1],),
    implementation=implementation,
  )
  return to_tokens(out)


def _routed(
  q: Float[Array, "B T n H"],
  k: Float[Array, "B T k H"],
  v: Float[Array, "B T k H"],
  active: Bool[Array, "B T n"],
  segments: tuple[Array | None, Array | None],
  *,
  patterns: tuple[HeadContexts, ...],
  which: Int[Array, ""],
  num_active: int,
  share: float,
  implementation: str | None,
) -> Float[Array, "B T n H"]:
  """Of the active heads of each token only."""
  tiling = default_tiling(q.shape[1], k.shape[1], share)
  packing = pack(active, num_active=num_active, block_rows=tiling.block_q)
  distinct = tuple(dict.fromkeys(patterns))
  number = jnp.asarray([distinct.index(one) for one in patterns], jnp.int32)
  rows = routed_attention(
    gather_rows(q, packing),
    k,
    v,
    packing,
    pattern=distinct if len(distinct) > 1 else distinct[0],
    which=number[which] if len(distinct) > 1 else None,
    q_segment_ids=segments[0],
    kv_segment_ids=segments[1],
    tiling=tiling,
    implementation=implementation,
  )
  return scatter_rows(rows, packing)
