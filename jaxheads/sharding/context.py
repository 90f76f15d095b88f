"""Attention of sequences whose tokens are split over the devices of `context`.

A head of a strided pattern sees a window, and one block in so many of the
past. So a device that holds a chunk of the sequence asks for little: the end of
what is before its chunk (a halo), and of each key-value head the blocks of its
own residue. Heads that see everything go another road: every device gets all
tokens of some heads, and the results go back (all-to-all).

Early tokens see less than late ones. In the balanced order a sequence is cut
into two chunks a device, and a device holds one from either end.

Source:
  S2-Attention, https://arxiv.org/abs/2407.17678; heads for tokens as in
  DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509.
"""

import functools
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxheads.sharding.all_to_all import attend_by_heads, kv_copies
from jaxheads.sharding.chunks import (
  Operands,
  balanced_order,
  check_length,
  chunk_places,
)
from jaxheads.sharding.exchange import (
  attend_by_exchange,
  is_exchangeable,
  stride_of,
)
from jaxheads.sharding.mesh import AXES, axis_size
from jaxheads.sharding.rules import RULES, check_heads, spec
from pallas_kernels.head_attention import (
  HeadContexts,
  head_attention,
)
from pallas_kernels.value_checks import checks_under_jit

Road = Literal["exchange", "all_to_all"]


def is_split(length: int, balanced: bool) -> bool:
  """Whether the devices of the mesh that is set hold parts of sequences.

  Sequences in their own order that do not split are on every device.
  """
  devices = axis_size("context")
  return devices > 1 and (balanced or length % devices == 0)


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K Hv"],
  *,
  pattern: HeadContexts,
  balanced: bool,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B T"] | None = None,
  active: Bool[Array, "B T N"] | None = None,
  num_active: int | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T N Hv"]:
  """`head_attention` of a mesh with several devices along `context`.

  Strided patterns exchange a halo and residues (see `is_exchangeable`); other
  ones, and packed sequences, send tokens of all heads for all tokens of some.

  Args:
    q, k, v: Of the whole sequences; RoPE, if any, by the original positions.
    pattern: What each head sees, in the original order.
    balanced: Whether tokens are in `balanced_order`; if not, in their own.
    q_segment_ids, kv_segment_ids: As for `head_attention`.
    active: True where a token uses a head; only those are computed, on the
      road of all patterns. `None` computes every head for every token.
    num_active: Most active heads of any token, with `active`.
    implementation: As for `head_attention`, or `routed_attention`.

  Returns:
    Output in the tokens' order; 0 where a head is not active.

  Raises:
    UserError: Sequences or heads do not split over this mesh; the message
      names the axis and the nearest setting that does.
  """
  devices, shards = axis_size("context"), axis_size("heads")
  length, num_heads, num_kv_heads = q.shape[1], q.shape[2], k.shape[2]
  operands = Operands(q, k, v, q_segment_ids, kv_segment_ids, active)
  if checks_under_jit():
    # JAX's checkify does not run through a shard_map that a mesh context has.
    return _in_one_piece(operands, pattern, balanced, implementation)
  road = choose_road(
    pattern,
    length=length,
    num_kv_heads=num_kv_heads,
    devices=devices,
    shards=shards,
    balanced=balanced,
    needs_all_tokens=q_segment_ids is not None or active is not None,
  )
  run: Any
  if road == "exchange":
    run = functools.partial(attend_by_exchange, kv_heads=num_kv_heads // shards)
  else:
    copies = kv_copies(num_heads, num_kv_heads, shards, devices)
    run = functools.partial(
      attend_by_heads, copies=copies, num_active=num_active
    )
  batch: Any = RULES["batch"]
  if q.shape[0] % axis_size(*batch):
    batch = None  # All of them do all the work.
  specs = [
    PartitionSpec(batch, *spec("length", *rest))
    for rest in (
      ("heads", None),
      ("kv_heads", None),
      ("kv_heads", None),
      (),
      (),
      ("heads",),
    )
  ]
  run = functools.partial(
    run,
    pattern=pattern,
    places=chunk_places(devices, balanced),
    shards=shards,
    implementation=implementation,
  )
  sharded = jax.shard_map(
    lambda *own: run(Operands(*own)),
    in_specs=tuple(
      None if array is None else where
      for array, where in zip(operands, specs, strict=True)
    ),
    out_specs=specs[0],
    axis_names=set(AXES),
    check_vma=False,
  )
  return sharded(*operands)


def choose_road(
  pattern: HeadContexts,
  *,
  length: int,
  num_kv_heads: int,
  devices: int,
  shards: int,
  balanced: bool = True,
  needs_all_tokens: bool = False,
) -> Road:
  """How a layer's devices come to the keys of its heads.

  Args:
    pattern: What each head sees.
    length: Tokens of a sequence.
    num_kv_heads: Of the model.
    devices, shards: Devices along `context` and along `heads`.
    balanced: Whether tokens are in `balanced_order`.
    needs_all_tokens: Packed sequences, or heads computed for some tokens only.

  Returns:
    "exchange": a halo and the residues; or "all_to_all": all tokens of some
    heads.

  Raises:
    UserError: Sequences or heads do not split.
  """
  num_heads = pattern.num_heads
  check_heads(num_heads, num_kv_heads, shards)
  chunks = devices * (2 if balanced else 1)
  if not needs_all_tokens and is_exchangeable(pattern, num_kv_heads):
    multiple = chunks * pattern.block_size * max(stride_of(pattern), 1)
    if balanced:
      check_length(length, devices, multiple=multiple)
    if length % multiple == 0:
      return "exchange"
  kv_copies(num_heads, num_kv_heads, shards, devices)
  check_length(length, devices, multiple=chunks)
  return "all_to_all"


def _in_one_piece(
  operands: Operands,
  pattern: HeadContexts,
  balanced: bool,
  implementation: str | None,
) -> Float[Array, "B T N Hv"]:
  """Every device does all the work, on tokens in their own order."""
  order = np.arange(operands.q.shape[1])
  if balanced:
    order = balanced_order(len(order), axis_size("context"))
  operands = jax.tree.map(
    lambda x: x[:, np.argsort(order)], operands._replace(active=None)
  )
  out = head_attention(
    *operands[:3],
    pattern=pattern,
    q_segment_ids=operands.q_segment_ids,
    kv_segment_ids=operands.kv_segment_ids,
    implementation=implementation,
  )
  return out[:, order]
