"""Triton kernels over query tiles: the output, and the queries' gradient."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.head_attention.triton.problem import (
  LOG2_E,
  Problem,
  Softmax,
  add_to_softmax,
  dot,
  load_rows,
  logits_of,
  read_offset,
  softmax_of_nothing,
  store_rows,
)
from pallas_kernels.head_attention.triton.walks import Walk

# (problem, run's refs, head of the run, tile, positions, offset) -> visits.
MakeWalk = Callable[..., Walk]


class Located(NamedTuple):
  """The queries of a program, and what they visit.

  Attributes:
    rows: Of q, [block_q].
    batch, head: First and third index of q.
    head_of_run: Third index of what is written.
    stored: Which rows the program writes, bool [block_q].
    exist: Those of them that hold a query; the others are written empty.
    kv_batch, kv_head: First and third index of the keys.
    walk: What is visited.
  """

  rows: jax.Array
  batch: jax.Array
  head: jax.Array
  head_of_run: jax.Array
  stored: jax.Array
  exist: jax.Array
  kv_batch: jax.Array
  kv_head: jax.Array
  walk: Walk


# (problem, run's refs) -> the queries of this program.
Locate = Callable[..., Located]


def locate_dense(
  problem: Problem, *refs: Any, start: int, make_walk: MakeWalk
) -> Located:
  """Queries [B, T, N, H] at consecutive positions.

  Grid: query tile, head of the run, batch. Refs: offset, those of `make_walk`.
  """
  offset = read_offset(problem, refs[0])
  # The last queries see most: they go first, or the end has idle cores.
  tile = problem.q_tiles - 1 - pl.program_id(0)
  head_of_run, batch = pl.program_id(1), pl.program_id(2)
  head = start + head_of_run
  bq = problem.tiling.block_q
  rows = tile * bq + lax.iota(jnp.int32, bq)
  exist = rows < problem.T
  return Located(
    rows=rows,
    batch=batch,
    head=head,
    head_of_run=head_of_run,
    stored=exist,
    exist=exist,
    kv_batch=batch,
    kv_head=lax.div(head, jnp.int32(problem.groups)),
    walk=make_walk(problem, refs[1:], head_of_run, tile, offset + rows, offset),
  )


class _Tile:
  """The query tile of a program, and how it reads its keys."""

  def __init__(
    self,
    problem: Problem,
    locate: Locate,
    refs: Iterator[Any],
    run_refs: int,
  ) -> None:
    self.problem = problem
    q_ref, self.k_ref, self.v_ref = (next(refs) for _ in range(3))
    self.segments_ref = None
    if problem.has_segments:
      q_segments_ref, self.segments_ref = next(refs), next(refs)
    self.at = at = locate(problem, *(next(refs) for _ in range(run_refs)))
    self.walk = at.walk
    self.q = self.rows_of(q_ref, problem.H)
    if problem.has_segments:
      self.segments = plgpu.load(
        q_segments_ref.at[at.batch, at.rows], mask=at.exist, other=0
      )

  def rows_of(self, ref: Any, size: int) -> jax.Array:
    at = self.at
    return load_rows(ref, at.batch, at.rows, at.head, size, exist=at.exist)

  def numbers_of(self, ref: Any, other: float) -> jax.Array:
    """One number a query, of ref [B, N, T]."""
    at = self.at
    return plgpu.load(
      ref.at[at.batch, at.head, at.rows], mask=at.exist, other=other
    )

  def keys(
    self, positions: jax.Array, mask: jax.Array | None
  ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Keys and values of a visit, and its mask with the segments in it."""
    problem = self.problem
    # Tiles without a mask lie inside the keys.
    exist = None if mask is None else positions < problem.S
    where = (self.at.kv_batch, positions, self.at.kv_head)
    k = load_rows(self.k_ref, *where, problem.H, exist=exist)
    v = load_rows(self.v_ref, *where, problem.Hv, exist=exist)
    if self.segments_ref is not None:
      row = self.segments_ref.at[self.at.kv_batch, positions]
      if exist is None:
        found = plgpu.load(row)
      else:
        found = plgpu.load(row, mask=exist, other=0)
      same = self.segments[:, None] == found[None]
      mask = same if mask is None else mask & same
    return k, v, mask

  def visit_all(self, visit: Callable[..., Any], carry: Any) -> Any:
    """Folds `visit` over the full tiles, then over the others."""

    def full(index: jax.Array, carry: Any) -> Any:
      return visit(*self.keys(self.walk.full(index), None), carry)

    def edge(index: jax.Array, carry: Any) -> Any:
      return visit(*self.keys(*self.walk.edge(index)), carry)

    carry = lax.fori_loop(0, self.walk.full_count, full, carry)
    return lax.fori_loop(0, self.walk.edge_count, edge, carry)


