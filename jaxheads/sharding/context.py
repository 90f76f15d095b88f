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

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxheads.errors import UserError
from jaxheads.sharding.mesh import AXES, axis_size, nearest_divisor
from jaxheads.sharding.partition import local_patterns
from jaxheads.sharding.rules import RULES, check_heads, spec
from pallas_kernels.head_attention import (
  Case,
  HeadContexts,
  Part,
  Strided,
  Table,
  attend_case,
  head_attention,
)
from pallas_kernels.packing import gather_rows, pack, scatter_rows
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import default_tiling
from pallas_kernels.value_checks import checks_under_jit

Road = Literal["exchange", "all_to_all"]


class _Operands(NamedTuple):
  """What each device has its tokens and heads of."""

  q: Float[Array, "B T N H"]
  k: Float[Array, "B T K H"]
  v: Float[Array, "B T K Hv"]
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: Int[Array, "B T"] | None
  active: Bool[Array, "B T N"] | None


def chunk_places(devices: int, balanced: bool) -> np.ndarray:
  """Which chunks each device holds, [devices, chunks of a device].

  Example:
    >>> chunk_places(3, balanced=True).tolist()
    [[0, 5], [1, 4], [2, 3]]
  """
  own = np.arange(devices)[:, None]
  return np.hstack([own, 2 * devices - 1 - own]) if balanced else own


def balanced_order(length: int, devices: int) -> np.ndarray:
  """Original position of the token that is stored at each place, [length].

  The inverse is `numpy.argsort` of it.

  Args:
    length: Tokens of a sequence.
    devices: Along the axis `context`.
  Raises:
    UserError: `2 * devices` does not divide `length`.

  Example:
    >>> balanced_order(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
  """
  check_length(length, devices, multiple=2 * devices)
  chunks = chunk_places(devices, balanced=True).reshape(-1, 1)
  tokens = length // (2 * devices)
  return (chunks * tokens + np.arange(tokens)).reshape(-1)


def check_length(length: int, devices: int, *, multiple: int) -> None:
  """`UserError` unless a sequence splits into chunks."""
  if length % multiple or not length:
    nearest = max(round(length / multiple), 1) * multiple
    raise UserError(
      f"`--mesh`: context={devices} needs sequences whose length is a multiple "
      f"of {multiple}, got {length} tokens; the nearest is {nearest}"
    )


def is_split(length: int, balanced: bool) -> bool:
  """Whether the devices of the mesh that is set hold parts of sequences.

  Sequences in their own order that do not split are on every device.
  """
  devices = axis_size("context")
  return devices > 1 and (balanced or length % devices == 0)


