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
  read_offset,
  store_rows,
)
from pallas_kernels.head_attention.triton.walks import Shards

Sums = tuple[jax.Array, jax.Array]  # dk [block_kv, H], dv [block_kv, Hv]
# Positions of queries [block_q] -> what they see, [keys, queries].
Mask = Callable[[jax.Array], jax.Array]


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
    offset: Any,
  ) -> None:
    self.problem, self.batch, self.offset = problem, batch, offset
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
    dk, dv = sums
    bq = problem.tiling.block_q
    rows = tile * bq + lax.iota(jnp.int32, bq)
    # Queries past the end read as zeros, and so do their gradients.
    exist = None if problem.T % bq == 0 else rows < problem.T
    q = load_rows(refs.q, self.batch, rows, head, problem.H, exist=exist)
    d_out = load_rows(
      refs.d_out, self.batch, rows, head, problem.Hv, exist=exist
    )
    lse = _numbers(refs.lse.at[self.batch, head, rows], exist)
    delta = _numbers(refs.delta.at[self.batch, head, rows], exist)
    mask = None if mask_of is None else mask_of(self.offset + rows)
    if refs.segments is not None:
      found = _numbers(refs.segments.at[self.batch, rows], exist)
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

  def visit_heads(
    self,
    *,
    count: jax.Array,
    heads: Callable[[jax.Array], jax.Array],
    per_head: jax.Array,
    tile: Callable[[jax.Array], jax.Array],
    mask_of: Callable[[jax.Array, jax.Array], Mask] | None,
    share: tuple[Any, int],
    sums: Sums,
  ) -> Sums:
    """Adds a number of query tiles of each of some heads, in one loop.

    Args:
      count: Heads.
      heads: Which query head the i-th is.
      per_head: Query tiles a head.
      tile: Which tile the i-th is.
      mask_of: (head, tile) -> its mask; `None` if all is seen.
      share: (i, n): only the i-th of n equal parts of the loop.
      sums: What to add to.
    """
    total, (part, parts) = count * per_head, share
    size = divide_up(total, parts)
    begin = jnp.minimum(part * size, total)

    def body(visit: jax.Array, sums: Sums) -> Sums:
      which = lax.div(visit, jnp.maximum(per_head, 1))
      head, index = heads(which), tile(visit - which * per_head)
      return self.visit(head, index, mask_of and mask_of(head, index), sums)

    return lax.fori_loop(begin, jnp.minimum(begin + size, total), body, sums)


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
) -> None:
  """What the far part gives to one tile of a shard, cut into `pieces`.

  A pair is a shard and a KV head that owns it, with those of its query heads
  that do. Grid: shard tile and piece, pair, batch.

  Refs: q, k, v, d_out, lse, delta, segment ids of queries and keys if any,
  offset, residue and KV head of each pair, where its heads begin, the heads;
  then dk, dv [B pieces, tokens of a shard, pairs, H], float32.
  """
  refs = iter(all_refs)
  reading = [next(refs) for _ in range(6 + 2 * problem.has_segments)]
  offset_ref, residues_ref, kv_heads_ref, starts_ref, heads_ref, *outs = refs
  bq, bkv = problem.tiling.block_q, problem.tiling.block_kv
  offset = read_offset(problem, offset_ref)
  tile = divide(pl.program_id(0), pieces)
  piece = pl.program_id(0) - tile * pieces
  pair, batch = pl.program_id(1), pl.program_id(2)
  residue = residues_ref[pair]
  tokens = tile * bkv + lax.iota(jnp.int32, bkv)
  length = shards.length(jnp.int32(problem.S), residue)
  exist = tokens < length
  positions = shards.position(tokens, shards.stride, residue)
  keys = KeyTile(
    problem,
    iter(reading),
    batch=batch,
    kv_head=kv_heads_ref[pair],
    positions=positions,
    exist=exist,
    offset=offset,
  )
  end = (tile + 1) * bkv
  first, last = (
    shards.position(token, shards.stride, residue)
    for token in (tile * bkv, jnp.minimum(end, length) - 1)
  )
  some = shards.first_seer(first, offset)
  whole = shards.first_seer(last, offset)
  whole = jnp.where(end <= length, whole, problem.q_tiles)
  # Beyond the shard's end there is nothing.
  some = jnp.where(tile * bkv < length, some, problem.q_tiles)
  whole = jnp.maximum(whole, some)
  begin = starts_ref[pair]

  def mask_of(head: jax.Array, tile: jax.Array) -> Mask:
    del head
    start = shards.near_start(offset + tile * bq)
    seen = (positions < start) & exist
    return lambda queries: jnp.broadcast_to(seen[:, None], (bkv, queries.size))

  options: dict[str, Any] = dict(
    count=starts_ref[pair + 1] - begin,
    heads=lambda which: heads_ref[begin + which],
    share=(piece, pieces),
  )
  sums = keys.visit_heads(
    per_head=problem.q_tiles - whole,
    tile=lambda i: whole + i,
    mask_of=None,
    sums=keys.zeros(),
    **options,
  )
  sums = keys.visit_heads(
    per_head=whole - some,
    tile=lambda i: some + i,
    mask_of=mask_of,
    sums=sums,
    **options,
  )
  index = (batch * pieces + piece, tokens[:, None], pair)
  store_sums(problem, (outs[0], outs[1]), index, sums, exist)


