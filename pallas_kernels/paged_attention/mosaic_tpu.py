"""Paged attention on TPUs: a loop over the rows, a few pages a turn.

Pages stay in device memory. While a turn computes, the copies of the next
turns' pages are under way, over the ends of rows too. The last turn of a row
copies the pages that it has and computes little more.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.head_attention.mosaic_tpu.tile import LOG2_E, matmul
from pallas_kernels.paged_attention.merge import LOWEST
from pallas_kernels.paged_attention.operands import Operands, Settings

# Tokens of a turn, unless a page is longer, and bytes that their keys take at
# most: enough that a turn's copies take longer than what it costs besides, and
# that those under way keep the memory busy.
_TOKENS = 2048
_BYTES = 1 << 19
# The last turn of a row computes half of that, a quarter... down to this.
_LEAST_TOKENS = 256
# Turns that have room in vector memory: one computes, the others are copied.
_BUFFERS = 3
# Queries, outputs and limits of a grid step.
_ROW_BYTES = 1 << 20
_SHARED_ROWS = 8
# Numbers that scalar memory holds: 512 KiB of the 1 MiB that every TPU has.
_MOST_SCALARS = 1 << 17
_MOST_QUERIES = 256
_LANES = 128
# What the compiler's tiles of memory need.
_SUBLANES = {4: 8, 2: 16, 1: 32}


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered; None if they are.

  Looks at shapes and dtypes only.
  """
  del settings
  queries, page_size = operands.q.shape[1], operands.page_size
  if queries > _MOST_QUERIES:
    return f"`q` may have at most {_MOST_QUERIES} queries a row, got {queries}."
  multiple = _SUBLANES.get(operands.k_pages.dtype.itemsize, 8)
  if page_size % multiple:
    return (
      f"pages of {operands.k_pages.dtype} must hold a multiple of {multiple} "
      f"tokens, got {page_size}."
    )
  table = operands.table
  an_entry = 1 if operands.k_scales is None else 3
  scalars = table.pages.shape[0] * an_entry + table.lengths.shape[0] * 3
  if scalars > _MOST_SCALARS:
    return (
      f"`table` takes {scalars:,} numbers of scalar memory, more than "
      f"{_MOST_SCALARS:,}; use larger pages."
    )
  return None


class _Tables(NamedTuple):
  """What scalar memory holds."""

  pages: Any
  k_scales: Any  # Of each page that is listed, or None; as the next.
  v_scales: Any
  starts: Any  # Of each row, as the two below.
  lengths: Any
  seen: Any  # Tokens that all queries of the row see.


class _Layout(NamedTuple):
  """Rows in all and of a grid step, cores, tokens, and of the products."""

  rows: int
  block_rows: int
  cores: int
  page_size: int
  tokens: int
  scale: float
  dtype: Any


def attention(settings: Settings, operands: Operands) -> Float[Array, "R Q H"]:
  """See `operands.Implementation`."""
  q, k_pages, v_pages, _, seen, _, _ = operands
  rows, queries, size = q.shape
  cores = _cores()
  layout = _Layout(
    rows,
    _block_rows(q, cores),
    cores,
    operands.page_size,
    _turn_tokens(operands),
    settings.scale,
    operands.dtype,
  )
  blocks = pl.cdiv(rows, layout.block_rows)
  if cores > 1:  # As many for each.
    blocks = pl.cdiv(blocks, cores) * cores
    padding = (0, blocks * layout.block_rows - rows)
    q = jnp.pad(q, (padding, (0, 0), (0, 0)))
    seen = jnp.pad(seen, (padding, (0, 0)))

  def of_rows(columns: int) -> pl.BlockSpec:
    return pl.BlockSpec(
      (layout.block_rows, queries, columns),
      lambda core, step, tables: (step * cores + core, 0, 0),
    )

  buffer = (_BUFFERS, layout.tokens, size)
  in_place = pl.BlockSpec(memory_space=pl.ANY)
  out = pl.pallas_call(
    functools.partial(_kernel, layout=layout),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(cores, pl.cdiv(blocks, cores)),
      in_specs=(of_rows(size), of_rows(1), in_place, in_place),
      out_specs=of_rows(size),
      scratch_shapes=(
        pltpu.VMEM(buffer, k_pages.dtype),
        pltpu.VMEM(buffer, v_pages.dtype),
        pltpu.SemaphoreType.DMA((_BUFFERS,)),
        pltpu.SMEM((4,), jnp.int32),
        pltpu.VMEM((queries, 1), jnp.float32),
        pltpu.VMEM((queries, 1), jnp.float32),
        pltpu.VMEM((queries, size), jnp.float32),
      ),
    ),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      # Page numbers are in bounds, and checks take longer than copies.
      disable_bounds_checks=True,
    ),
    interpret=settings.interpret,
    name="paged_attention",
  )(_tables(operands, layout), q, seen[..., None], k_pages, v_pages)
  return out[:rows]


