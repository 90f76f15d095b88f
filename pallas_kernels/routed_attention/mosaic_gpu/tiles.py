"""What each tile of packed rows is and visits, for the kernel to read.

A block of rows is one tile of the kernel or several: each has key ranges of its
own, from its own rows' positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.head_attention.schedule import StridedHeads
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton.walks import Shards, ShardVisits
from pallas_kernels.routed_attention.operands import (
  UNUSED,
  Operands,
  Settings,
  seen_up_to,
)
from pallas_kernels.routed_attention.visits import BlockVisits, block_visits


class Tile(NamedTuple):
  """One tile of rows, or many; int32 of equal shapes.

  Attributes:
    sequence, kv_head: Whose keys.
    residue: Of the head.
    visits: Key tiles.
  """

  sequence: Int[Array, "..."]
  kv_head: Int[Array, "..."]
  residue: Int[Array, "..."]
  visits: BlockVisits

  @classmethod
  def read(cls, row: Sequence[Int[Array, ""]]) -> "Tile":
    """From a row of `Tiles.table`."""
    sequence, kv_head, residue, *visits = row
    return cls(sequence, kv_head, residue, BlockVisits(*visits))

  def places(self, shards: Shards) -> ShardVisits:
    """Where the keys of each visit lie."""
    visits = self.visits
    return shards.places(
      self.residue,
      far_full=visits.far_full,
      far=visits.far,
      near=visits.near,
      low=visits.low,
      high=visits.high,
      end=visits.end,
    )

  def table(self) -> Int[Array, "tiles columns"]:
    """A row for every tile."""
    return jnp.stack((*self[:3], *self.visits), axis=1)


# Of a row of the table.
COLUMNS = len(Tile._fields) - 1 + len(BlockVisits._fields)


class Kind(NamedTuple):
  """Heads whose rules differ in the residue only, wherever they are.

  Attributes:
    run: The first of them.
    is_member: Of every head.
  """

  run: StridedHeads
  is_member: np.ndarray


def kinds(settings: Settings, num_heads: int) -> list[Kind]:
  """The heads, by kind."""
  found: dict[tuple[int, int], Kind] = {}
  for run in settings.runs(num_heads):
    assert isinstance(run, StridedHeads)
    empty = Kind(run, np.zeros(num_heads, bool))
    kind = found.setdefault((run.local, run.stride), empty)
    kind.is_member[run.start : run.stop] = True
  return list(found.values())


def tiles_of(
  kind: Kind, settings: Settings, operands: Operands, tiling: Tiling
) -> Tile:
  """All tiles; those of other heads and the unused ones visit nothing.

  Args:
    kind: The heads.
    settings, operands: What was asked for.
    tiling: The kernel's tiles: `block_q` divides `packing.block_rows`.
  """
  packing = operands.packing
  kv_length, kv_heads = operands.k.shape[1:3]
  limits = seen_up_to(settings, operands).reshape(-1, tiling.block_q)
  split = packing.block_rows // tiling.block_q
  # Whatever the packing says, nothing is read out of bounds.
  head, sequence = (
    jnp.repeat(jnp.clip(x, 0, count - 1), split)
    for x, count in (
      (packing.block_head, packing.num_heads),
      (packing.block_batch, operands.k.shape[0]),
    )
  )
  residues = [
    getattr(rule, "residue", 0) for rule in settings.rules(packing.num_heads)
  ]
  residue = jnp.asarray(residues, jnp.int32)[head]
  last = limits.max(axis=1)
  visits = block_visits(
    kind.run,
    residue,
    first=jnp.where(limits == UNUSED, kv_length, limits).min(axis=1),
    last=jnp.where(jnp.asarray(kind.is_member)[head], last, -1),
    block=settings.block,
    block_kv=tiling.block_kv,
    far_tokens=tiling.block_kv,
    kv_length=kv_length,
  )
  kv_head = head // (packing.num_heads // kv_heads)
  return Tile(sequence, kv_head, residue, visits)
