"""Sums for query tiles that a kernel meets in the order of key tiles.

The sum of a query tile stands in HBM. Every step that adds to it fetches it
into the vector memory while the step before runs, and stores it while the
steps after run: three buffers in turn, one that is fetched, one that is added
to, one that is stored.

Fetches and stores stay inside a row of the grid, as rows may run on several
cores at once. They may because no two rows of a call have a query head in
common: those of the near part have a KV head each, those of the far part a KV
head and a residue each, those of shared tables a KV head each; other tables
are one row. Calls run one after the other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.head_attention.mosaic_tpu.items import Call, read_step

BUFFERS = 3


class Position(NamedTuple):
  """A step of the grid, as traced scalars but for the call.

  Attributes:
    tables: References to `Tables` in scalar memory.
    call: What runs.
    batch, row, item, member: Grid indices.
    steps: Steps of the row.
  """

  tables: Any
  call: Call
  batch: Any
  row: Any
  item: Any
  member: Any
  steps: Any

  @classmethod
  def here(cls, tables: Any, call: Call) -> "Position":
    """The step that runs; not inside a conditional."""
    batch, row, item, member = (pl.program_id(axis) for axis in range(4))
    steps = pl.num_programs(2) * call.members
    return cls(tables, call, batch, row, item, member, steps)

  @property
  def number(self) -> Any:
    """How many steps of the row are before it."""
    return self.item * self.call.members + self.member

  def next(self) -> "Position":
    """The step after it, in the same row."""
    wraps = self.member == self.call.members - 1
    return self._replace(
      item=jnp.where(wraps, self.item + 1, self.item),
      member=jnp.where(wraps, 0, self.member + 1),
    )

  def repeats(self, later: int, distance: int) -> Any:
    """Whether the step `later` from here has the query tile of `distance` ago.

    False if one of them is outside of the row.
    """
    members = self.call.members
    if distance % members:
      return jnp.bool_(False)  # Another head's.
    last = self.number + later
    first = last - distance
    one, other = (
      self.tables.place[
        lax.div(jnp.clip(step, 0, self.steps - 1), jnp.int32(members))
      ]
      for step in (first, last)
    )
    return (first >= 0) & (last < self.steps) & (one == other)


class QuerySums(NamedTuple):
  """Adds to [B, N, size, T] in HBM, one query tile a step.

  Attributes:
    sums_ref: The array; float32, written in place.
    buffers_ref: Tiles of it, [BUFFERS, size, block_q].
    fetches, stores: Semaphores, one a buffer.
  """

  sums_ref: Any
  buffers_ref: Any
  fetches: Any
  stores: Any

  @staticmethod
  def scratch(size: int, block_q: int) -> tuple[Any, ...]:
    """What it needs besides the array."""
    return (
      pltpu.VMEM((BUFFERS, size, block_q), jnp.float32),
      pltpu.SemaphoreType.DMA((BUFFERS,)),
      pltpu.SemaphoreType.DMA((BUFFERS,)),
    )

  def begin(self, at: Position) -> None:
    """Has the step's sums in their buffer, and the next ones on their way."""
    number, slot = at.number, _slot(at)
    before, after = _before(slot), _after(slot)

    # What was stored two steps ago leaves the buffer of the next step.
    @pl.when((number >= 2) & ~at.repeats(-1, 1))
    def free() -> None:
      self._store(at, after).wait()

    held = at.repeats(0, 1)

    @pl.when(held)
    def keep() -> None:
      self.buffers_ref[slot] = self.buffers_ref[before]

    # Not fetched before what was stored last is there.
    pl.when((number == 0) | (at.repeats(0, 2) & ~held))(
      self._fetch(at, slot).start
    )

    @pl.when((number + 1 < at.steps) & ~at.repeats(1, 1) & ~at.repeats(1, 2))
    def fetch_next() -> None:
      self._fetch(at.next(), after).start()

    pl.when(~held)(self._fetch(at, slot).wait)

  def add(self, at: Position, columns: Any, values: jax.Array) -> None:
    """Adds [size, some queries]; `columns` says which of the tile."""
    self.buffers_ref[_slot(at), :, columns] += values

  def end(self, at: Position) -> None:
    """Stores the step's sums; after the last step, all are there."""
    slot = _slot(at)
    before = _before(slot)
    store = self._store(at, slot)
    pl.when(~at.repeats(1, 1))(store.start)

    @pl.when(at.number == at.steps - 1)
    def finish() -> None:
      pl.when((at.number >= 1) & ~at.repeats(0, 1))(
        self._store(at, before).wait
      )
      store.wait()

  def _fetch(self, at: Position, slot: Any) -> Any:
    return pltpu.make_async_copy(
      self._tile(at), self.buffers_ref.at[slot], self.fetches.at[slot]
    )

  def _store(self, at: Position, slot: Any) -> Any:
    return pltpu.make_async_copy(
      self.buffers_ref.at[slot], self._tile(at), self.stores.at[slot]
    )

  def _tile(self, at: Position) -> Any:
    step = read_step(at.tables, at.row, at.item, at.member, at.call.members)
    block_q = self.buffers_ref.shape[2]
    columns = pl.ds(pl.multiple_of(step.q_tile * block_q, block_q), block_q)
    return self.sums_ref.at[at.batch, at.tables.heads[step.member], :, columns]


def _slot(at: Position) -> Any:
  return lax.rem(at.number, jnp.int32(BUFFERS))


def _before(slot: Any) -> Any:
  return jnp.where(slot == 0, BUFFERS - 1, slot - 1)


def _after(slot: Any) -> Any:
  return jnp.where(slot == BUFFERS - 1, 0, slot + 1)
