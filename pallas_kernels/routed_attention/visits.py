"""Which key tiles a block of packed queries visits, from its positions.

As `head_attention.schedule`, but for queries whose positions are known only
when the program runs, and have gaps: a strided head reads the tiles of its own
shard before `near`, the contiguous ones there that hold sinks, then contiguous
tiles up to the block's last query.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.head_attention.schedule import StridedHeads


class BlockVisits(NamedTuple):
  """Tiles of one block, or of many; int32 of equal shapes.

  Attributes:
    far_full: Leading tiles of the shard that every query sees whole.
    far: Tiles of the shard, the last of which may be seen in part.
    sinks: Leading contiguous tiles that are visited for their sinks; they end
      before `near`.
    near: First contiguous tile of the others.
    low, high: Contiguous tiles that every query sees whole.
    end: Contiguous tile after the last one.
  """

  far_full: Int[Array, "..."]
  far: Int[Array, "..."]
  sinks: Int[Array, "..."]
  near: Int[Array, "..."]
  low: Int[Array, "..."]
  high: Int[Array, "..."]
  end: Int[Array, "..."]


def block_visits(
  run: StridedHeads,
  residue: Int[Array, "..."],
  first: Int[Array, "..."],
  last: Int[Array, "..."],
  *,
  block: int,
  block_kv: int,
  far_tokens: int,
  kv_length: int,
  by_query: bool = False,
) -> BlockVisits:
  """What blocks of packed queries visit.

  Args:
    run: The heads.
    residue: Of each block's head.
    first, last: Positions of each block's first and last query; `last` is
      negative if it has none.
    block: Tokens of a block of the pattern.
    block_kv: Keys of a contiguous tile.
    far_tokens: Keys of a tile of the shard.
    kv_length: Keys.
    by_query: Of the shard, a query sees what its own window has left behind,
      instead of what lies before `near`.
  """

  def window(position: Int[Array, "..."]) -> Int[Array, "..."]:
    """First key that a query there sees near it."""
    return jnp.maximum(position // block - (run.local - 1), 0) * block

  def held(past: Int[Array, "..."]) -> Int[Array, "..."]:
    """Keys of the shard before a position."""
    past = jnp.minimum(past, kv_length)
    blocks = past // block
    # Of the shard: whole blocks, and what `past` leaves of the next one.
    whole = jnp.maximum(blocks - residue + run.stride - 1, 0) // run.stride
    begun = past - (whole * run.stride + residue) * block
    return whole * block + jnp.clip(begun, 0, block)

  near = window(first) // block_kv
  far = far_full = jnp.zeros_like(near)
  if run.stride:
    by_all, by_some = near * block_kv, near * block_kv
    if by_query:
      by_all, by_some = window(first), window(last)
    far_full, far = held(by_all) // far_tokens, -(-held(by_some) // far_tokens)
  end = jnp.maximum(near, jnp.minimum(last, kv_length - 1) // block_kv + 1)
  low = jnp.clip(-(-window(last) // block_kv), near, end)
  high = jnp.clip(jnp.minimum(first + 1, kv_length) // block_kv, low, end)
  sinks = jnp.minimum(near, sink_tiles(run, block, block_kv, kv_length))
  visits = BlockVisits(far_full, far, sinks, near, low, high, end)
  return BlockVisits(*(jnp.where(last >= 0, each, 0) for each in visits))


def sink_tiles(
  run: StridedHeads, block: int, block_kv: int, kv_length: int
) -> int:
  """Contiguous tiles that hold sinks."""
  return -(-min(run.sinks * block, kv_length) // block_kv)
