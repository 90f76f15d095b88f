"""Arithmetic of one tile, shared by the bodies of all TPU kernels.

Keys go down and queries across: the running maximum and sum are rows along
the lanes, and their reductions run over the cheap axis.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.head_attention.mosaic_tpu.edges import (
  CORNERS,
  EVERYTHING,
  Chunk,
  Edge,
  Halves,
  far_parts,
)
from pallas_kernels.head_attention.mosaic_tpu.items import EDGE, FAR, Call, Step
from pallas_kernels.head_attention.mosaic_tpu.lookup import row_words
from pallas_kernels.head_attention.mosaic_tpu.masks import (
  Mask,
  far_key_block,
  halves_seen,
  hide,
  last_block,
  tile_mask,
  with_segments,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.mosaic_tpu.specs import Inputs
from pallas_kernels.head_attention.schedule import StridedHeads, TableHeads

P = TypeVar("P")
W = TypeVar("W")

LOG2_E = float(np.log2(np.e))
# Rows of a register of bfloat16.
_PACKED_SUBLANES = 16
# Packed queries of a tile of which halves are left out.
_LEAST_CUT = 256


class Overlap(NamedTuple):
  """How the work on a query tile is cut.

  Attributes:
    chunk: Queries whose softmax runs while the matrix unit works on others.
    ahead: Chunks whose products come before it.
    pieces: Products, each of some keys, that make the logits of a chunk: the
      maximum of one piece is taken while the next is multiplied.
    scales_first: Logits are scaled before their maximum is taken, not after;
      forward only.
    edge_chunk: The same as `chunk` where a tile is seen in part.
  """

  chunk: int
  ahead: int
  pieces: int = 1
  scales_first: bool = False
  edge_chunk: int = 128


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
    mask: Which are visible.
  """

  values: jax.Array
  slope: jax.Array | None
  mask: Mask


class Tile(NamedTuple):
  """The keys of a tile, [keys, H] and [keys, Hv]; ids are [keys, 128].

  `words` are what packed queries looked up, int32 [1, queries] each.
  """

  k: jax.Array
  v: jax.Array
  segment_ids: jax.Array | None
  words: tuple[jax.Array, ...] | None = None

  def of(self, chunk: Chunk) -> "Tile":
    """Those that a chunk is held against."""
    keys = slice(chunk.first_key, chunk.first_key + chunk.keys)
    ids = self.segment_ids
    return self._replace(
      k=self.k[keys],
      v=self.v[keys],
      segment_ids=None if ids is None else ids[keys],
    )


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
  chunks: list[Chunk],
  ahead: int,
  multiply: Callable[[Chunk], P],
  weigh: Callable[[Chunk, P], W],
  add: Callable[[Chunk, W], None],
) -> None:
  """Runs `add(weigh(multiply(chunk)))` on every part of a query tile.

  Multiplies chunks ahead and adds one behind: the compiler keeps the order of
  the matrix products, and these must not wait for the softmax.
  """
  products = [multiply(chunk) for chunk in chunks[:ahead]]
  behind: tuple[Chunk, W] | None = None
  for at, chunk in enumerate(chunks):
    if at + ahead < len(chunks):
      products.append(multiply(chunks[at + ahead]))
    weights = weigh(chunk, products.pop(0))
    if behind is not None:
      add(*behind)
    behind = chunk, weights
  if behind is not None:
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
    self, tile: Tile, code: "Code", chunk: Chunk, pieces: int = 1
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
      code.kind,
      code.edge,
      chunk,
      positions,
      words,
    )
    if tile.segment_ids is not None:
      mask = with_segments(
        mask, self.columns(queries.segment_ids, chunk), tile.segment_ids
      )
    return Logits(hide(values, mask, -jnp.inf), slope, mask)


