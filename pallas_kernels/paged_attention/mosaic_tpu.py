"""Paged attention on TPUs: one grid step for a few pages of a row.

Pages stay in device memory; while a step computes, the copies of the next
one's pages are under way. Rows that are not read have no step.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.head_attention.mosaic_tpu.tile import matmul
from pallas_kernels.paged_attention.merge import LOWEST
from pallas_kernels.paged_attention.operands import Operands, Settings
from pallas_kernels.paged_attention.steps import make_steps

# Tokens of a step, unless a page is longer: enough that its copies take longer
# than what a step costs besides.
_TOKENS = 1024
# Copies run at most one step ahead.
_BUFFERS = 2
# Numbers that scalar memory holds: 512 KiB of the 1 MiB that every TPU has.
_MOST_SCALARS = 1 << 17
_MOST_QUERIES = 256
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
  scalars = table.pages.shape[0] * 3 + table.lengths.shape[0] * 5
  if scalars > _MOST_SCALARS:
    return (
      f"`table` takes {scalars:,} numbers of scalar memory, more than "
      f"{_MOST_SCALARS:,}; use larger pages."
    )
  return None


class _Tables(NamedTuple):
  """What scalar memory holds."""

  row: Any  # Of each step.
  first: Any  # Token of each step.
  pages: Any
  starts: Any  # Of each row, as the two below.
  lengths: Any
  seen: Any  # Tokens that all queries of the row see.


def attention(settings: Settings, operands: Operands) -> Float[Array, "R Q H"]:
  """See `operands.Implementation`."""
  q, k_pages, v_pages, table, seen = operands
  rows, queries, size = q.shape
  page_size = operands.page_size
  tokens = max(1, _TOKENS // page_size) * page_size
  steps = make_steps(table, tokens, page_size)
  tables = _Tables(
    row=jnp.minimum(steps.row, rows - 1),
    first=steps.first,
    pages=jnp.clip(table.pages, 0, k_pages.shape[0] - 1),
    starts=table.starts,
    lengths=table.lengths,
    seen=seen.min(axis=1),
  )
  tables = jax.tree.map(lambda x: x.astype(jnp.int32), tables)

  def of_row(columns: int) -> pl.BlockSpec:
    return pl.BlockSpec(
      (None, queries, columns), lambda step, tables: (tables.row[step], 0, 0)
    )

  in_place = pl.BlockSpec(memory_space=pl.ANY)
  # Aliased operands are counted with the tables.
  alias = len(tables) + 4
  return pl.pallas_call(
    functools.partial(_kernel, scale=settings.scale, page_size=page_size),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(jnp.maximum(steps.num_steps, 1),),
      in_specs=(of_row(size), of_row(1), in_place, in_place, in_place),
      out_specs=of_row(size),
      scratch_shapes=(
        pltpu.VMEM((_BUFFERS, tokens, size), k_pages.dtype),
        pltpu.VMEM((_BUFFERS, tokens, size), v_pages.dtype),
        pltpu.SemaphoreType.DMA((_BUFFERS,)),
        pltpu.VMEM((queries, 1), jnp.float32),
        pltpu.VMEM((queries, 1), jnp.float32),
        pltpu.VMEM((queries, size), jnp.float32),
      ),
    ),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    # Rows without a step keep their zeros.
    input_output_aliases={alias: 0},
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    interpret=settings.interpret,
    name="paged_attention",
  )(tables, q, seen[..., None], k_pages, v_pages, jnp.zeros_like(q))


def _kernel(
  tables: _Tables,
  q_ref: Any,
  seen_ref: Any,
  k_pages: Any,
  v_pages: Any,
  zeros: Any,
  out_ref: Any,
  k_ref: Any,
  v_ref: Any,
  semaphores: Any,
  m_ref: Any,
  l_ref: Any,
  acc_ref: Any,
  *,
  scale: float,
  page_size: int,
) -> None:
  del zeros
  step, last = pl.program_id(0), pl.num_programs(0) - 1
  tokens = k_ref.shape[1]
  row, first = tables.row[step], tables.first[step]
  slot = jax.lax.rem(step, _BUFFERS)

  def each_copy(step: Any, do: Any) -> None:
    """Of the pages of a step, which are not always all it has room for."""
    slot = jax.lax.rem(step, _BUFFERS)
    row, first = tables.row[step], tables.first[step]
    left = jnp.minimum(tables.lengths[row] - first, tokens)
    entry = tables.starts[row] + first // page_size

    def of_page(index: Any, _: None) -> None:
      at = jnp.minimum(entry + index, tables.pages.shape[0] - 1)
      page = tables.pages[at]
      into = pl.ds(pl.multiple_of(index * page_size, page_size), page_size)
      for pool, buffer in ((k_pages, k_ref), (v_pages, v_ref)):
        do(
          pltpu.make_async_copy(
            pool.at[page], buffer.at[slot, into], semaphores.at[slot]
          )
        )

    jax.lax.fori_loop(0, pl.cdiv(left, page_size), of_page, None)

  @pl.when(step == 0)
  def begin() -> None:
    each_copy(step, lambda copy: copy.start())

  @pl.when(step < last)
  def look_ahead() -> None:
    each_copy(step + 1, lambda copy: copy.start())

  @pl.when(first == 0)
  def start_row() -> None:
    m_ref[...] = jnp.full_like(m_ref, LOWEST)
    l_ref[...] = jnp.zeros_like(l_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)

  each_copy(step, lambda copy: copy.wait())

  def add(*, masked: bool) -> None:
    dtype = jnp.promote_types(q_ref.dtype, k_ref.dtype)
    q, k, v = (x.astype(dtype) for x in (q_ref[...], k_ref[slot], v_ref[slot]))
    logits = matmul(q, k, (1, 1)) * scale
    if masked:
      # Queries down, tokens across; values have tokens down.
      at = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
      visible = at < seen_ref[...]
      logits = jnp.where(visible, logits, LOWEST)
      at = first + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
      v = jnp.where(at < tables.lengths[row], v, jnp.zeros_like(v))
    m_old = m_ref[...]
    m_new = jnp.maximum(m_old, logits.max(axis=1, keepdims=True))
    weights = jnp.exp(logits - m_new)
    if masked:
      weights = jnp.where(visible, weights, 0.0)
    shrink = jnp.exp(m_old - m_new)
    m_ref[...] = m_new
    l_ref[...] = l_ref[...] * shrink + weights.sum(axis=1, keepdims=True)
    acc_ref[...] = acc_ref[...] * shrink + matmul(
      weights.astype(dtype), v, (1, 0)
    )

  whole = first + tokens <= tables.seen[row]
  pl.when(whole)(functools.partial(add, masked=False))
  pl.when(~whole)(functools.partial(add, masked=True))

  @pl.when(first + tokens >= tables.lengths[row])
  def finish_row() -> None:
    total = l_ref[...]
    safe = jnp.where(total > 0, total, 1.0)
    out_ref[...] = (acc_ref[...] / safe).astype(out_ref.dtype)