def _tables(operands: Operands, layout: _Layout) -> _Tables:
  table = operands.table
  pages = jnp.clip(table.pages, 0, operands.k_pages.shape[0] - 1)
  # A turn may look past the last entry.
  padding = (0, layout.tokens // layout.page_size)

  def of_entries(x: Array | None) -> Array | None:
    return None if x is None else jnp.pad(x, padding)

  def scales(x: Array | None) -> Array | None:
    return None if x is None else of_entries(x[pages].astype(jnp.float32))

  return _Tables(
    of_entries(pages.astype(jnp.int32)),
    scales(operands.k_scales),
    scales(operands.v_scales),
    jnp.clip(table.starts, 0, pages.shape[0]).astype(jnp.int32),
    table.lengths.astype(jnp.int32),
    operands.seen.min(axis=1).astype(jnp.int32),
  )


def _turn_tokens(operands: Operands) -> int:
  """Whole pages."""
  _, page_size, size = operands.k_pages.shape
  columns = pl.cdiv(size, _LANES) * _LANES
  fit = _BYTES // (columns * operands.k_pages.dtype.itemsize)
  return max(1, min(_TOKENS, fit) // page_size) * page_size


def _block_rows(q: Float[Array, "R Q H"], cores: int) -> int:
  """Rows of a grid step: as many as their share of vector memory holds."""
  rows, queries, size = q.shape
  # Queries and outputs, and limits of four bytes, in whole tiles.
  down = pl.cdiv(queries, 16) * 16
  across = pl.cdiv(size, _LANES) * _LANES
  a_row = down * (across * 2 * q.dtype.itemsize + _LANES * 4)
  most = max(1, _ROW_BYTES // a_row)
  # Cores take turns: short blocks even out what they have to do.
  return min(rows, most if cores == 1 else min(most, _SHARED_ROWS))


def _cores() -> int:
  """Cores that share the rows: two on TPUs whose cores make one device."""
  try:
    return pltpu.get_tpu_info().num_cores
  except ValueError:
    return 1


class _Walk:
  """Which turn comes next: the rows of this core, and the turns of each."""

  def __init__(self, layout: _Layout, tables: _Tables) -> None:
    self.layout, self.tables = layout, tables

  def after(self, row: Any) -> Any:
    """The row that follows."""
    block, cores = self.layout.block_rows, self.layout.cores
    if cores == 1:
      return row + 1
    ends = jax.lax.rem(row + 1, block) == 0
    return row + 1 + jnp.where(ends, (cores - 1) * block, 0)

  def settle(self, row: Any) -> Any:
    """This row, or the first after it that has tokens; else too many."""

    def is_empty(row: Any) -> Any:
      there = jnp.minimum(row, self.layout.rows - 1)
      return (row < self.layout.rows) & (self.tables.lengths[there] <= 0)

    return jax.lax.while_loop(is_empty, self.after, row)

  def next(self, row: Any, first: Any) -> tuple[Any, Any]:
    """What follows a turn of a row that has tokens."""
    first = first + self.layout.tokens
    ends = first >= self.tables.lengths[row]
    row = jax.lax.cond(
      ends, lambda row: self.settle(self.after(row)), lambda row: row, row
    )
    return row, jnp.where(ends, 0, first)


class _Copies:
  """Copies of the pages of a turn into its buffer."""

  def __init__(
    self,
    layout: _Layout,
    tables: _Tables,
    pools: Sequence[Any],
    buffers: Sequence[Any],
    semaphores: Any,
  ) -> None:
    self.layout, self.tables = layout, tables
    self.pairs = tuple(zip(pools, buffers, strict=True))
    self.semaphores = semaphores

  def start(self, row: Any, first: Any, slot: Any) -> None:
    """Of a turn, which may be a row's last: then no more than it has."""
    page_size = self.layout.page_size
    room = self.layout.tokens // page_size
    left = self.tables.lengths[row] - first
    count = jnp.minimum(_pages(left, page_size), room)
    entry = jnp.minimum(
      self.tables.starts[row] + first // page_size,
      self.tables.pages.shape[0] - room,
    )

    def of_page(index: Any, _: None) -> None:
      page = self.tables.pages[entry + index]
      into = pl.ds(pl.multiple_of(index * page_size, page_size), page_size)
      for pool, buffer in self.pairs:
        pltpu.make_async_copy(
          pool.at[page], buffer.at[slot, into], self.semaphores.at[slot]
        ).start()

    jax.lax.fori_loop(0, count, of_page, None)

  def wait(self, count: Any, slot: Any) -> None:
    """For so many pages; None for all that a turn has room for."""
    room = self.layout.tokens // self.layout.page_size
    if count is None:
      self._wait(room, slot)
      return
    # By the bits of their number: a loop over pages would take longer.
    for bit in range(room.bit_length()):
      pl.when((count >> bit) & 1 == 1)(
        functools.partial(self._wait, 1 << bit, slot)
      )

  def _wait(self, count: int, slot: Any) -> None:
    """Until as many bytes have arrived, whichever they are."""
    for _, buffer in self.pairs:
      pages = buffer.at[slot, pl.ds(0, count * self.layout.page_size)]
      pltpu.make_async_copy(pages, pages, self.semaphores.at[slot]).wait()


def _pages(tokens: Any, page_size: int) -> Any:
  return (tokens + (page_size - 1)) // page_size


def _kernel(
  tables: _Tables,
  q_ref: Any,
  seen_ref: Any,
  k_pages: Any,
  v_pages: Any,
  out_ref: Any,
  k_ref: Any,
  v_ref: Any,
  semaphores: Any,
  ahead_ref: Any,
  m_ref: Any,
  l_ref: Any,
  acc_ref: Any,
  *,
  layout: _Layout,
) -> None:
  core, block = pl.program_id(0), pl.program_id(1)
  first_row = (block * layout.cores + core) * layout.block_rows
  tokens, page_size = layout.tokens, layout.page_size
  pieces = _pieces(layout)
  walk = _Walk(layout, tables)
  copies = _Copies(
    layout, tables, (k_pages, v_pages), (k_ref, v_ref), semaphores
  )

  # The turn whose copies start next: row, first token, buffer; and the buffer
  # of the turn that computes next.
  def look_ahead() -> None:
    row, first, slot = ahead_ref[0], ahead_ref[1], ahead_ref[2]

    @pl.when(row < layout.rows)
    def go() -> None:
      copies.start(row, first, slot)
      ahead_ref[0], ahead_ref[1] = walk.next(row, first)
      ahead_ref[2] = _following(slot)

  @pl.when(block == 0)
  def begin() -> None:
    ahead_ref[0] = walk.settle(first_row)
    for index in (1, 2, 3):
      ahead_ref[index] = 0
    for _ in range(_BUFFERS - 1):
      look_ahead()

  def per_token(scales: Any, entry: Any, keys: int) -> jax.Array:
    """Scales of the pages of a turn, [1, keys]."""
    width = _scale_width(keys, page_size)
    parts = []
    for start in range(0, keys, width):
      at = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)
      part = jnp.full((1, width), scales[entry + start // page_size])
      for page in range(1, pl.cdiv(width, page_size)):
        scale = scales[entry + start // page_size + page]
        part = jnp.where(at >= page * page_size, scale, part)
      parts.append(part)
    return jnp.concatenate(parts, axis=1)

  def add(
    index: Any, row: Any, first: Any, slot: Any, at: Any, keys: int, mask: bool
  ) -> None:
    """Some tokens of a turn, all of them seen unless there is a mask."""
    span = pl.ds(at, keys)
    q = q_ref[index].astype(layout.dtype)
    k, v = (ref[slot, span].astype(layout.dtype) for ref in (k_ref, v_ref))
    first = first + at
    entry = jnp.minimum(
      tables.starts[row] + first // page_size,
      tables.pages.shape[0] - tokens // page_size,
    )
    logits = matmul(q, k, (1, 1)) * (layout.scale * LOG2_E)
    if tables.k_scales is not None:
      logits *= per_token(tables.k_scales, entry, keys)
    visible = None
    if mask:
      token = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
      visible = token < seen_ref[index] - first
      logits = jnp.where(visible, logits, LOWEST)
      # Values have tokens down.
      token = jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
      v = jnp.where(token < tables.lengths[row] - first, v, jnp.zeros_like(v))
    m_old = m_ref[...]
    m_new = jnp.maximum(m_old, logits.max(axis=1, keepdims=True))
    weights = jnp.exp2(logits - m_new)
    if visible is not None:
      weights = jnp.where(visible, weights, 0.0)
    shrink = jnp.exp2(m_old - m_new)
    m_ref[...] = m_new
    l_ref[...] = l_ref[...] * shrink + weights.sum(axis=1, keepdims=True)
    if tables.v_scales is not None:
      weights *= per_token(tables.v_scales, entry, keys)
      if visible is not None:  # Scales that no page has may be anything.
        weights = jnp.where(visible, weights, 0.0)
    acc_ref[...] = acc_ref[...] * shrink + matmul(
      weights.astype(layout.dtype), v, (1, 0)
    )

  def of_row(index: Any, _: None) -> None:
    row = first_row + index
    length = tables.lengths[row]
    m_ref[...] = jnp.full_like(m_ref, LOWEST)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

    def whole(turn: Any, _: None) -> None:
      slot = ahead_ref[3]
      ahead_ref[3] = _following(slot)
      look_ahead()
      copies.wait(None, slot)
      add(index, row, turn * tokens, slot, 0, tokens, False)

    def partial(turn: Any, _: None) -> None:
      slot = ahead_ref[3]
      ahead_ref[3] = _following(slot)
      first = turn * tokens
      left = jnp.minimum(length - first, tokens)
      seen = tables.seen[row] - first
      look_ahead()
      copies.wait(_pages(left, page_size), slot)
      at = jnp.int32(0)
      for keys in pieces[:-1]:
        fits = at + keys <= seen
        pl.when(fits)(
          functools.partial(
            add, index, row, first, slot, pl.multiple_of(at, keys), keys, False
          )
        )
        at = at + jnp.where(fits, keys, 0)
      least = pieces[-1]

      def add_least(number: Any, _: None) -> None:
        place = pl.multiple_of(number * least, least)
        add(index, row, first, slot, place, least, True)

      jax.lax.fori_loop(at // least, _pages(left, least), add_least, None)

    turns = _pages(length, tokens)
    seen_whole = jnp.minimum(tables.seen[row] // tokens, turns)
    jax.lax.fori_loop(0, seen_whole, whole, None)
    jax.lax.fori_loop(seen_whole, turns, partial, None)
    total = l_ref[...]
    safe = jnp.where(total > 0, total, 1.0)
    out_ref[index] = (acc_ref[...] / safe).astype(out_ref.dtype)

  count = jnp.minimum(layout.rows - first_row, layout.block_rows)
  jax.lax.fori_loop(0, count, of_row, None)


def _following(slot: Any) -> Any:
  return jnp.where(slot == _BUFFERS - 1, 0, slot + 1)


def _pieces(layout: _Layout) -> list[int]:
  """Tokens that are computed at a time in the last turn of a row.

  Each half of the one before, as long as pages and pieces share their ends;
  what is less than the last one is masked, and so are tokens not all see.
  """
  pieces = [layout.tokens]
  while True:
    half = pieces[-1] // 2
    fits = half % layout.page_size == 0 or layout.page_size % half == 0
    if half < _LEAST_TOKENS or pieces[-1] % 2 or not fits:
      break
    pieces.append(half)
  return [*pieces[1:], pieces[-1]]


def _scale_width(keys: int, page_size: int) -> int:
  """Tokens whose scales are put together: whole pages and whole registers."""
  width = max(page_size, _LANES)
  whole = width % page_size == 0 and keys % width == 0
  return width if whole else keys