class Code(NamedTuple):
  """Tiles that share their code.

  Attributes:
    kind: FAR and EDGE.
    case: Which of `Call.edges` the tile is, if that is static.
    edge: The same.
    blocks: Of an edge of the far part, the numbers of leading blocks that it
      computes: more than the first and at most the second.
    halves: What packed queries see of a near edge.
  """

  kind: int
  case: int = 0
  edge: Edge | None = None
  blocks: tuple[int, int] | None = None
  halves: Halves | None = None

  def runs(self, layout: Layout, tables: Any, item: Any, step: Step) -> Any:
    """Whether an item's tile is one; scalars, traced, or NumPy arrays."""
    holds = (step.flags & (FAR | EDGE)) == self.kind
    if self.edge is not None:
      return holds & (tables.pointers[item] == self.case)
    if self.halves is not None:
      word = halves_seen(layout, tables, step)
      if self.halves != EVERYTHING:
        return holds & (word == self.halves.word)
      others = (word != each.word for each in CORNERS)
      return holds & functools.reduce(operator.and_, others, word != 0)
    if self.blocks is None:
      return holds
    assert isinstance(layout.run, StridedHeads)
    last = last_block(layout, tables, step) - layout.run.local
    least, most = self.blocks
    holds &= far_key_block(layout, tables, step, least) <= last
    if most < layout.far_blocks:
      holds &= far_key_block(layout, tables, step, most) > last
    return holds

  def chunks(self, layout: Layout, overlap: Overlap) -> list[Chunk]:
    """How its tiles are cut, without what it leaves out."""
    block_q, keys = layout.tiling.block_q, layout.tiling.block_kv
    size = min(block_q, overlap.edge_chunk)
    if self.edge is not None:
      return self.edge.chunks(block_q, keys, size)
    if not self.kind & EDGE or layout.packed:
      size = min(block_q, overlap.chunk)
    if self.halves is not None:
      return self.halves.chunks(block_q, keys, size)
    if self.kind & FAR:
      blocks = self.blocks[1] if self.blocks else layout.far_blocks
      keys = blocks * layout.block
    return [Chunk(start, size, 0, keys) for start in range(0, block_q, size)]


def _cuts_halves(layout: Layout) -> bool:
  """Whether near edges leave out what halves of the rows do not see."""
  if not layout.packed or isinstance(layout.run, TableHeads):
    return False
  return layout.tiling.block_q >= _LEAST_CUT


def codes(layout: Layout, call: Call) -> list[Code]:
  """All of a call, in order."""
  found = []
  for kind in call.kinds:
    if kind == EDGE and call.edges:
      found += [Code(kind, at, edge) for at, edge in enumerate(call.edges)]
    elif kind == EDGE and _cuts_halves(layout):
      found += [Code(kind, halves=each) for each in (*CORNERS, EVERYTHING)]
    elif kind == FAR | EDGE:
      ends = far_parts(layout.far_blocks, layout.block)
      found += [
        Code(kind, blocks=blocks)
        for blocks in zip((0, *ends[:-1]), ends, strict=True)
      ]
    else:
      found.append(Code(kind))
  return found


def visit_tile(
  context: TileContext,
  call: Call,
  overlap: Overlap,
  multiply: Callable[[Tile, Code, Chunk], P],
  weigh: Callable[[Chunk, P], W],
  add: Callable[[Tile, Chunk, W], None],
) -> None:
  """The work on the tile of a grid step, in the code of its kind.

  Args:
    context: Of the step.
    call: What runs.
    overlap: How the query tile is cut.
    multiply, weigh, add: The work on a chunk, in this order, with the keys that
      it is held against; see `chunk_by_chunk`.
  """
  layout = context.layout

  def run(code: Code) -> None:
    tile = load_tile(context.inputs, code.kind)
    queries = context.inputs.queries
    if queries.words is not None and code.kind & EDGE:
      words = row_words(layout, context.tables, context.step, queries)
      tile = tile._replace(words=words)
    chunk_by_chunk(
      code.chunks(layout, overlap),
      overlap.ahead,
      lambda chunk: multiply(tile.of(chunk), code, chunk),
      weigh,
      lambda chunk, weights: add(tile.of(chunk), chunk, weights),
    )

  # All conditions first: after a tile's code the tables are read again.
  conditions = [
    (code, code.runs(layout, context.tables, context.item, context.step))
    for code in codes(layout, call)
  ]
  for code, holds in conditions:
    pl.when(holds)(functools.partial(run, code))
