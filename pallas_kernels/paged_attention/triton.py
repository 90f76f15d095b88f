"""Paged attention on GPUs: one program for a few pages of a row, then a merge.

Long rows are split over many programs, and every program has as much to do:
what a step takes does not depend on how uneven the rows are.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from pallas_kernels.head_attention.triton.launches import capability
from pallas_kernels.head_attention.triton.problem import (
  LOG2_E,
  Softmax,
  add_to_softmax,
  call,
  divide,
  dot,
  load_rows,
  padded,
  softmax_of_nothing,
  store_rows,
)
from pallas_kernels.paged_attention.merge import merge
from pallas_kernels.paged_attention.operands import Operands, Settings
from pallas_kernels.paged_attention.steps import make_steps

# Tokens of a step, unless a page is longer, and of a turn of its loop.
_TOKENS = 512
_TILE = 64
# Rows of a tile of queries: they stay in registers.
_MOST_QUERIES = 64
# Compute capability from which Triton converts float8_e4m3fn.
_LEAST_FP8 = 8.9


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered; None if they are."""
  queries = operands.q.shape[1]
  if queries > _MOST_QUERIES:
    return f"`q` may have at most {_MOST_QUERIES} queries a row, got {queries}."
  here = capability()
  if (
    operands.k_pages.dtype == jnp.float8_e4m3fn
    and not settings.interpret
    and here is not None
    and float(here) < _LEAST_FP8
  ):
    return (
      f"pages of float8_e4m3fn need compute capability {_LEAST_FP8}, this is "
      f"{here}; use pages of int8 or float8_e5m2."
    )
  return None


@dataclasses.dataclass(frozen=True)
class _Problem:
  """Sizes of a call: rows, queries, head size, tokens of a page and a step."""

  R: int
  Q: int
  H: int
  page_size: int
  tokens: int
  tile: int
  scale: float


def attention(settings: Settings, operands: Operands) -> Float[Array, "R Q H"]:
  """See `operands.Implementation`."""
  q, k_pages, v_pages, table, seen, k_scales, v_scales = operands
  rows, queries, size = q.shape
  page_size = operands.page_size
  tokens = max(1, _TOKENS // page_size) * page_size
  steps = make_steps(table, tokens, page_size)
  length = steps.row.shape[0]
  dtype = operands.dtype
  scales = tuple(
    x.astype(jnp.float32) for x in (k_scales, v_scales) if x is not None
  )
  problem = _Problem(
    rows,
    queries,
    size,
    page_size,
    tokens,
    min(_TILE, pl.next_power_of_2(max(16, tokens))),
    settings.scale,
  )
  values, peak, total = call(
    _kernel,
    problem,  # type: ignore[arg-type]
    grid=(length,),
    inputs=(
      steps.row,
      steps.first,
      table.starts.astype(jnp.int32),
      table.lengths.astype(jnp.int32),
      jnp.clip(table.pages, 0, k_pages.shape[0] - 1).astype(jnp.int32),
      seen.astype(jnp.int32),
      q.astype(dtype)[:, :, None],
      k_pages[:, :, None],
      v_pages[:, :, None],
      *scales,
    ),
    out_shape=(
      jax.ShapeDtypeStruct((length, queries, size), jnp.float32),
      jax.ShapeDtypeStruct((length, queries), jnp.float32),
      jax.ShapeDtypeStruct((length, queries), jnp.float32),
    ),
    num_warps=4,
    num_stages=2,
    interpret=settings.interpret,
    name="paged_attention",
  )
  return merge((values, peak, total), steps.row, rows).astype(q.dtype)


def _kernel(
  problem: _Problem,
  row_ref: Any,
  first_ref: Any,
  starts_ref: Any,
  lengths_ref: Any,
  pages_ref: Any,
  seen_ref: Any,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  *rest: Any,
) -> None:
  """One step: softmax over its tokens, of the queries of its row."""
  *scales, values_ref, peak_ref, total_ref = rest
  step = pl.program_id(0)
  row, first = row_ref[step], first_ref[step]
  used = row < problem.R
  row = jnp.minimum(row, problem.R - 1)
  queries = lax.iota(jnp.int32, padded(problem.Q))
  exist = queries < problem.Q
  zero = jnp.int32(0)
  q = load_rows(q_ref, row, queries, zero, problem.H, exist=exist)
  seen = plgpu.load(seen_ref.at[row, queries], mask=exist, other=0)
  length = lengths_ref[row]
  start = starts_ref[row]
  last = jnp.minimum(length, first + problem.tokens)
  last = jnp.where(used, last, first)

  def visit(index: jax.Array, softmax: Softmax) -> Softmax:
    tokens = first + index * problem.tile + lax.iota(jnp.int32, problem.tile)
    there = tokens < last
    page = divide(tokens, problem.page_size)
    at = jnp.minimum(start + page, pages_ref.shape[0] - 1)
    number = plgpu.load(pages_ref.at[at], mask=there, other=0)
    place = (
      number[:, None],
      tokens - page * problem.page_size,
      zero,
      problem.H,
    )
    k, v = (
      load_rows(ref, *place, exist=there).astype(q.dtype)
      for ref in (k_ref, v_ref)
    )
    logits = dot(q, k, trans_b=True) * (problem.scale * LOG2_E)
    v_scale = None
    if scales:
      k_scale, v_scale = (
        plgpu.load(ref.at[number], mask=there, other=0.0) for ref in scales
      )
      logits *= k_scale[None]
    visible = (tokens[None] < seen[:, None]) & there[None]
    logits = jnp.where(visible, logits, -jnp.inf)
    return add_to_softmax(softmax, logits, v, v_scale)

  acc, m, l = lax.fori_loop(
    0,
    divide(last - first + (problem.tile - 1), problem.tile),
    visit,
    softmax_of_nothing(queries.size, padded(problem.H)),
  )
  store_rows(values_ref, (step, queries[:, None]), problem.H, acc, exist=exist)
  for ref, numbers in ((peak_ref, m / LOG2_E), (total_ref, l)):
    plgpu.store(ref.at[step, queries], numbers, mask=exist)
