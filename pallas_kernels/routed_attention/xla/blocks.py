"""Blocks of packed queries: what they hold, see and visit."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from pallas_kernels.head_attention.contexts import Rule, Table
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  TableHeads,
  far_blocks,
)
from pallas_kernels.packing import Packing
from pallas_kernels.routed_attention.operands import (
  FARTHEST,
  UNUSED,
  Runs,
  Settings,
)
from pallas_kernels.routed_attention.visits import (
  BlockVisits,
  block_visits,
)
from pallas_kernels.routed_attention.xla.keys import (
  KeyTile,
  contiguous,
  of_shard,
)


class Context(NamedTuple):
  """Everything that decides what a query sees; not differentiated.

  Attributes:
    packing: Which row is which query.
    positions: Of each row among the keys, negative for unused rows.
    limits: The last key that a strided rule may show to each row.
    mask: A further mask, its keys padded.
    q_segment_ids: Of the queries.
    kv_segment_ids: Of the keys, padded.
  """

  packing: Packing
  positions: Int[Array, " rows"]
  limits: Int[Array, " rows"]
  mask: Bool[Array, "#B #N #T S"] | None
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: Int[Array, "B S"] | None

  @property
  def has_mask(self) -> bool:
    """Whether no tile is without a mask."""
    return self.mask is not None or self.q_segment_ids is not None


@dataclasses.dataclass(frozen=True)
class Heads:
  """Consecutive heads whose visits have one form.

  Attributes:
    run: The heads.
    settings: What was asked for.
    groups: Query heads of a KV head.
    kv_length, kv_padded: Keys, without and with the padding.
  """

  run: StridedHeads | TableHeads
  settings: Settings
  groups: int
  kv_length: int
  kv_padded: int

  @property
  def has_far(self) -> bool:
    """Whether keys are read by shards."""
    return isinstance(self.run, StridedHeads) and self.run.stride > 0

  @property
  def has_window(self) -> bool:
    """Whether a query may not see all of the past."""
    assert isinstance(self.run, StridedHeads)
    return self.run.local * self.settings.block < FARTHEST

  @property
  def far_blocks(self) -> int:
    """Blocks of a tile of a shard."""
    assert isinstance(self.run, StridedHeads)
    return far_blocks(
      self.run, self.settings.block, self.settings.tiling, self.kv_length
    )

  def residue(self, head: Int[Array, ""]) -> Int[Array, ""]:
    """Which shard a head owns."""
    assert isinstance(self.run, StridedHeads)
    return jnp.asarray(self.run.residues, jnp.int32)[head - self.run.start]

  def far_tile(self, block: "Block", number: Int[Array, ""]) -> KeyTile:
    """A tile of the shard of a block's head."""
    assert isinstance(self.run, StridedHeads)
    return of_shard(
      (block.batch, block.kv_head),
      number,
      self.residue(block.head),
      blocks=self.far_blocks,
      stride=self.run.stride,
      block=self.settings.block,
      kv_length=self.kv_padded,
    )


class Block(NamedTuple):
  """One block of packed queries.

  Attributes:
    start: First row.
    batch, head, kv_head: Which ones.
    token: Of each row, clipped into the sequence.
    position: Of each row among the keys, negative for unused rows.
    limit: The last key that a strided rule may show to each row.
    visits: Key tiles.
    num_keys: Keys up to the last one that a query may see.
  """

  start: Int[Array, ""]
  batch: Int[Array, ""]
  head: Int[Array, ""]
  kv_head: Int[Array, ""]
  token: Int[Array, " block_q"]
  position: Int[Array, " block_q"]
  limit: Int[Array, " block_q"]
  visits: BlockVisits
  num_keys: Int[Array, ""]


