"""Triton kernels over key tiles: the gradients of keys and values.

Keys are the rows of every tile here, so that nothing is transposed but q.
The query heads of a KV head are summed inside a program. No atomics: what
several programs owe to one key is written as partial sums in float32, and the
program that owns the key adds them in a fixed order.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.head_attention.triton.problem import (
  Problem,
  clip,
  divide,
  divide_up,
  dot,
  load_rows,
  logits_of,
  store_rows,
)
from pallas_kernels.head_attention.triton.queries import (
  Column,
  Queries,
  Visits,
)
from pallas_kernels.head_attention.triton.walks import Shards

Sums = tuple[jax.Array, jax.Array]  # dk [block_kv, H], dv [block_kv, Hv]
# Positions of queries [block_q] -> what they see, [keys, queries].
Mask = Callable[[jax.Array], jax.Array]
# (problem, its refs) -> where the queries are.
MakeQueries = Callable[..., Queries]


class _QueryRefs(NamedTuple):
  """What a key tile reads of its queries."""

  q: Any
  d_out: Any
  lse: Any
  delta: Any
  segments: Any


class KeyTile:
  """The key tile of a program."""

  def __init__(
    self,
    problem: Problem,
    refs: Iterator[Any],
    *,
    batch: jax.Array,
    kv_head: jax.Array,
    positions: jax.Array,
    exist: jax.Array,
    queries: Queries,
  ) -> None:
    self.problem, self.batch, self.queries = problem, batch, queries
    self.positions = positions
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref = (
      next(refs) for _ in range(6)
    )
    q_segments_ref = None
    if problem.has_segments:
      q_segments_ref, kv_segments_ref = next(refs), next(refs)
      self.segments = plgpu.load(
        kv_segments_ref.at[batch, positions], mask=exist, other=0
      )
    self.refs = _QueryRefs(q_ref, d_out_ref, lse_ref, delta_ref, q_segments_ref)
    where = (batch, positions, kv_head)
    self.k = load_rows(k_ref, *where, problem.H, exist=exist)
    self.v = load_rows(v_ref, *where, problem.Hv, exist=exist)

  def zeros(self) -> Sums:
    rows = self.problem.tiling.block_kv
    return (
      jnp.zeros((rows, self.problem.columns), jnp.float32),
      jnp.zeros((rows, self.problem.v_columns), jnp.float32),
    )

  def visit(
    self, head: jax.Array, tile: jax.Array, mask_of: Mask | None, sums: Sums
  ) -> Sums:
    """Adds what query tile `tile` of `head` gives to these keys."""
    problem, refs = self.problem, self.refs
    batch, head = self.queries.place(self.batch, head)
    dk, dv = sums
    bq = problem.tiling.block_q
    rows = tile * bq + lax.iota(jnp.int32, bq)
    # Queries past the end read as zeros, and so do their gradients.
    exist = None if problem.T % bq == 0 else rows < problem.T
    q = load_rows(refs.q, batch, rows, head, problem.H, exist=exist)
    d_out = load_rows(refs.d_out, batch, rows, head, problem.Hv, exist=exist)
    lse = _numbers(refs.lse.at[batch, head, rows], exist)
    delta = _numbers(refs.delta.at[batch, head, rows], exist)
    mask = None if mask_of is None else mask_of(self.queries.positions(rows))
    if refs.segments is not None:
      found = _numbers(refs.segments.at[batch, rows], exist)
      same = self.segments[:, None] == found[None]
      mask = same if mask is None else mask & same
    logits, slope = logits_of(problem, dot(self.k, q, trans_b=True))
    weights = jnp.exp2(logits - lse[None])
    if mask is not None:
      weights = jnp.where(mask, weights, 0.0)
    dv += dot(weights.astype(d_out.dtype), d_out)
    d_logits = weights * (dot(self.v, d_out, trans_b=True) - delta[None])
    if slope is not None:
      d_logits *= slope
    if mask is not None:
      # Again: hidden values may have given infinities.
      d_logits = jnp.where(mask, d_logits, 0.0)
    return dk + dot(d_logits.astype(q.dtype), q), dv

  def visit_all(
    self,
    visits: Visits,
    mask_of: Callable[[jax.Array, jax.Array], Mask] | None,
    sums: Sums,
    *,
    share: tuple[Any, int] = (0, 1),
  ) -> Sums:
    """Adds what query tiles give to these keys.

    Args:
      visits: Which ones.
      mask_of: (head, tile) -> its mask; `None` if all is seen.
      sums: What to add to.
      share: (i, n): only the i-th of n equal parts of the visits.
    """

    def body(span: Any, item: jax.Array, sums: Sums) -> Sums:
      head, tile = visits.where(span, item)
      return self.visit(head, tile, mask_of and mask_of(head, tile), sums)

    def length(span: Any, total: Any) -> Any:
      low, high = visits.bounds(span)
      return total + (high - low)

    part, parts = share
    total = lax.fori_loop(0, visits.spans, length, jnp.int32(0))
    size = divide_up(total, parts)
    begin = jnp.minimum(part * size, total)
    end = jnp.minimum(begin + size, total)
    carry = (jnp.int32(0), sums)
    return fold((0, visits.spans), visits.bounds, (begin, end), body, carry)[1]


def fold(
  spans: tuple[Any, Any],
  bounds: Callable[[Any], tuple[Any, Any]],
  share: tuple[Any, Any],
  body: Callable[[Any, jax.Array, Sums], Sums],
  carry: tuple[Any, Sums],
) -> tuple[Any, Sums]:
  """Folds over the items of some spans, one span after the other.

  Args:
    spans: First span and the one after the last.
    bounds: Span -> its first item and the one after the last.
    share: Only items begin .. end, counted over all spans.
    body: (span, item, sums) -> sums.
    carry: Items counted before the first span, and the sums.
  """
  begin, end = share

  def per_span(span: Any, carry: tuple[Any, Sums]) -> tuple[Any, Sums]:
    before, sums = carry
    low, high = bounds(span)
    sums = lax.fori_loop(
      clip(low + begin - before, low, high),
      clip(low + end - before, low, high),
      lambda item, sums: body(span, item, sums),
      sums,
    )
    return before + (high - low), sums

  return lax.fori_loop(*spans, per_span, carry)


def _numbers(row: Any, exist: jax.Array | None) -> jax.Array:
  if exist is None:
    return plgpu.load(row)
  return plgpu.load(row, mask=exist, other=0)


def store_sums(
  problem: Problem,
  outs: tuple[Any, Any],
  index: tuple[Any, ...],
  sums: Sums,
  exist: jax.Array | None,
) -> None:
  """Writes dk and dv of a key tile."""
  dk_ref, dv_ref = outs
  store_rows(dk_ref, index, problem.H, sums[0], exist=exist)
  store_rows(dv_ref, index, problem.Hv, sums[1], exist=exist)


def scaled(problem: Problem, sums: Sums) -> Sums:
  """The sums, when all of them are in, as the gradients they are."""
  return sums[0] * problem.scale, sums[1]


def far_kernel(
  problem: Problem,
  *all_refs: Any,
  shards: Shards,
  pieces: int,
  make_queries: MakeQueries,
) -> None:
  """What the far part gives to one tile of a shard, cut into `pieces`.

  A pair is a shard and a KV head that owns it, with those of its query heads
  that do. Grid: shard tile and piece, pair, batch.

  Refs: q, k, v, d_out, lse, delta, segment ids of queries and keys if any,
  residue and KV head of each pair, those of `make_queries`; then dk, dv
  [B pieces, tokens of a shard, pairs, H], float32.
  """
  refs = iter(all_refs)
  reading = [next(refs) for _ in range(6 + 2 * problem.has_segments)]
  residues_ref, kv_heads_ref, *own_refs, dk_ref, dv_ref = refs
  queries = make_queries(problem, *own_refs)
  bkv = problem.tiling.block_kv
  tile = divide(pl.program_id(0), pieces)
  piece = pl.program_id(0) - tile * pieces
  pair, batch = pl.program_id(1), pl.program_id(2)
  residue = residues_ref[pair]
  tokens = tile * bkv + lax.iota(jnp.int32, bkv)
  exist = tokens < shards.length(jnp.int32(problem.S), residue)
  positions = shards.position(tokens, shards.stride, residue)
  keys = KeyTile(
    problem,
    iter(reading),
    batch=batch,
    kv_head=kv_heads_ref[pair],
    positions=positions,
    exist=exist,
    queries=queries,
  )

  def mask_of(head: jax.Array, tile: jax.Array) -> Mask:
    del head
    seen = (positions < shards.near_start(queries.first(tile))) & exist
    return lambda queries: jnp.broadcast_to(seen[:, None], (bkv, queries.size))

  whole, others = queries.far(shards, Column(batch, pair, tile), residue)
  sums, share = keys.zeros(), (piece, pieces)
  sums = keys.visit_all(whole, None, sums, share=share)
  sums = keys.visit_all(others, mask_of, sums, share=share)
  index = (batch * pieces + piece, tokens[:, None], pair)
  store_sums(problem, (dk_ref, dv_ref), index, sums, exist)


def near_kernel(
  problem: Problem,
  *all_refs: Any,
  shards: Shards,
  start: int,
  stop: int,
  pieces: int,
  make_queries: MakeQueries,
) -> None:
  """What the near part gives to one key tile, and the sum with the far part.

  Grid: key tile, KV head, batch.

  Refs: q, k, v, d_out, lse, delta, segment ids of queries and keys if any,
  residues of the run's heads; if the heads have shards: residues of the pairs,
  where each KV head's pairs begin, dk and dv of `far_kernel`; those of
  `make_queries`; then dk, dv [B, S, KV heads of the run, H].
  """
  refs = iter(all_refs)
  reading = [next(refs) for _ in range(6 + 2 * problem.has_segments)]
  residues_ref = next(refs)
  far_refs = [next(refs) for _ in range(4 if shards.stride else 0)]
  *own_refs, dk_ref, dv_ref = refs
  queries = make_queries(problem, *own_refs)
  bkv = problem.tiling.block_kv
  tile, kv_of_run, batch = (pl.program_id(i) for i in range(3))
  kv_head = kv_of_run + start // problem.groups
  positions = tile * bkv + lax.iota(jnp.int32, bkv)
  exist = positions < problem.S
  keys = KeyTile(
    problem,
    iter(reading),
    batch=batch,
    kv_head=kv_head,
    positions=positions,
    exist=exist,
    queries=queries,
  )
  heads = (
    jnp.maximum(kv_head * problem.groups, start),
    jnp.minimum((kv_head + 1) * problem.groups, stop),
  )

  def mask_of(head: jax.Array, tile: jax.Array) -> Mask:
    del tile
    seer = shards.last_query(positions, residues_ref[head - start])
    seer = jnp.where(exist, seer, -1)[:, None]

    def mask(queries: jax.Array) -> jax.Array:
      queries = queries[None]
      return (positions[:, None] <= queries) & (queries <= seer)

    return mask

  whole, others = queries.near(shards, Column(batch, kv_of_run, tile), heads)
  sums = keys.visit_all(whole, None, keys.zeros())
  sums = keys.visit_all(others, mask_of, sums)
  if shards.stride:
    sums = _add_far(
      problem, shards, far_refs, kv_of_run, pieces, batch, positions, sums
    )
  index = (batch, positions[:, None], kv_of_run)
  store_sums(problem, (dk_ref, dv_ref), index, scaled(problem, sums), exist)


def _add_far(
  problem: Problem,
  shards: Shards,
  far_refs: list[Any],
  kv_of_run: jax.Array,
  pieces: int,
  batch: jax.Array,
  positions: jax.Array,
  sums: Sums,
) -> Sums:
  """Adds the partial sums of `far_kernel` that belong to a key tile."""
  residues_ref, starts_ref, dk_ref, dv_ref = far_refs
  first, last = starts_ref[kv_of_run], starts_ref[kv_of_run + 1]
  block = problem.block
  index = divide(positions, block)
  round_ = lax.div(index, jnp.int32(shards.stride))
  tokens = round_ * block + (positions & (block - 1))

  def body(item: jax.Array, sums: Sums) -> Sums:
    pair = first + divide(item, pieces)
    piece = item - divide(item, pieces) * pieces
    own = index - round_ * shards.stride == residues_ref[pair]

    where = (batch * pieces + piece, tokens, pair)
    return (
      sums[0] + load_rows(dk_ref, *where, problem.H, exist=own),
      sums[1] + load_rows(dv_ref, *where, problem.Hv, exist=own),
    )

  return lax.fori_loop(0, (last - first) * pieces, body, sums)
