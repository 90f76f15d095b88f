"""Triton kernels for the keys' gradients of heads that have work lists."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.head_attention.triton.keys import (
  KeyTile,
  Mask,
  Sums,
  fold,
  scaled,
  store_sums,
)
from pallas_kernels.head_attention.triton.problem import (
  Problem,
  load_rows,
)
from pallas_kernels.head_attention.triton.queries import DenseQueries
from pallas_kernels.head_attention.triton.walks import kept, load_words


def column_kernel(
  problem: Problem,
  *all_refs: Any,
  start: int,
  stop: int,
  is_split: bool,
) -> None:
  """What one program's share of a column gives to its keys.

  The visits of a column are those of its heads, one after the other: first
  the full ones of all heads, then the others. Grid: program, batch.

  Refs: q, k, v, d_out, lse, delta, segment ids of queries and keys if any;
  the fields of `lists.KeyLists`; tile, KV head, begin and end of
  `lists.Columns`; then dk, dv: partial sums [B, programs block_kv, 1,
  H] in float32 if any column is split, else [B, S, KV heads of the run, H].
  """
  refs = iter(all_refs)
  reading = [next(refs) for _ in range(6 + 2 * problem.has_segments)]
  (
    rules_ref,
    full_starts_ref,
    full_tiles_ref,
    edge_starts_ref,
    edge_tiles_ref,
    edge_items_ref,
    edge_bits_ref,
  ) = (next(refs) for _ in range(7))
  tile_ref, kv_head_ref, begin_ref, end_ref, dk_ref, dv_ref = refs
  assert problem.q_offset is not None
  offset = problem.q_offset
  bq, bkv = problem.tiling.block_q, problem.tiling.block_kv
  program, batch = pl.program_id(0), pl.program_id(1)
  tile, kv_of_run = tile_ref[program], kv_head_ref[program]
  kv_head = kv_of_run + start // problem.groups
  span = lax.iota(jnp.int32, bkv)
  positions = tile * bkv + span
  exist = positions < problem.S
  keys = KeyTile(
    problem,
    iter(reading),
    batch=batch,
    kv_head=kv_head,
    positions=positions,
    exist=exist,
    queries=DenseQueries(problem, None),
  )
  heads = (
    jnp.maximum(kv_head * problem.groups, start),
    jnp.minimum((kv_head + 1) * problem.groups, stop),
  )
  share = begin_ref[program], end_ref[program]

  def full(head: jax.Array, item: jax.Array, sums: Sums) -> Sums:
    return keys.visit(head, full_tiles_ref[item], None, sums)

  def edge(head: jax.Array, item: jax.Array, sums: Sums) -> Sums:
    q_tile = edge_tiles_ref[item]
    row = edge_items_ref[item]

    def mask(queries: jax.Array) -> jax.Array:
      words = load_words(
        problem, edge_bits_ref, row, offset + q_tile * bq, queries
      )
      return kept(problem, words, queries, positions, keys_down=True)

    mask_of: Mask = mask
    return keys.visit(head, q_tile, mask_of, sums)

  carry = (jnp.int32(0), keys.zeros())
  for starts_ref, visit in ((full_starts_ref, full), (edge_starts_ref, edge)):

    def bounds(head: jax.Array, starts_ref: Any = starts_ref) -> Any:
      row = rules_ref[head - start] * problem.kv_tiles + tile
      return starts_ref[row], starts_ref[row + 1]

    carry = fold(heads, bounds, share, visit, carry)
  sums = carry[1]
  if is_split:
    rows = program * bkv + span
    index = (batch, rows[:, None], jnp.int32(0))
    store_sums(problem, (dk_ref, dv_ref), index, sums, None)
  else:
    index = (batch, positions[:, None], kv_of_run)
    store_sums(problem, (dk_ref, dv_ref), index, scaled(problem, sums), exist)


def sum_kernel(problem: Problem, *all_refs: Any) -> None:
  """Adds the partial sums of a key tile, in the order of the programs.

  Grid: key tile, KV head, batch.

  Refs: `starts` of `lists.Columns`, partial dk and dv; dk, dv.
  """
  starts_ref, dk_parts_ref, dv_parts_ref, dk_ref, dv_ref = all_refs
  tile, kv_of_run, batch = (pl.program_id(i) for i in range(3))
  bkv = problem.tiling.block_kv
  span = lax.iota(jnp.int32, bkv)
  column = kv_of_run * problem.kv_tiles + tile

  def body(program: jax.Array, sums: Sums) -> Sums:
    where = (batch, program * bkv + span, jnp.int32(0))
    return (
      sums[0] + load_rows(dk_parts_ref, *where, problem.H),
      sums[1] + load_rows(dv_parts_ref, *where, problem.Hv),
    )

  sums = lax.fori_loop(
    starts_ref[column],
    starts_ref[column + 1],
    body,
    (
      jnp.zeros((bkv, problem.columns), jnp.float32),
      jnp.zeros((bkv, problem.v_columns), jnp.float32),
    ),
  )
  positions = tile * bkv + span
  index = (batch, positions[:, None], kv_of_run)
  store_sums(
    problem,
    (dk_ref, dv_ref),
    index,
    scaled(problem, sums),
    positions < problem.S,
  )