def padded_length(settings: Settings, runs: Runs, kv_length: int) -> int:
  """Keys after padding: whole tiles, contiguous and of every shard."""
  multiple = settings.tiling.block_kv
  for run in runs:
    if isinstance(run, StridedHeads) and run.stride:
      blocks = far_blocks(run, settings.block, settings.tiling, kv_length)
      multiple = math.lcm(multiple, blocks * run.stride * settings.block)
  return -(-kv_length // multiple) * multiple


def block_range(
  packing: Packing, run: StridedHeads | TableHeads
) -> tuple[Int[Array, ""], Int[Array, ""]]:
  """First block of some heads, and the one after their last."""
  numbers = jnp.arange(packing.block_head.shape[0])
  used = numbers < packing.num_blocks

  def blocks_before(head: int) -> Int[Array, ""]:
    return jnp.sum(used & (packing.block_head < head), dtype=jnp.int32)

  return blocks_before(run.start), blocks_before(run.stop)


def read_block(heads: Heads, context: Context, number: Int[Array, ""]) -> Block:
  """Block `number`, of one of these heads."""
  packing, settings = context.packing, heads.settings
  length, rows = packing.row_of.shape[1], packing.block_rows
  start = number * rows

  def rows_of(x: Array) -> Array:
    return lax.dynamic_slice_in_dim(x, start, rows)

  batch, head = packing.block_batch[number], packing.block_head[number]
  token = jnp.clip(rows_of(packing.row_token) - batch * length, 0, length - 1)
  position, limit = rows_of(context.positions), rows_of(context.limits)
  first = jnp.where(limit == UNUSED, heads.kv_length, limit).min()
  last = limit.max()
  if isinstance(heads.run, StridedHeads):
    visits = block_visits(
      heads.run,
      heads.residue(head),
      first,
      last,
      block=settings.block,
      block_kv=settings.tiling.block_kv,
      far_tokens=heads.far_blocks * settings.block,
      kv_length=heads.kv_length,
    )
  else:
    assert settings.pattern is not None
    if not settings.pattern.is_causal:
      last = jnp.where(last >= 0, heads.kv_length - 1, last)
    none = jnp.zeros_like(last)
    visits = BlockVisits(*[none] * len(BlockVisits._fields))
  if context.has_mask:
    visits = visits._replace(
      far_full=jnp.zeros_like(last), low=visits.near, high=visits.near
    )
  return Block(
    start=start,
    batch=batch,
    head=head,
    kv_head=head // heads.groups,
    token=token,
    position=position,
    limit=limit,
    visits=visits,
    num_keys=jnp.clip(last + 1, 0, heads.kv_length),
  )


def visit_all(
  heads: Heads,
  context: Context,
  block: Block,
  step: Callable[[KeyTile, Bool[Array, "block_q keys"] | None, Any], Any],
  state: Any,
) -> Any:
  """Folds `step` over the key tiles of a block, in a fixed order.

  Tiles that every query sees whole have no mask. Those around the diagonal are
  narrower, so that less is computed in vain.
  """
  visits, tiling = block.visits, heads.settings.tiling
  keys_of = (block.batch, block.kv_head)

  def far(number: Array, state: Any, *, is_full: bool) -> Any:
    tile = heads.far_tile(block, number)
    if is_full:
      return step(tile, None, state)
    return step(tile, _shard_mask(heads, context, block, tile), state)

  def near(number: Array, state: Any, *, width: int, is_full: bool) -> Any:
    tile = contiguous(keys_of, number * width, width, heads.kv_padded)
    if is_full:
      return step(tile, None, state)
    if isinstance(heads.run, StridedHeads):
      return step(tile, _window_mask(heads, context, block, tile), state)
    mask = _rule_mask(heads, context, block, tile)
    return lax.cond(
      mask.any(), lambda state: step(tile, mask, state), lambda s: s, state
    )

  def loop(
    begin: Array, end: Array, body: Any, state: Any, **options: Any
  ) -> Any:
    body = functools.partial(body, **options)
    return lax.fori_loop(begin, end, body, state)

  wide = tiling.block_kv
  if heads.has_far:
    if not context.has_mask:
      state = loop(jnp.int32(0), visits.far_full, far, state, is_full=True)
    state = loop(visits.far_full, visits.far, far, state, is_full=False)
  if isinstance(heads.run, StridedHeads) and heads.run.sinks:
    options = dict(width=wide, is_full=False)
    state = loop(jnp.int32(0), visits.sinks, near, state, **options)
  # Tiles of a rule without a closed form all have a mask.
  if isinstance(heads.run, StridedHeads) and not context.has_mask:
    if heads.has_window:
      options = dict(width=wide, is_full=False)
      state = loop(visits.near, visits.low, near, state, **options)
    options = dict(width=wide, is_full=True)
    state = loop(visits.low, visits.high, near, state, **options)
  narrow = wide if context.has_mask else tiling.block_edge
  return loop(
    visits.high * (wide // narrow),
    (block.num_keys + narrow - 1) // narrow,
    near,
    state,
    width=narrow,
    is_full=False,
  )


Mask = Bool[Array, "block_q keys"]


def _shard_mask(
  heads: Heads, context: Context, block: Block, tile: KeyTile
) -> Mask:
  """Keys before the near part: the same for all queries."""
  keys = tile.positions
  past = block.visits.near * heads.settings.tiling.block_kv
  exist = keys < jnp.minimum(past, heads.kv_length)
  visible = exist[None] & (block.limit >= 0)[:, None]
  return visible & _asked_for(context, block, tile)


def _window_mask(
  heads: Heads, context: Context, block: Block, tile: KeyTile
) -> Mask:
  """Each key is seen from its own position to its last query's."""
  keys, limits = tile.positions, block.limit[:, None]
  visible = keys <= jnp.minimum(limits, heads.kv_length - 1)
  if heads.has_window:
    run = heads.run
    assert isinstance(run, StridedHeads)
    number = keys // heads.settings.block
    last = (number + run.local) * heads.settings.block - 1
    always = np.int32(2**31 - 1)
    if run.sinks:
      last = jnp.where(number < run.sinks, always, last)
    if run.stride:
      # What the head owns of the tiles of the sinks is read with its shard.
      is_near = keys >= block.visits.near * heads.settings.tiling.block_kv
      own = number % run.stride == heads.residue(block.head)
      last = jnp.where(own, jnp.where(is_near, always, -1), last)
    visible &= limits <= last
  return visible & _asked_for(context, block, tile)


def _rule_mask(
  heads: Heads, context: Context, block: Block, tile: KeyTile
) -> Mask:
  """What a rule without a closed form for its visits says."""
  run, pattern = heads.run, heads.settings.pattern
  assert isinstance(run, TableHeads) and pattern is not None
  size = pattern.block_size
  keys, queries = tile.positions[None], block.position[:, None]
  # A rule need not be defined beyond the keys, nor before them.
  i = jnp.maximum(queries, 0) // size
  j = jnp.minimum(keys, heads.kv_length - 1) // size
  rules = tuple(dict.fromkeys(run.rules))
  of_head = np.asarray([rules.index(rule) for rule in run.rules], np.int32)
  kept = lax.switch(
    jnp.asarray(of_head)[block.head - run.start],
    [functools.partial(_keep, rule) for rule in rules],
    i,
    j,
  )
  visible = kept & (keys < heads.kv_length) & (queries >= 0)
  if pattern.is_causal:
    visible &= keys <= queries
  return visible & _asked_for(context, block, tile)


def _keep(rule: Rule, i: Array, j: Array) -> Mask:
  if isinstance(rule, Table):
    return jnp.asarray(rule.mask())[i, j]
  return rule.keep(i, j)


def _asked_for(context: Context, block: Block, tile: KeyTile) -> Any:
  """What the mask and the segments leave visible."""
  visible: Any = jnp.bool_(True)
  if context.q_segment_ids is not None:
    assert context.kv_segment_ids is not None
    queries = context.q_segment_ids[block.batch][block.token]
    keys = context.kv_segment_ids[block.batch][tile.positions]
    visible &= queries[:, None] == keys[None]
  if context.mask is not None:
    sizes = context.mask.shape
    visible &= context.mask[
      block.batch if sizes[0] > 1 else 0,
      block.head if sizes[1] > 1 else 0,
      block.token[:, None] if sizes[2] > 1 else 0,
      tile.positions[None],
    ]
  return visible
