"""Which keys a query tile visits, computed inside a Triton kernel.

The same visits as `schedule` lists, from closed forms (strided heads) or from
work lists in global memory (tables). A visit is a vector of key positions:
those of a far tile lie in pieces of `block` tokens, `stride` blocks apart.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.head_attention.triton.problem import (
  FARTHEST,
  FOREVER,
  Problem,
  clip,
  divide,
  divide_up,
)


class Walk(NamedTuple):
  """What one query tile visits.

  Attributes:
    full_count, edge_count: Tiles without and with a mask.
    full: Visit -> key positions, all of them seen by every query.
    edge: Visit -> key positions, and what is seen, bool [queries, keys].
  """

  full_count: jax.Array
  edge_count: jax.Array
  full: Callable[[jax.Array], jax.Array]
  edge: Callable[[jax.Array], tuple[jax.Array, jax.Array]]


class Place(NamedTuple):
  """Where the keys of a visit lie.

  Attributes:
    token: First token, of the shard.
    stride, residue: Of the shard: 1 and 0 are the keys themselves.
    limit: Keys from this position on are none of this visit's.
  """

  token: jax.Array
  stride: jax.Array
  residue: jax.Array
  limit: jax.Array


class ShardVisits(NamedTuple):
  """As `Walk`, but as places."""

  full_count: jax.Array
  edge_count: jax.Array
  full: Callable[[jax.Array], Place]
  edge: Callable[[jax.Array], Place]

  def place(self, visit: jax.Array) -> Place:
    """Of any visit, the full ones first."""
    is_full = visit < self.full_count
    edge = self.edge(visit - self.full_count)
    pairs = zip(self.full(visit), edge, strict=True)
    return Place(*(jnp.where(is_full, one, other) for one, other in pairs))


@dataclasses.dataclass(frozen=True)
class Shards:
  """Arithmetic of strided heads; `local` and `stride` as in `Strided`."""

  problem: Problem
  local: int
  stride: int

  @classmethod
  def of(cls, problem: Problem, local: int, stride: int) -> "Shards":
    """The same for any `local`: beyond all lengths, positions would wrap."""
    return cls(problem, min(local, FARTHEST // problem.block), stride)

  def position(self, token: jax.Array, stride: Any, residue: Any) -> jax.Array:
    """Key position of a token of a shard."""
    block = self.problem.block
    within = token & (block - 1)
    return (divide(token, block) * stride + residue) * block + within

  def length(self, past: jax.Array, residue: jax.Array) -> jax.Array:
    """Tokens of the shard below position `past`."""
    block = self.problem.block
    whole = divide_up(divide(past, block) - residue, self.stride)
    # The shard's next block, which `past` may cut.
    begun = past - (whole * self.stride + residue) * block
    return whole * block + clip(begun, 0, block)

  def window(self, position: jax.Array) -> jax.Array:
    """First key of the window of a query."""
    block = self.problem.block
    first = divide(position, block) - (self.local - 1)
    return jnp.maximum(first, 0) * block

  def near_start(self, position: jax.Array) -> jax.Array:
    """As `schedule.near_start`."""
    block_kv = self.problem.tiling.block_kv
    return divide(self.window(position), block_kv) * block_kv

  def first_past(self, key: jax.Array) -> jax.Array:
    """First query whose `near_start` is past a key."""
    block, block_kv = self.problem.block, self.problem.tiling.block_kv
    above = (divide(key, block_kv) + 1) * block_kv
    return (divide_up(above, block) + (self.local - 1)) * block

  def window_end(self, key: jax.Array) -> jax.Array:
    """First query after the key whose window it is not in."""
    block = self.problem.block
    return (divide(key, block) + self.local) * block

  def last_query(self, keys: jax.Array, residue: jax.Array) -> jax.Array:
    """Last position that sees a key."""
    last = self.window_end(keys) - 1
    if self.stride == 0:
      return last
    index = divide(keys, self.problem.block)
    own = lax.rem(index, jnp.int32(self.stride)) == residue
    return jnp.where(own, FOREVER, last)

  def visits(
    self, tile: jax.Array, residue: jax.Array, offset: Any
  ) -> "ShardVisits":
    """What query tile `tile` of a head visits.

    Args:
      tile: Which tile.
      residue: The head's.
      offset: Position of the first query.
    """
    bq = self.problem.tiling.block_q
    first = offset + tile * bq
    last = jnp.minimum(first + bq, offset + self.problem.T) - 1
    return self.visits_between(first, last, residue)

  def visits_between(
    self, first: jax.Array, last: jax.Array, residue: jax.Array
  ) -> "ShardVisits":
    """What queries visit that lie, in any number, from `first` to `last`.

    Args:
      first, last: Positions, at least 0.
      residue: The head's.
    """
    S, bkv = self.problem.S, self.problem.tiling.block_kv
    start = self.near_start(first)
    past = jnp.minimum(start, S)
    far_full = far = jnp.int32(0)
    if self.stride:
      shard = self.length(past, residue)
      far_full, far = divide(shard, bkv), divide_up(shard, bkv)
    near = divide(start, bkv)
    end = jnp.maximum(near, divide(jnp.minimum(last, S - 1), bkv) + 1)
    low = clip(divide_up(self.window(last), bkv), near, end)
    high = clip(divide(jnp.minimum(first + 1, S), bkv), low, end)
    return self.places(residue, far_full, far, near, low, high, end)

  def places(
    self,
    residue: jax.Array,
    far_full: jax.Array,
    far: jax.Array,
    near: jax.Array,
    low: jax.Array,
    high: jax.Array,
    end: jax.Array,
  ) -> "ShardVisits":
    """A query tile's visits, from where they begin and end.

    Args:
      residue: The head's.
      far_full: Leading tiles of the shard that every query sees whole.
      far: Tiles of the shard.
      near: First contiguous tile, and where the shard ends.
      low, high: Contiguous tiles that every query sees whole.
      end: Contiguous tile after the last one.
    """
    S, bkv = self.problem.S, self.problem.tiling.block_kv
    past = jnp.minimum(near * bkv, S)
    far_edge = far - far_full

    def place(is_far: jax.Array, far: jax.Array, near: jax.Array) -> Place:
      # A contiguous tile is a shard of stride 1: one body for both.
      return Place(
        jnp.where(is_far, far, near) * bkv,
        jnp.where(is_far, jnp.int32(self.stride), jnp.int32(1)),
        jnp.where(is_far, residue, jnp.int32(0)),
        jnp.where(is_far, past, jnp.int32(S)),
      )

    def full(visit: jax.Array) -> Place:
      return place(visit < far_full, visit, visit - far_full + low)

    def edge(visit: jax.Array) -> Place:
      index = visit - far_edge + near
      # Jump over the full ones in the middle.
      index = jnp.where(index >= low, index + (high - low), index)
      return place(visit < far_edge, far_full + visit, index)

    return ShardVisits(
      far_full + (high - low),
      far_edge + (end - near) - (high - low),
      full,
      edge,
    )

  def mask(
    self,
    place: "Place",
    q_positions: jax.Array,
    k_positions: jax.Array,
    residue: jax.Array,
  ) -> jax.Array:
    """What an edge visit shows; positions broadcast against each other."""
    seer = self.last_query(k_positions, residue)
    seer = jnp.where(k_positions < place.limit, seer, -1)
    return (k_positions <= q_positions) & (q_positions <= seer)

  def walk(
    self, visits: "ShardVisits", positions: jax.Array, residue: jax.Array
  ) -> Walk:
    """The same visits, as vectors of keys.

    Args:
      visits: What a query tile visits.
      positions: Of its queries, [block_q].
      residue: The head's.
    """
    span = lax.iota(jnp.int32, self.problem.tiling.block_kv)

    def keys(place: Place) -> jax.Array:
      return self.position(place.token + span, place.stride, place.residue)

    def edge(visit: jax.Array) -> tuple[jax.Array, jax.Array]:
      place = visits.edge(visit)
      found = keys(place)
      mask = self.mask(place, positions[:, None], found[None], residue)
      return found, mask

    return Walk(
      visits.full_count,
      visits.edge_count,
      lambda visit: keys(visits.full(visit)),
      edge,
    )


class ListRefs(NamedTuple):
  """Work lists in global memory; see `lists.Lists`."""

  rules: Any
  full_starts: Any
  full_tiles: Any
  edge_starts: Any
  edge_tiles: Any
  edge_bits: Any


def kept(
  problem: Problem,
  words: jax.Array,
  q_positions: jax.Array,
  k_positions: jax.Array,
  *,
  keys_down: bool = False,
) -> jax.Array:
  """What a work list's item sees of a tile.

  Args:
    problem: What is computed.
    words: One a query, [block_q]: bit j is for key block j of the tile.
    q_positions, k_positions: [block_q] and [block_kv].
    keys_down: Keys are the rows of the result.
  """
  span = lax.iota(jnp.int32, problem.tiling.block_kv)
  block = divide(span, problem.list_block)
  if keys_down:
    q_positions, words = q_positions[None], words[None]
    k_positions, block = k_positions[:, None], block[:, None]
  else:
    q_positions, words = q_positions[:, None], words[:, None]
    k_positions, block = k_positions[None], block[None]
  mask = lax.shift_right_logical(*jnp.broadcast_arrays(words, block)) & 1 == 1
  mask &= k_positions < problem.S
  if problem.is_causal:
    mask &= k_positions <= q_positions
  return mask


def load_words(
  problem: Problem,
  bits_ref: Any,
  item: jax.Array,
  first: jax.Array,
  positions: jax.Array,
) -> jax.Array:
  """The word of every query of an edge item; `first` is the first's position.

  Queries that hang over the end have words too: those of the last block.
  """
  block = problem.list_block
  blocks = divide(positions, block) - divide(first, block)
  return plgpu.load(bits_ref.at[item, blocks])


def listed_walk(
  problem: Problem,
  refs: ListRefs,
  head: jax.Array,
  tile: jax.Array,
  positions: jax.Array,
  offset: int,
) -> Walk:
  """What query tile `tile` of the run's head `head` visits, by its lists."""
  first = offset + tile * problem.tiling.block_q
  row = refs.rules[head] * problem.q_tiles + tile
  full_start, edge_start = refs.full_starts[row], refs.edge_starts[row]
  bkv = problem.tiling.block_kv
  span = lax.iota(jnp.int32, bkv)

  def full(visit: jax.Array) -> jax.Array:
    return refs.full_tiles[full_start + visit] * bkv + span

  def edge(visit: jax.Array) -> tuple[jax.Array, jax.Array]:
    item = edge_start + visit
    k_positions = refs.edge_tiles[item] * bkv + span
    words = load_words(problem, refs.edge_bits, item, first, positions)
    return k_positions, kept(problem, words, positions, k_positions)

  return Walk(
    refs.full_starts[row + 1] - full_start,
    refs.edge_starts[row + 1] - edge_start,
    full,
    edge,
  )
