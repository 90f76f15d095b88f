"""Arithmetic of one tile, shared by the bodies of all TPU kernels.

Keys go down and queries across: the running maximum and sum are rows along
the lanes, and their reductions run over the cheap axis.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.head_attention.mosaic_tpu.items import EDGE, FAR, Call, Step
from pallas_kernels.head_attention.mosaic_tpu.lookup import row_words
from pallas_kernels.head_attention.mosaic_tpu.masks import (
  Chunk,
  same_segment,
  tile_mask,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.mosaic_tpu.specs import Inputs

P = TypeVar("P")
W = TypeVar("W")

LOG2_E = float(np.log2(np.e))
# Rows of a register of bfloat16.
_PACKED_SUBLANES = 16


class Overlap(NamedTuple):
  """How the work on a query tile is cut.

  Attributes:
    chunk: Queries whose softmax runs while the matrix unit works on others.
    ahead: Chunks whose products come before it.
    pieces: Products, each of some keys, that make the logits of a chunk: the
      maximum of one piece is taken while the next is multiplied.
    scales_first: Logits are scaled before their maximum is taken, not after;
      forward only.
  """

  chunk: int
  ahead: int
  pieces: int = 1
  scales_first: bool = False


# Where the running maximum starts, finite: hidden logits are -inf and have no
# weight even while nothing has been seen.
LOWEST = -1e30
# In base 2, the log-sum-exp of a row that sees nothing: no weight, no NaN.
NOTHING_SEEN = 1e30


def matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Float32 product of two matrices, over one axis of each."""
  exact = a.dtype == jnp.float32
  return lax.dot_general(
    a,
    b,
    (((contract[0],), (contract[1],)), ((), ())),
    preferred_element_type=jnp.float32,
    precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
  )


def cut(rows: jax.Array, pieces: int) -> list[jax.Array]:
  """So many pieces of equal size, or one if that would split a register."""
  if rows.shape[0] % (pieces * _PACKED_SUBLANES):
    return [rows]
  return jnp.split(rows, pieces)


class Logits(NamedTuple):
  """Of a chunk, float32 [keys, queries].

  Attributes:
    values: In units of `TileContext.unit`; hidden ones -inf.
    slope: What the soft cap multiplies gradients with, or None.
    mask: None if all are visible.
  """

  values: jax.Array
  slope: jax.Array | None
  mask: jax.Array | None


class Tile(NamedTuple):
  """The keys of a tile, [keys, H] and [keys, Hv]; ids are [keys, 128].

  `words` are what packed queries looked up, int32 [1, queries] each.
  """

  k: jax.Array
  v: jax.Array
  segment_ids: jax.Array | None
  words: tuple[jax.Array, ...] | None = None


def load_tile(inputs: Inputs, kind: int) -> Tile:
  """The keys that an item of this kind reads."""
  keys = inputs.far if kind & FAR else inputs.near
  assert keys is not None
  # Far tiles come as [blocks, block, H].
  k, v, segment_ids = (
    None if ref is None else ref[...].reshape(-1, ref.shape[-1]) for ref in keys
  )
  assert k is not None and v is not None
  return Tile(k, v, segment_ids)


def chunk_by_chunk(
  block_q: int,
  overlap: Overlap,
  multiply: Callable[[Chunk], P],
  weigh: Callable[[Chunk, P], W],
  add: Callable[[Chunk, W], None],
) -> None:
  """Runs `add(weigh(multiply(chunk)))` on every part of a query tile.

  Multiplies chunks ahead and adds one behind: the compiler keeps the order of
  the matrix products, and these must not wait for the softmax.
  """
  size = min(block_q, overlap.chunk)
  parts = [Chunk(start, size) for start in range(0, block_q, size)]
  products = [multiply(chunk) for chunk in parts[: overlap.ahead]]
  behind: tuple[Chunk, W] | None = None
  for at, chunk in enumerate(parts):
    if at + overlap.ahead < len(parts):
      products.append(multiply(parts[at + overlap.ahead]))
    weights = weigh(chunk, products.pop(0))
    if behind is not None:
      add(*behind)
    behind = chunk, weights
  assert behind is not None
  add(*behind)


class TileContext(NamedTuple):
  """What the arithmetic of every tile of a kernel needs.

  Attributes:
    layout: Static sizes.
    scale, soft_cap: Of the logits.
    tables: References to `Tables` in scalar memory.
    inputs: References of the operands.
    item, step: What the grid step does.
  """

  layout: Layout
  scale: float
  soft_cap: float | None
  tables: Any
  inputs: Inputs
  item: Any
  step: Step

  @property
  def unit(self) -> float:
    """What the values of the logits are multiplied with; positive.

    After the maximum is taken, so that the products need not be stored.
    """
    if self.soft_cap is not None:
      return self.soft_cap
    return self.scale if self.scale > 0 else 1.0

  def rows(self, ref: Any, chunk: Chunk) -> jax.Array:
    """A chunk of a query tile, [queries, size]."""
    return ref[chunk.start : chunk.start + chunk.size, :]

  def columns(self, ref: Any, chunk: Chunk) -> jax.Array:
    """A chunk of statistics or segment ids, [rows, queries]."""
    return ref[:, chunk.start : chunk.start + chunk.size]

  def logits(
    self, tile: Tile, kind: int, chunk: Chunk, pieces: int = 1
  ) -> Logits:
    """Masked logits of a chunk, from so many products."""
    queries = self.inputs.queries
    q = self.rows(queries.q, chunk)
    values = jnp.concatenate(
      [matmul(k, q, (1, 1)) for k in cut(tile.k, pieces)]
    )
    slope = None
    if self.soft_cap is not None:
      values = jnp.tanh(values * (self.scale / self.soft_cap))
      slope = 1 - values * values
    elif self.scale <= 0:
      values = values * self.scale
    positions = None
    if queries.positions is not None:
      positions = self.columns(queries.positions, chunk)[:1]
    words = tile.words
    if words is not None:
      words = tuple(self.columns(each, chunk) for each in words)
    mask = tile_mask(
      self.layout,
      self.tables,
      self.item,
      self.step,
      kind,
      chunk,
      positions,
      words,
    )
    if tile.segment_ids is not None:
      same = same_segment(
        self.columns(queries.segment_ids, chunk), tile.segment_ids
      )
      mask = same if mask is None else mask & same
    if mask is not None:
      values = jnp.where(mask, values, -jnp.inf)
    return Logits(values, slope, mask)


def visit_tile(
  context: TileContext,
  call: Call,
  overlap: Overlap,
  multiply: Callable[[Tile, int, Chunk], P],
  weigh: Callable[[Chunk, P], W],
  add: Callable[[Tile, Chunk, W], None],
) -> None:
  """The work on the tile of a grid step, in the code of its kind.

  Args:
    context: Of the step.
    call: What runs.
    overlap: How the query tile is cut.
    multiply, weigh, add: The work on a chunk, in this order; see
      `chunk_by_chunk`.
  """

  def run(kind: int) -> None:
    tile = load_tile(context.inputs, kind)
    queries = context.inputs.queries
    if queries.words is not None and kind & EDGE:
      words = row_words(context.layout, context.tables, context.step, queries)
      tile = tile._replace(words=words)
    chunk_by_chunk(
      context.layout.tiling.block_q,
      overlap,
      functools.partial(multiply, tile, kind),
      weigh,
      functools.partial(add, tile),
    )

  for kind in call.kinds:
    pl.when((context.step.flags & (FAR | EDGE)) == kind)(
      functools.partial(run, kind)
    )
