"""Where kernels over keys find their queries: which tiles, and which rows."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.head_attention.triton.problem import (
  Problem,
  clip,
  divide,
  divide_up,
  read_offset,
)
from pallas_kernels.head_attention.triton.walks import Shards


class Column(NamedTuple):
  """A key tile.

  Attributes:
    batch: Sequence.
    number: KV head of the run if near; which of its pairs of a KV head and a
      shard if far.
    tile: Which one; of the shard if far.
  """

  batch: jax.Array
  number: jax.Array
  tile: jax.Array


class Visits(NamedTuple):
  """Query tiles that a key tile meets, in spans of consecutive numbers.

  Attributes:
    spans: How many spans (static).
    bounds: Span -> its first number and the one after the last.
    where: Span and number -> query head and tile.
  """

  spans: int
  bounds: Callable[[Any], tuple[Any, Any]]
  where: Callable[[Any, Any], tuple[Any, Any]]


class Queries(Protocol):
  """What a kernel over keys asks about its queries."""

  def place(self, batch: Any, head: Any) -> tuple[Any, Any]:
    """First and third index of a head's rows in q."""

  def positions(self, rows: jax.Array) -> jax.Array:
    """Of these rows."""

  def first(self, tile: jax.Array) -> jax.Array:
    """Position of the first query of a tile, at least 0."""

  def near(
    self, shards: Shards, column: Column, heads: tuple[Any, Any]
  ) -> tuple[Visits, Visits]:
    """What has the keys in its near part: tiles that see all of them; others.

    Args:
      shards: What the heads see.
      column: The keys.
      heads: First query head and the one after the last.
    """

  def far(
    self, shards: Shards, column: Column, residue: Any
  ) -> tuple[Visits, Visits]:
    """What has the keys in its far part: tiles that see all of them; others.

    Args:
      shards: What the heads see.
      column: The keys.
      residue: Of their shard.
    """


class DenseQueries:
  """Queries [B, T, N, H] at consecutive positions.

  What sees a key tile then has closed forms, the same for all heads.
  """

  def __init__(
    self,
    problem: Problem,
    offset_ref: Any,
    starts_ref: Any = None,
    heads_ref: Any = None,
  ) -> None:
    """Takes refs.

    Args:
      problem: What is computed.
      offset_ref: Position of the first query.
      starts_ref, heads_ref: Heads of each pair, for `far`.
    """
    self._problem = problem
    self._offset = read_offset(problem, offset_ref)
    self._starts_ref, self._heads_ref = starts_ref, heads_ref

  def place(self, batch: Any, head: Any) -> tuple[Any, Any]:
    return batch, head

  def positions(self, rows: jax.Array) -> jax.Array:
    return self._offset + rows

  def first(self, tile: jax.Array) -> jax.Array:
    return self._offset + tile * self._problem.tiling.block_q

  def near(
    self, shards: Shards, column: Column, heads: tuple[Any, Any]
  ) -> tuple[Visits, Visits]:
    problem, offset = self._problem, self._offset
    bq, bkv = problem.tiling.block_q, problem.tiling.block_kv
    begin, end = column.tile * bkv, (column.tile + 1) * bkv
    # From the first tile whose last query is no earlier, to the last before
    # the keys become far.
    some = divide(jnp.maximum(begin - offset, 0), bq)
    some_end = self._first_past(shards, begin)
    some = jnp.minimum(some, some_end)
    # Of these, the ones that see all of it.
    whole_end = divide(jnp.maximum(shards.window_end(begin) - offset, 0), bq)
    whole_end = clip(whole_end, some, some_end)
    whole = clip(divide_up(end - 1 - offset, bq), some, whole_end)
    whole = jnp.where(end <= problem.S, whole, whole_end)
    numbers = heads[1] - heads[0], lambda which: heads[0] + which
    return (
      _flat(*numbers, whole_end - whole, lambda i: whole + i),
      _flat(
        *numbers,
        (some_end - some) - (whole_end - whole),
        # Jump over the whole ones in the middle.
        lambda i: jnp.where(
          some + i < whole, some + i, some + i + (whole_end - whole)
        ),
      ),
    )

  def far(
    self, shards: Shards, column: Column, residue: Any
  ) -> tuple[Visits, Visits]:
    problem = self._problem
    bkv = problem.tiling.block_kv
    begin, end = column.tile * bkv, (column.tile + 1) * bkv
    length = shards.length(jnp.int32(problem.S), residue)
    first, last = (
      shards.position(token, shards.stride, residue)
      for token in (begin, jnp.minimum(end, length) - 1)
    )
    some = self._first_past(shards, first)
    whole = self._first_past(shards, last)
    whole = jnp.where(end <= length, whole, problem.q_tiles)
    # Beyond the shard's end there is nothing.
    some = jnp.where(begin < length, some, problem.q_tiles)
    whole = jnp.maximum(whole, some)
    before = self._starts_ref[column.number]
    heads = (
      self._starts_ref[column.number + 1] - before,
      lambda which: self._heads_ref[before + which],
    )
    return (
      _flat(*heads, problem.q_tiles - whole, lambda i: whole + i),
      _flat(*heads, whole - some, lambda i: some + i),
    )

  def _first_past(self, shards: Shards, key: jax.Array) -> jax.Array:
    """First tile whose near part begins after a key."""
    problem = self._problem
    first = shards.first_past(key) - self._offset
    tile = divide_up(first, problem.tiling.block_q)
    return jnp.minimum(tile, problem.q_tiles)


def _flat(
  count: jax.Array,
  heads: Callable[[jax.Array], jax.Array],
  per_head: jax.Array,
  tile: Callable[[jax.Array], jax.Array],
) -> Visits:
  """One span for several heads that have equally many tiles.

  Args:
    count: Heads.
    heads: Which query head the i-th is.
    per_head: Tiles of each.
    tile: Which tile the i-th is.
  """

  def where(span: Any, item: jax.Array) -> tuple[jax.Array, jax.Array]:
    del span
    which = lax.div(item, jnp.maximum(per_head, 1))
    return heads(which), tile(item - which * per_head)

  return Visits(1, lambda span: (0, count * per_head), where)
