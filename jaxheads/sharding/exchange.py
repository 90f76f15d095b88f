"""Strided heads of split sequences: halos and residues go between devices.

A head sees a window, and every so manieth block of the past. So a device that
holds a chunk asks for the end of what is before it (a halo), and of each
key-value head for the blocks of its own residue.

Source:
  S2-Attention, https://arxiv.org/abs/2407.17678.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxheads.sharding.chunks import (
  Operands,
  chunk_of,
  in_order,
  place,
)
from jaxheads.sharding.partition import local_patterns
from pallas_kernels.head_attention import (
  Case,
  HeadContexts,
  Part,
  Strided,
  Table,
  attend_case,
)


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


def strided_rules(pattern: HeadContexts) -> list[Strided]:
  """One a query head."""
  return [rule for rule in pattern.rules if isinstance(rule, Strided)]


def stride_of(pattern: HeadContexts) -> int:
  """The stride of the heads that have one; 0 if all see a window only."""
  return max(rule.stride for rule in strided_rules(pattern))


def window_of(pattern: HeadContexts) -> int:
  """Blocks of the widest window."""
  return max(rule.local for rule in strided_rules(pattern))


def attend_by_exchange(
  operands: Operands,
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
  rules = strided_rules(pattern)
  halos = halo_tokens(pattern, tokens, places)
  sources = []
  for slot in range(slots):
    own = jax.tree.map(lambda x, s=slot: chunk_of(x, s, tokens), kv)
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
    which=place(devices),
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
        lambda x, hop=hop: chunk_of(x, hop.slot, tokens)[:, -hop.tokens :], kv
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
  return in_order(every).reshape(B, -1, K, H)


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
  rules = strided_rules(pattern)
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
