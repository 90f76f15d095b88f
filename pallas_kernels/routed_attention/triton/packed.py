"""How the Triton kernels of head attention find packed rows.

All sequences are one: rows are the queries of one long head, [1, rows, 1, H].
A tile of them names its sequence and its KV head.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.head_attention.triton.problem import Problem
from pallas_kernels.head_attention.triton.queries import Column, Visits
from pallas_kernels.head_attention.triton.query import Located
from pallas_kernels.head_attention.triton.walks import Shards
from pallas_kernels.routed_attention.operands import UNUSED


def locate_packed(
  problem: Problem, *refs: Any, local: int, stride: int
) -> Located:
  """The rows of a program over queries.

  Grid: as many tiles as the run may have. Those it has not write nothing, nor
  visit anything.

  Refs: the run's first tile and the one after its last; positions of the rows;
  first and last position, residue, sequence and KV head of the tiles; then
  whatever a program may leave as it is.
  """
  (
    bounds_ref,
    positions_ref,
    first_ref,
    last_ref,
    residue_ref,
    sequence_ref,
    kv_head_ref,
  ) = refs[:7]
  # The last queries of a segment see most: they go first.
  tile = bounds_ref[1] - 1 - pl.program_id(0)
  in_run = tile >= bounds_ref[0]
  tile = jnp.maximum(tile, 0)
  bq = problem.tiling.block_q
  rows = tile * bq + lax.iota(jnp.int32, bq)
  positions = plgpu.load(positions_ref.at[rows])
  stored = jnp.broadcast_to(in_run, (bq,))
  last, residue = last_ref[tile], residue_ref[tile]
  shards = Shards.of(problem, local, stride)
  visits = shards.visits_between(first_ref[tile], jnp.maximum(last, 0), residue)
  is_seeing = in_run & (last >= 0)
  visits = visits._replace(
    full_count=jnp.where(is_seeing, visits.full_count, 0),
    edge_count=jnp.where(is_seeing, visits.edge_count, 0),
  )
  return Located(
    rows=rows,
    batch=jnp.int32(0),
    head=jnp.int32(0),
    head_of_run=jnp.int32(0),
    stored=stored,
    exist=stored & (positions != UNUSED),
    kv_batch=sequence_ref[tile],
    kv_head=kv_head_ref[tile],
    walk=shards.walk(visits, positions, residue),
  )


class PackedQueries:
  """The rows that kernels over keys meet: a span for each query head."""

  def __init__(
    self,
    problem: Problem,
    positions_ref: Any,
    first_ref: Any,
    table_ref: Any,
  ) -> None:
    """Takes refs.

    Args:
      problem: What is computed.
      positions_ref: Of the rows.
      first_ref: Position of the first query of the tiles.
      table_ref: `segments.near_table`, or `segments.far_table` for `far`.
    """
    self._groups = problem.groups
    self._positions_ref, self._first_ref = positions_ref, first_ref
    self._table_ref = table_ref

  def place(self, batch: Any, head: Any) -> tuple[Any, Any]:
    del batch, head
    return jnp.int32(0), jnp.int32(0)

  def positions(self, rows: jax.Array) -> jax.Array:
    return plgpu.load(self._positions_ref.at[rows])

  def first(self, tile: jax.Array) -> jax.Array:
    first: jax.Array = self._first_ref[tile]
    return first

  def near(
    self, shards: Shards, column: Column, heads: tuple[Any, Any]
  ) -> tuple[Visits, Visits]:
    del shards
    groups = self._groups
    first_head = lax.div(heads[0], jnp.int32(groups)) * groups

    def others(span: Any) -> tuple[Any, Any]:
      # Before those that see all of the keys, and after them.
      which = lax.div(span, jnp.int32(2))
      return self._tiles(column, which, 2 * (span - 2 * which))

    return (
      Visits(
        groups,
        lambda span: self._tiles(column, span, 1),
        lambda span, tile: (first_head + span, tile),
      ),
      Visits(
        2 * groups,
        others,
        lambda span, tile: (first_head + lax.div(span, jnp.int32(2)), tile),
      ),
    )

  def far(
    self, shards: Shards, column: Column, residue: Any
  ) -> tuple[Visits, Visits]:
    del shards, residue
    heads = self._table_ref.shape[3]

    def visits(number: int) -> Visits:
      return Visits(
        heads,
        lambda span: self._tiles(column, span, number),
        # Which head it is, nobody asks: all of them own the shard.
        lambda span, tile: (span, tile),
      )

    return visits(1), visits(0)

  def _tiles(self, column: Column, which: Any, number: Any) -> tuple[Any, Any]:
    """Entry `number` of a head's tiles, and the next one."""
    row = (column.batch, column.number, column.tile, which)
    return self._table_ref[(*row, number)], self._table_ref[(*row, number + 1)]
