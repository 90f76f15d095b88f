"""The keys of a visit: a slice of the sequence, or of a head's shard."""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class KeyTile:
  """Some keys of one sequence and KV head.

  Attributes:
    head: Sequence and KV head.
    view: How the tokens are seen: (S,), or (S / (stride block), stride,
      block).
    start: First index along each axis of the view.
    size: Indices along each of them.
    positions: Of the keys.
  """

  head: tuple[Array, Array]
  view: tuple[int, ...]
  start: tuple[Array, ...]
  size: tuple[int, ...]
  positions: Int[Array, " keys"]

  @property
  def width(self) -> int:
    """Keys."""
    return self.positions.shape[0]

  def read(self, x: Float[Array, "B K S H"]) -> Float[Array, "keys H"]:
    """These keys of an array."""
    batch, heads, _, size = x.shape
    tile = lax.dynamic_slice(
      x.reshape(batch, heads, *self.view, size),
      (*self.head, *self.start, 0),
      (1, 1, *self.size, size),
    )
    return tile.reshape(self.width, size)

  def read_across(self, x: Float[Array, "B K H S"]) -> Float[Array, "H keys"]:
    """The same of an array whose tokens are its last axis."""
    batch, heads, size, _ = x.shape
    tile = lax.dynamic_slice(
      x.reshape(batch, heads, size, *self.view),
      (*self.head, 0, *self.start),
      (1, 1, size, *self.size),
    )
    return tile.reshape(size, self.width)

  def add(
    self, total: Float[Array, "B K S H"], tile: Float[Array, "keys H"]
  ) -> Float[Array, "B K S H"]:
    """`total`, with the tile added to these keys."""
    batch, heads, _, size = total.shape
    tile = tile + self.read(total)
    updated = lax.dynamic_update_slice(
      total.reshape(batch, heads, *self.view, size),
      tile.reshape(1, 1, *self.size, size),
      (*self.head, *self.start, 0),
    )
    return updated.reshape(total.shape)


def contiguous(
  head: tuple[Array, Array], first: Array, width: int, kv_length: int
) -> KeyTile:
  """Keys from `first` on, of `kv_length` with the padding."""
  positions = first + jnp.arange(width, dtype=jnp.int32)
  return KeyTile(head, (kv_length,), (first,), (width,), positions)


def of_shard(
  head: tuple[Array, Array],
  tile: Array,
  residue: Array,
  *,
  blocks: int,
  stride: int,
  block: int,
  kv_length: int,
) -> KeyTile:
  """Tile number `tile` of a shard, of `blocks` blocks."""
  first = tile * blocks
  numbers = (first + jnp.arange(blocks, dtype=jnp.int32)) * stride + residue
  positions = numbers[:, None] * block + jnp.arange(block, dtype=jnp.int32)
  return KeyTile(
    head,
    (kv_length // (stride * block), stride, block),
    (first, residue, jnp.int32(0)),
    (blocks, 1, block),
    positions.reshape(-1),
  )