def near_kernel(
  problem: Problem,
  *all_refs: Any,
  shards: Shards,
  start: int,
  stop: int,
  pieces: int,
) -> None:
  """What the near part gives to one key tile, and the sum with the far part.

  Grid: key tile, KV head, batch.

  Refs: q, k, v, d_out, lse, delta, segment ids of queries and keys if any,
  offset, residues of the run's heads; if the heads have shards: residues of
  the pairs, where each KV head's pairs begin, dk and dv of `far_kernel`; then
  dk, dv [B, S, KV heads of the run, H].
  """
  refs = iter(all_refs)
  reading = [next(refs) for _ in range(6 + 2 * problem.has_segments)]
  offset_ref, residues_ref, *rest = refs
  outs = rest[-2:]
  bq, bkv = problem.tiling.block_q, problem.tiling.block_kv
  offset = read_offset(problem, offset_ref)
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
    offset=offset,
  )
  first_head = jnp.maximum(kv_head * problem.groups, start)
  last_head = jnp.minimum((kv_head + 1) * problem.groups, stop)
  begin, end = tile * bkv, (tile + 1) * bkv
  # Query tiles that have this one in their near part: from the first whose
  # last query is no earlier, to the last before it becomes far.
  some = divide(jnp.maximum(begin - offset, 0), bq)
  some_end = shards.first_seer(begin, offset)
  some = jnp.minimum(some, some_end)
  # Of these, the ones that see all of it.
  window = (divide(begin, problem.block) + shards.local) * problem.block
  whole_end = divide(jnp.maximum(window - offset, 0), bq)
  whole_end = clip(whole_end, some, some_end)
  whole = clip(divide_up(end - 1 - offset, bq), some, whole_end)
  whole = jnp.where(end <= problem.S, whole, whole_end)

  def mask_of(head: jax.Array, tile: jax.Array) -> Mask:
    del tile
    seer = shards.last_query(positions, residues_ref[head - start])
    seer = jnp.where(exist, seer, -1)[:, None]

    def mask(queries: jax.Array) -> jax.Array:
      queries = queries[None]
      return (positions[:, None] <= queries) & (queries <= seer)

    return mask

  options: dict[str, Any] = dict(
    count=last_head - first_head,
    heads=lambda which: first_head + which,
    share=(0, 1),
  )
  sums = keys.visit_heads(
    per_head=whole_end - whole,
    tile=lambda i: whole + i,
    mask_of=None,
    sums=keys.zeros(),
    **options,
  )
  sums = keys.visit_heads(
    per_head=(some_end - some) - (whole_end - whole),
    # Jump over the whole ones in the middle.
    tile=lambda i: jnp.where(
      some + i < whole, some + i, some + i + (whole_end - whole)
    ),
    mask_of=mask_of,
    sums=sums,
    **options,
  )
  if shards.stride:
    pair_residues_ref, starts_ref, *far_refs = rest[:-2]
    sums = _add_far(
      problem,
      shards,
      pair_residues_ref,
      (starts_ref[kv_of_run], starts_ref[kv_of_run + 1]),
      far_refs,
      pieces,
      batch,
      positions,
      sums,
    )
  index = (batch, positions[:, None], kv_of_run)
  store_sums(problem, (outs[0], outs[1]), index, scaled(problem, sums), exist)


def _add_far(
  problem: Problem,
  shards: Shards,
  residues_ref: Any,
  pairs: tuple[jax.Array, jax.Array],
  far_refs: list[Any],
  pieces: int,
  batch: jax.Array,
  positions: jax.Array,
  sums: Sums,
) -> Sums:
  """Adds the partial sums of `far_kernel` that belong to a key tile."""
  dk_ref, dv_ref = far_refs
  block = problem.block
  index = divide(positions, block)
  round_ = lax.div(index, jnp.int32(shards.stride))
  tokens = round_ * block + (positions & (block - 1))

  def body(item: jax.Array, sums: Sums) -> Sums:
    pair = pairs[0] + divide(item, pieces)
    piece = item - divide(item, pieces) * pieces
    own = index - round_ * shards.stride == residues_ref[pair]

    where = (batch * pieces + piece, tokens, pair)
    return (
      sums[0] + load_rows(dk_ref, *where, problem.H, exist=own),
      sums[1] + load_rows(dv_ref, *where, problem.Hv, exist=own),
    )

  return lax.fori_loop(0, (pairs[1] - pairs[0]) * pieces, body, sums)
