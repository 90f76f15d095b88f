"""Bytes that devices along `context` send to each other, by formula.

Strided layers send a halo and residues, other layers heads for tokens. Ring
attention, in which keys and values go around by all devices, is here for
comparison. Whole causal sequences of N heads, K of keys and values (repeated R
times where the devices do not divide them), on C devices; per token, in
numbers of a head, forward and backward:

  all-to-all   4 (N + R K) (C - 1) / C^2
  ring         6 K (C - 1) / C

so that ring attention sends 1.5 C K / (N + R K) times as much:

                                        C = 2    4    8
  LLM-S, 12 heads                         1.5  3.0    -
  LLM-B, 16 heads                         1.5  3.0  6.0
  LLaMA3-8B, 32 heads, 8 of keys          0.6  1.2  2.4

Dense layers take the all-to-all road for this. These are bytes and not
measured times; a ring can hide its messages behind its products, and would
send less where many query heads share keys and devices are two.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxheads.sharding.all_to_all import kv_copies
from jaxheads.sharding.chunks import chunk_places
from jaxheads.sharding.exchange import stride_of, window_of
from pallas_kernels.head_attention import HeadContexts


class Sizes(NamedTuple):
  """A layer on a mesh.

  Attributes:
    batch: Sequences of one device.
    length: Tokens of a sequence, on all devices together.
    num_heads, num_kv_heads: Of the model.
    head_dim: Numbers of a head.
    value_bytes: Of one number.
    devices: Along `context`.
    shards: Along `heads`.
  """

  batch: int
  length: int
  num_heads: int
  num_kv_heads: int
  head_dim: int
  value_bytes: int
  devices: int
  shards: int = 1

  @property
  def kv_bytes(self) -> int:
    """Keys and values of one token, of the heads of one device."""
    heads = self.num_kv_heads // self.shards
    return 2 * self.batch * heads * self.head_dim * self.value_bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Sent:
  """Bytes that each device along `context` sends in a pass, [devices]."""

  forward: np.ndarray
  backward: np.ndarray

  @property
  def most(self) -> int:
    """By the device that sends most, in both passes."""
    return int((self.forward + self.backward).max())


def exchange(
  sizes: Sizes, pattern: HeadContexts, *, balanced: bool = True
) -> Sent:
  """Of a layer whose heads see a window and a residue.

  A device sends the halos that others lack and its own blocks of the residues;
  gradients go back the same way.
  """
  halo = halo_tokens(sizes, pattern, balanced=balanced)
  residues = residue_tokens(sizes, pattern)
  return Sent(
    (halo.sum(axis=1) + residues) * sizes.kv_bytes,
    (halo.sum(axis=0) + residues) * sizes.kv_bytes,
  )


def halo_tokens(
  sizes: Sizes, pattern: HeadContexts, *, balanced: bool = True
) -> np.ndarray:
  """Tokens of each head that one sends another for windows, [from, to]."""
  places = chunk_places(sizes.devices, balanced)
  chunk = sizes.length // places.size
  reach = (window_of(pattern) - 1) * pattern.block_size
  sent = np.zeros((sizes.devices, sizes.devices), np.int64)
  for (receiver, _), asked in np.ndenumerate(places):
    for (sender, _), held in np.ndenumerate(places):
      # The end of the chunk that is held, from where the halo starts.
      start = max(held * chunk, asked * chunk - reach)
      if sender != receiver and held < asked:
        sent[sender, receiver] += max((held + 1) * chunk - start, 0)
  return sent


def residue_tokens(sizes: Sizes, pattern: HeadContexts) -> np.ndarray:
  """Tokens of each head that a device sends, or receives, for residues."""
  stride, devices = stride_of(pattern), sizes.devices
  own = sizes.length // devices // stride if stride else 0
  return np.full(devices, (devices - 1) * own, np.int64)


def all_to_all(sizes: Sizes) -> Sent:
  """Of a layer whose tokens are exchanged for heads, and back.

  Queries, keys, values and outputs, of which one of `devices` parts stays;
  gradients of all four go back.
  """
  copies = kv_copies(
    sizes.num_heads, sizes.num_kv_heads, sizes.shards, sizes.devices
  )
  heads = 2 * (sizes.num_heads + copies * sizes.num_kv_heads) // sizes.shards
  numbers = sizes.batch * sizes.length * heads * sizes.head_dim
  parts = numbers // sizes.devices**2 * (sizes.devices - 1)
  sent = np.full(sizes.devices, parts * sizes.value_bytes, np.int64)
  return Sent(sent, sent)


def ring(sizes: Sizes) -> Sent:
  """What ring attention would send at least, for any pattern.

  Keys and values of a device go around by all others; in the backward pass
  once more, and their gradients with them.
  """
  own = sizes.length // sizes.devices
  sent = (sizes.devices - 1) * own * sizes.kv_bytes
  forward = np.full(sizes.devices, sent, np.int64)
  return Sent(forward, 2 * forward)