def forward_kernel(
  problem: Problem,
  *all_refs: Any,
  locate: Locate,
  run_refs: int,
) -> None:
  """Softmax over the visits of a query tile; writes output and log-sum-exp.

  Refs: q, k, v, then segment ids of queries and keys if any, then those of
  `locate`, then out [B, T, heads, Hv] and lse [B, heads, T].
  """
  refs = iter(all_refs)
  tile = _Tile(problem, locate, refs, run_refs)
  out_ref, lse_ref = refs

  def visit(
    k: jax.Array, v: jax.Array, mask: jax.Array | None, softmax: Softmax
  ) -> Softmax:
    logits, _ = logits_of(problem, dot(tile.q, k, trans_b=True))
    if mask is not None:
      logits = jnp.where(mask, logits, -jnp.inf)
    return add_to_softmax(softmax, logits, v)

  acc, m, l = tile.visit_all(
    visit, softmax_of_nothing(problem.tiling.block_q, problem.v_columns)
  )
  at = tile.at
  # Tiles that all queries see whole know nothing of rows without one.
  empty = (l == 0) | ~at.exist
  l = jnp.where(empty, 1.0, l)
  out = jnp.where(empty[:, None], 0.0, acc / l[:, None])
  place = (at.batch, at.rows[:, None], at.head_of_run)
  store_rows(out_ref, place, problem.Hv, out, exist=at.stored)
  plgpu.store(
    lse_ref.at[at.batch, at.head_of_run, at.rows],
    jnp.where(empty, -jnp.inf, m / LOG2_E + jnp.log(l)),
    mask=at.stored,
  )


def dq_kernel(
  problem: Problem,
  *all_refs: Any,
  locate: Locate,
  run_refs: int,
) -> None:
  """Gradient of a query tile.

  Refs: as in `forward_kernel` up to `locate`'s, then d_out, the base-2
  log-sum-exp and delta [B, N, T], then dq [B, T, heads, H].
  """
  refs = iter(all_refs)
  tile = _Tile(problem, locate, refs, run_refs)
  d_out_ref, lse_ref, delta_ref, dq_ref = refs
  d_out = tile.rows_of(d_out_ref, problem.Hv)
  lse = tile.numbers_of(lse_ref, 0.0)[:, None]
  delta = tile.numbers_of(delta_ref, 0.0)[:, None]

  def visit(
    k: jax.Array, v: jax.Array, mask: jax.Array | None, dq: jax.Array
  ) -> jax.Array:
    logits, slope = logits_of(problem, dot(tile.q, k, trans_b=True))
    d_logits = jnp.exp2(logits - lse) * (dot(d_out, v, trans_b=True) - delta)
    if slope is not None:
      d_logits *= slope
    if mask is not None:
      # After the product: hidden keys may have given infinities.
      d_logits = jnp.where(mask, d_logits, 0.0)
    return dq + dot(d_logits.astype(k.dtype), k)

  shape = (problem.tiling.block_q, problem.columns)
  dq = tile.visit_all(visit, jnp.zeros(shape, jnp.float32))
  at = tile.at
  store_rows(
    dq_ref,
    (at.batch, at.rows[:, None], at.head_of_run),
    problem.H,
    dq * problem.scale,
    exist=at.stored,
  )
