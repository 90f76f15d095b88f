"""How the heads of a run are laid out in units and query tiles on XLA."""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.head_attention.contexts import HeadContexts, Table
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  TableHeads,
  split_heads,
)


class QueryTile(NamedTuple):
  """The queries of one step of the outer loop."""

  first: Int[Array, ""]  # Position of the first one, among the keys.
  last: Int[Array, ""]  # Of the last one that exists.
  position: Int[Array, " R"]
  segment: Int[Array, "U R"] | None


@dataclasses.dataclass(frozen=True)
class Run:
  """Query heads that one loop serves.

  They are all the heads of some KV heads, or some heads of one KV head.

  Attributes:
    heads: What they see; `start` and `stop` count query heads.
    kv_start, kv_stop: Their KV heads.
    fold: Consecutive heads that see the same, as rows of one unit.
  """

  heads: StridedHeads | TableHeads
  kv_start: int
  kv_stop: int
  fold: int

  @property
  def kv_heads(self) -> int:
    """KV heads of the run."""
    return self.kv_stop - self.kv_start

  @property
  def units(self) -> int:
    """Units of one KV head."""
    heads = self.heads.stop - self.heads.start
    return heads // self.kv_heads // self.fold


def runs(pattern: HeadContexts, kv_heads: int) -> list[Run]:
  """The heads of a pattern, cut where KV heads are not served whole."""
  group = pattern.num_heads // kv_heads
  result = []
  for heads in split_heads(pattern):
    start = heads.start
    while start < heads.stop:
      same = start + 1
      while same < heads.stop and _kind(pattern, same) == _kind(pattern, start):
        same += 1
      whole = (same - start) // group * group
      if start % group or not whole:
        # The rest of a KV head that another run began, or ends.
        stop = min(same, (start // group + 1) * group)
      else:
        stop = start + whole
      part = _part(heads, start, stop)
      fold = _fold(pattern.rules[start:stop], group)
      result.append(Run(part, start // group, -(-stop // group), fold))
      start = stop
  return result


def _kind(pattern: HeadContexts, head: int) -> object:
  """Tables of one size go together, and so do closed forms."""
  rule = pattern.rules[head]
  return (rule.rows, rule.columns) if isinstance(rule, Table) else None


def _part(
  heads: StridedHeads | TableHeads, start: int, stop: int
) -> StridedHeads | TableHeads:
  if isinstance(heads, TableHeads):
    rules = heads.rules[start - heads.start : stop - heads.start]
    return TableHeads(start, stop, rules)
  residues = heads.residues[start - heads.start : stop - heads.start]
  return dataclasses.replace(heads, start=start, stop=stop, residues=residues)


def _fold(rules: tuple[object, ...], group: int) -> int:
  """The most consecutive heads of a KV head that always see the same."""
  together = math.gcd(len(rules), group)
  for fold in range(together, 1, -1):
    if together % fold == 0 and all(
      rules[i] == rules[i - i % fold] for i in range(len(rules))
    ):
      return fold
  return 1


@dataclasses.dataclass(frozen=True)
class Layout:
  """Rows in the order of the loops: [chunks, tiles, units, rows, ...].

  A chunk is what a step holds: some KV heads of some sequences, which are
  the pairs of a chunk, with all of their units.

  Attributes:
    batch, length: Sequences and queries.
    kv_heads, units, fold: Of the run.
    block_q: Queries of a tile.
    pairs: KV heads of a chunk, counted over the sequences.
  """

  batch: int
  length: int
  kv_heads: int
  units: int
  fold: int
  block_q: int
  pairs: int

  @property
  def tiles(self) -> int:
    """Query tiles."""
    return -(-self.length // self.block_q)

  @property
  def chunks(self) -> int:
    """Chunks; `pairs` divides what there is."""
    return self.batch * self.kv_heads // self.pairs

  @property
  def rows(self) -> int:
    """Rows of a unit."""
    return self.fold * self.block_q

  def pack(self, x: Array, fill: float = 0.0) -> Array:
    """[B, T, heads, ...] to [chunks, tiles, U, R, ...]."""
    pad = [(0, 0)] * x.ndim
    pad[1] = (0, self.tiles * self.block_q - self.length)
    x = jnp.pad(x, pad, constant_values=fill) if pad[1][1] else x
    rest = x.shape[3:]
    x = x.reshape(
      self.batch,
      self.tiles,
      self.block_q,
      self.kv_heads,
      self.units,
      self.fold,
      *rest,
    )
    # [B, K, tiles, units, fold, block_q, ...]
    x = x.transpose(0, 3, 1, 4, 5, 2, *range(6, x.ndim))
    x = x.reshape(
      self.chunks, self.pairs, self.tiles, self.units, self.rows, *rest
    )
    x = x.swapaxes(1, 2)
    return x.reshape(
      self.chunks, self.tiles, self.pairs * self.units, self.rows, *rest
    )

  def unpack(self, x: Array) -> Array:
    """The inverse of `pack`."""
    rest = x.shape[4:]
    x = x.reshape(
      self.chunks, self.tiles, self.pairs, self.units, self.rows, *rest
    )
    x = x.swapaxes(1, 2)
    x = x.reshape(
      self.batch,
      self.kv_heads,
      self.tiles,
      self.units,
      self.fold,
      self.block_q,
      *rest,
    )
    x = x.transpose(0, 2, 5, 1, 3, 4, *range(6, x.ndim))
    x = x.reshape(self.batch, self.tiles * self.block_q, -1, *rest)
    return x[:, : self.length]

  def pack_keys(self, x: Array) -> Array:
    """[B, S, K, ...] to [chunks, pairs, S, ...]."""
    x = x.swapaxes(1, 2)
    return x.reshape(self.chunks, self.pairs, *x.shape[2:])

  def unpack_keys(self, x: Array) -> Array:
    """The inverse of `pack_keys`."""
    x = x.reshape(self.batch, self.kv_heads, *x.shape[2:])
    return x.swapaxes(1, 2)


def pad(x: Array, axis: int, amount: int) -> Array:
  """Zeros after the end of an axis."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, amount)
  return jnp.pad(x, widths) if amount else x