def is_exchangeable(pattern: HeadContexts, num_kv_heads: int) -> bool:
  """Whether a device needs but a halo and its heads' own residues.

  So it is where all heads are strided, none sees everything, the remote ones
  have one stride, and the query heads of a key-value head one context.
  """
  rules = pattern.rules
  strided = [rule for rule in rules if isinstance(rule, Strided)]
  strides = {rule.stride for rule in strided if rule.stride}
  group = len(rules) // num_kv_heads
  return (
    len(strided) == len(rules)
    and len(strides) <= 1
    and 1 not in strides
    and not any(rule.sinks for rule in strided)
    and all(
      len(set(rules[start : start + group])) == 1
      for start in range(0, len(rules), group)
    )
  )


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
  operands = _Operands(q, k, v, q_segment_ids, kv_segment_ids, active)
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
    run = functools.partial(_by_exchange, kv_heads=num_kv_heads // shards)
  else:
    copies = kv_copies(num_heads, num_kv_heads, shards, devices)
    run = functools.partial(_by_heads, copies=copies, num_active=num_active)
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
    lambda *own: run(_Operands(*own)),
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


def _strided(pattern: HeadContexts) -> list[Strided]:
  return [rule for rule in pattern.rules if isinstance(rule, Strided)]


def stride_of(pattern: HeadContexts) -> int:
  """The stride of the heads that have one; 0 if all see a window only."""
  return max(rule.stride for rule in _strided(pattern))


def window_of(pattern: HeadContexts) -> int:
  """Blocks of the widest window."""
  return max(rule.local for rule in _strided(pattern))


# The road of strided patterns.


def _by_exchange(
  operands: _Operands,
  *,
  pattern: HeadContexts,
  places: np.ndarray,
  shards: int,
  kv_heads: int,
  implementation: str | None,
) -> Float[Array, "B T n Hv"]:
  """Of one device: its chunks over their halos and the gathered residues."""
  q, kv = operands.q, (operands.k, operands.v)
  devices, slots = places.shape
  tokens = q.shape[1] // slots
  rules = _strided(pattern)
  halos = halo_tokens(pattern, tokens, places)
  sources = []
  for slot in range(slots):
    own = jax.tree.map(lambda x, s=slot: _chunk(x, s, tokens), kv)
    before = _halo(kv, places, slot, tokens, halos[slot])
    sources.append(jax.tree.map(lambda *x: jnp.concatenate(x, 1), *before, own))
  stride = stride_of(pattern)
  if stride:
    residues = np.array([rule.residue for rule in rules])
    residues = residues[:: len(rules) // (shards * kv_heads)]
    mine = jnp.asarray(residues.reshape(shards, kv_heads), jnp.int32)
    mine = mine[jax.lax.axis_index("heads")]
    block = pattern.block_size
    sources.append(
      jax.tree.map(
        lambda x: _gather_residues(x, mine, block, stride, places), kv
      )
    )
  cases = tuple(
    _exchange_case(local, tuple(row), places.size, tokens, halos)
    for local in local_patterns(pattern, q.shape[2])
    for row in places.tolist()
  )
  return attend_case(
    q,
    tuple(sources),
    cases=cases,
    which=_place(devices),
    implementation=implementation,
  )


def halo_tokens(
  pattern: HeadContexts, tokens: int, places: np.ndarray
) -> list[int]:
  """Tokens before the chunks of each slot that windows reach."""
  most = (window_of(pattern) - 1) * pattern.block_size
  return [min(most, int(chunk) * tokens) for chunk in places.max(axis=0)]


class Hop(NamedTuple):
  """One message of a halo: the end of a chunk that lies so many before.

  Attributes:
    slot: Of the chunk on the devices that send.
    tokens: At the chunk's end.
    pairs: Devices that send and receive.
    stays: Devices that hold the chunk themselves.
  """

  slot: int
  tokens: int
  pairs: tuple[tuple[int, int], ...]
  stays: tuple[int, ...]


def halo_hops(
  places: np.ndarray, slot: int, tokens: int, halo: int
) -> list[list[Hop]]:
  """The messages that fill the halo of the chunks in a slot, nearest first.

  Args:
    places: Of `chunk_places`.
    slot: Which chunk of each device.
    tokens: Of a chunk.
    halo: Tokens before it.
  """
  holder = {int(chunk): where for where, chunk in np.ndenumerate(places)}
  hops = []
  for distance in range(1, -(-halo // tokens) + 1):
    messages = []
    for source in range(places.shape[1]):
      pairs = [
        (holder[chunk - distance][0], device)
        for device, chunk in enumerate(places[:, slot].tolist())
        if chunk >= distance and holder[chunk - distance][1] == source
      ]
      if pairs:
        messages.append(
          Hop(
            source,
            min(tokens, halo - (distance - 1) * tokens),
            tuple(pair for pair in pairs if pair[0] != pair[1]),
            tuple(a for a, b in pairs if a == b),
          )
        )
    hops.append(messages)
  return hops


def _halo(
  kv: tuple[Array, Array],
  places: np.ndarray,
  slot: int,
  tokens: int,
  halo: int,
) -> list[tuple[Array, Array]]:
  """Keys and values before the chunk in `slot`, in order; 0 before the first.

  Chunks that are shorter than the window take several hops.
  """
  pieces = []
  for messages in halo_hops(places, slot, tokens, halo):
    received = []
    for hop in messages:
      end = jax.tree.map(
        lambda x, hop=hop: _chunk(x, hop.slot, tokens)[:, -hop.tokens :], kv
      )
      if hop.pairs:
        received.append(jax.lax.ppermute(end, "context", hop.pairs))
      if hop.stays:
        stays = np.isin(np.arange(len(places)), hop.stays)
        here = jnp.asarray(stays)[jax.lax.axis_index("context")]
        received.append(
          jax.tree.map(
            lambda x, h=here: jnp.where(h, x, jnp.zeros_like(x)), end
          )
        )
    # A device receives one of them, and zeros for the others.
    pieces.append(
      jax.tree.map(lambda *x: functools.reduce(jnp.add, x), *received)
    )
  return pieces[::-1]


def _gather_residues(
  x: Float[Array, "B T K H"],
  residues: Int[Array, " K"],
  block: int,
  stride: int,
  places: np.ndarray,
) -> Float[Array, "B S K H"]:
  """Of each head, the blocks of its residue in the whole sequence, in order."""
  B, _, K, H = x.shape
  x = x.reshape(B, -1, stride, block, K, H)
  own = jnp.take_along_axis(
    x, residues[None, None, None, None, :, None], axis=2, mode="clip"
  )[:, :, 0]
  own = own.reshape(B, places.shape[1], -1, K, H)
  # Devices first: so XLA adds gradients up where they belong.
  every = jax.lax.all_gather(own, "context").swapaxes(0, 1)
  return _in_order(every).reshape(B, -1, K, H)


def _exchange_case(
  pattern: HeadContexts,
  chunks: tuple[int, ...],
  num_chunks: int,
  tokens: int,
  halos: list[int],
) -> Case:
  """A device's chunks; sources are one window a chunk, and the residues."""
  block = pattern.block_size
  blocks = tokens // block
  rules = _strided(pattern)
  queries = []
  for slot, (chunk, halo) in enumerate(zip(chunks, halos, strict=True)):
    before = min(halo, chunk * tokens)
    near = dataclasses.replace(
      pattern, rules=tuple(Strided(local=rule.local) for rule in rules)
    )
    parts = [Part(slot, (halo - before, halo + tokens), near, before)]
    masks = [
      _far(rule, chunk * blocks, blocks, stride_of(pattern), num_chunks)
      for rule in rules
    ]
    columns = max(int(mask.any(0).sum()) for mask in masks)
    if columns:
      # What is seen is a prefix: no block is before the first residue.
      far = HeadContexts(
        block,
        tuple(Table.from_mask(mask[:, :columns]) for mask in masks),
        is_causal=False,
      )
      parts.append(Part(len(chunks), (0, columns * block), far, 0))
    queries.append(((slot * tokens, (slot + 1) * tokens), tuple(parts)))
  return Case(tuple(queries))


def _far(
  rule: Strided, first: int, blocks: int, stride: int, num_chunks: int
) -> np.ndarray:
  """Which gathered blocks the rows of a chunk see beyond the window."""
  if not rule.stride:
    return np.zeros((blocks, num_chunks * blocks // max(stride, 1)), bool)
  i = first + np.arange(blocks)[:, None]
  j = np.arange(rule.residue, num_chunks * blocks, stride)[None]
  return i - j >= rule.local


# The road of all other patterns.


def _by_heads(
  operands: _Operands,
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
    return _in_order(split).reshape(x.shape)

  def to_tokens(x: Array) -> Array:
    split = x.reshape(x.shape[0], places.size, -1, *x.shape[2:])
    x = _as_stored(split, slots).reshape(x.shape)
    return jax.lax.all_to_all(x, "context", 1, 2, tiled=True)

  def ids(x: Array | None) -> Array | None:
    if x is None:
      return None
    split = x.reshape(x.shape[0], slots, -1)
    every = jax.lax.all_gather(split, "context", axis=1)
    return _in_order(every).reshape(x.shape[0], -1)

  q = to_heads(operands.q)
  k, v = (
    to_heads(jnp.repeat(x, copies, axis=2)) for x in (operands.k, operands.v)
  )
  segments = ids(operands.q_segment_ids), ids(operands.kv_segment_ids)
  patterns, which = local_patterns(pattern, q.shape[2]), _place(devices)
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


# Shared by both.


def _place(devices: int) -> Int[Array, ""]:
  """Inside: this device's number among those of `heads` and `context`."""
  heads, context = (jax.lax.axis_index(axis) for axis in ("heads", "context"))
  return heads * devices + context


def _chunk(x: Array, slot: int, tokens: int) -> Array:
  return x[:, slot * tokens : (slot + 1) * tokens]


def _in_order(
  x: Float[Array, "B devices slots chunk *rest"],
) -> Float[Array, "B chunks chunk *rest"]:
  """From where chunks are held to their order in the sequence."""
  if x.shape[2] == 1:
    return x[:, :, 0]
  return jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)


def _as_stored(
  x: Float[Array, "B chunks chunk *rest"], slots: int
) -> Float[Array, "B devices slots chunk *rest"]:
  """The inverse of `_in_order`."""
  if slots == 1:
    return x[:, :, None]
  devices = x.shape[1] // 2
  return jnp.stack([x[:, :devices], x[:, devices:][:, ::-1]], axis=2)


def _in_one_piece(
  operands: _Operands,
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
