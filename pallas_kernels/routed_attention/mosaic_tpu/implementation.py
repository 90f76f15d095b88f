"""Routed attention on TPUs: the kernels of head attention on packed rows.

All sequences are one: rows are the queries of one long head, and keys those of
B K heads. A block of rows is a query tile that names its KV head; which key
tiles it visits is listed when the program runs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.head_attention import operands as head_operands
from pallas_kernels.head_attention.contexts import HeadContexts, Strided
from pallas_kernels.head_attention.mosaic_tpu import settings as head_settings
from pallas_kernels.head_attention.mosaic_tpu import specs
from pallas_kernels.head_attention.mosaic_tpu.backward_kernel import (
  Gradients,
  add_gradients,
)
from pallas_kernels.head_attention.mosaic_tpu.forward_kernel import attend
from pallas_kernels.head_attention.mosaic_tpu.items import MAX_ROWS, Call
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.mosaic_tpu.tile import LOG2_E, NOTHING_SEEN
from pallas_kernels.head_attention.schedule import StridedHeads, TableHeads
from pallas_kernels.packing import Packing
from pallas_kernels.routed_attention.mosaic_tpu.lookups import make_lookups
from pallas_kernels.routed_attention.mosaic_tpu.worklist import (
  MOST_ITEMS,
  Blocks,
  TileVisits,
  by_block,
  by_far_tile,
  by_near_tile,
  far_tiles,
  for_calls,
)
from pallas_kernels.routed_attention.operands import (
  UNUSED,
  Operands,
  Settings,
  row_positions,
  seen_up_to,
)
from pallas_kernels.routed_attention.visits import BlockVisits, block_visits


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered; None if they are.

  Looks at shapes, dtypes and static settings only.
  """
  packing = operands.packing
  if operands.mask is not None:
    return "`mask` is not known when the tiles are listed; use a `pattern`."
  if packing.block_head.size > MAX_ROWS:
    return (
      f"`packing` may have at most {MAX_ROWS} blocks, got "
      f"{packing.block_head.size}; use larger `block_rows`."
    )
  block_kv = settings.tiling.block_kv
  most = MOST_ITEMS // 2 * block_kv
  if operands.k.shape[1] > most:
    return (
      f"`k` may have at most {most:,} tokens with tiles of {block_kv}, got "
      f"{operands.k.shape[1]:,}; use a larger `block_kv`."
    )
  return head_settings.refusal(
    _head_settings(settings, packing.num_heads), _head_operands(operands)
  )


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "rows H"], Float[Array, " rows"]]:
  """Output and log-sum-exp; see `operands.Implementation`."""
  runs = make_runs(settings, operands)
  rows, size = operands.q.shape
  results: tuple[Array, Array] = (
    jnp.zeros((1, 1, rows, size), operands.q.dtype),
    jnp.full((1, 1, 1, rows), -jnp.inf, jnp.float32),
  )
  queries = _queries(operands)
  for run in runs:
    layout = run.layout
    step = functools.partial(
      _attend,
      layout,
      run.asking(queries),
      _keys(layout, operands),
      _options(settings, operands, layout, backward=False),
    )
    work = by_block(layout, run.blocks)
    results = for_calls(run.blocks, work, step, results)
  out, lse = results[0][0, 0], results[1][0, 0, 0]
  # Tiles that all queries see whole know nothing of unused rows.
  used = operands.packing.row_valid
  return (
    jnp.where(used[:, None], out, 0.0),
    jnp.where(used, lse * LOG2_E, -jnp.inf),
  )


def _attend(
  layout: Layout,
  queries: specs.Queries,
  keys: specs.Keys,
  options: dict[str, Any],
  call: Call,
  results: tuple[Array, Array],
) -> tuple[Array, Array]:
  return attend(layout, call, queries, keys, previous=results, **options)


def backward(
  settings: Settings,
  operands: Operands,
  out: Float[Array, "rows H"],
  lse: Float[Array, " rows"],
  d_out: Float[Array, "rows H"],
) -> tuple[
  Float[Array, "rows H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
]:
  """Gradients of q, k and v; see `operands.Implementation`."""
  runs = make_runs(settings, operands)
  seen = jnp.isfinite(lse)
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
  queries = _queries(operands)._replace(
    d_out=jnp.where(seen[:, None], d_out, 0)[None, None],
    lse=jnp.where(seen, lse, NOTHING_SEEN)[None, None, None],
    delta=jnp.where(seen, delta, 0.0)[None, None, None],
  )
  layouts = [run.layout for run in runs]
  # Several parts are added in float32.
  whole = len(layouts) == 1 and not far_tiles(layouts[0])
  dtype = operands.k.dtype if whole else jnp.float32
  rows, size = operands.q.shape
  dq = jnp.zeros((1, 1, size, rows), jnp.float32)
  dk, dv = (_zero_gradient(x, dtype) for x in (operands.k, operands.v))
  for run in runs:
    layout = run.layout
    keys = _keys(layout, operands)
    options = _options(settings, operands, layout, backward=True)
    padding = keys.k.shape[2] - dk.shape[2]
    dk, dv = (_pad_keys(x, padding) for x in (dk, dv))
    step = functools.partial(
      _add,
      layout,
      run.asking(queries),
      keys,
      options | {"dtype": dtype, "adds": not whole},
    )
    lists = [by_near_tile(layout, run.blocks)]
    if far_tiles(layout):
      lists.append(by_far_tile(layout, run.blocks))
    sums = Gradients(dk, dv, dq)
    for work in lists:
      sums = for_calls(run.blocks, work, step, sums)
    dk, dv, dq = sums
  dq = (dq[0, 0].T * settings.scale).astype(operands.q.dtype)
  return dq, _public(dk, operands.k), _public(dv, operands.v)


def _add(
  layout: Layout,
  queries: specs.Queries,
  keys: specs.Keys,
  options: dict[str, Any],
  call: Call,
  sums: Gradients,
) -> Gradients:
  return add_gradients(layout, call, queries, keys, previous=sums, **options)


class Run(NamedTuple):
  """Heads whose visits have one form, and what their blocks visit.

  Attributes:
    layout: Static sizes.
    blocks: Of all heads; those of others visit nothing.
    positions: As in `specs.Queries`.
    words: As in `specs.Queries`; None if rows do not look up what they see.
  """

  layout: Layout
  blocks: Blocks
  positions: Int[Array, "1 sublanes rows"]
  words: Int[Array, "rules words sublanes lanes"] | None = None

  def asking(self, queries: specs.Queries) -> specs.Queries:
    """The queries, with what decides what they see."""
    return queries._replace(positions=self.positions, words=self.words)


def make_runs(settings: Settings, operands: Operands) -> list[Run]:
  """The heads in runs, and what the blocks of each visit."""
  packing = operands.packing
  # Whatever the packing says, nothing is read out of bounds.
  packing = dataclasses.replace(
    packing,
    block_head=jnp.clip(packing.block_head, 0, packing.num_heads - 1),
    block_batch=jnp.clip(packing.block_batch, 0, operands.k.shape[0] - 1),
  )
  operands = operands._replace(packing=packing)
  return [
    _strided_run(settings, operands, run)
    if isinstance(run, StridedHeads)
    else _table_run(settings, operands, run)
    for run in settings.runs(packing.num_heads, looks_up_sinks=False)
  ]


def _strided_run(
  settings: Settings, operands: Operands, run: StridedHeads
) -> Run:
  packing = operands.packing
  kv_length = operands.k.shape[1]
  positions = seen_up_to(settings, operands)
  limits = positions.reshape(-1, 2, packing.block_rows // 2)
  first = jnp.where(limits == UNUSED, kv_length, limits).min(axis=2)
  last = limits.max(axis=2)
  residues = [
    getattr(rule, "residue", 0) for rule in settings.rules(packing.num_heads)
  ]
  residue = jnp.asarray(residues, jnp.int32)[packing.block_head]
  layout = _layout(
    settings,
    operands,
    dataclasses.replace(run, start=0, stop=_kv_heads(operands), residues=()),
  )
  visits = block_visits(
    run,
    residue,
    first.min(axis=1),
    last.max(axis=1),
    block=settings.block,
    block_kv=settings.tiling.block_kv,
    far_tokens=layout.far_blocks * settings.block,
    kv_length=kv_length,
    by_query=True,
  )
  inside = _inside(run, packing)
  blocks = _blocks(
    operands,
    run,
    residue=residue,
    first=first,
    last=last,
    visits=BlockVisits(*(jnp.where(inside, each, 0) for each in visits)),
  )
  return Run(layout, blocks, specs.on_sublanes(positions[None]))


def _table_run(settings: Settings, operands: Operands, run: TableHeads) -> Run:
  packing = operands.packing
  layout = _layout(
    settings, operands, TableHeads(0, _kv_heads(operands), rules=())
  )
  rules = tuple(dict.fromkeys(run.rules))
  numbers = np.zeros(packing.num_heads, np.int32)
  numbers[run.start : run.stop] = [rules.index(rule) for rule in run.rules]
  looked_up = make_lookups(
    layout,
    rules,
    operands,
    _inside(run, packing),
    jnp.asarray(numbers)[packing.block_head],
  )
  blocks = _blocks(
    operands,
    run,
    residue=looked_up.rule,
    first=looked_up.first,
    last=looked_up.last,
    visits=TileVisits(looked_up.visited, looked_up.full),
  )
  positions = specs.on_sublanes(row_positions(operands)[None])
  positions = positions.at[:, 1].set(looked_up.lane)
  return Run(layout, blocks, positions, looked_up.words)


def _kv_heads(operands: Operands) -> int:
  """Of all sequences."""
  return operands.k.shape[0] * operands.k.shape[2]


def _layout(
  settings: Settings, operands: Operands, run: StridedHeads | TableHeads
) -> Layout:
  # Strided rules are causal ones of what `seen_up_to` says.
  pattern = settings.pattern
  is_causal = isinstance(run, StridedHeads) or (
    pattern is not None and pattern.is_causal
  )
  return Layout(
    run=run,
    block=settings.block,
    is_causal=is_causal,
    tiling=settings.tiling,
    q_length=operands.q.shape[0],
    kv_length=operands.k.shape[1],
    q_offset=0,
    groups=1,
    packed=True,
  )


def _inside(
  run: StridedHeads | TableHeads, packing: Packing
) -> Bool[Array, " blocks"]:
  """Which blocks belong to a run."""
  return (run.start <= packing.block_head) & (packing.block_head < run.stop)


def _blocks(
  operands: Operands, run: StridedHeads | TableHeads, **of_run: Any
) -> Blocks:
  packing = operands.packing
  batch, kv_heads = operands.k.shape[0], operands.k.shape[2]
  kv_head = packing.block_head // (packing.num_heads // kv_heads)
  return Blocks(
    kv_head=packing.block_batch * kv_heads + kv_head,
    sequence=packing.block_batch,
    segments=batch * (run.stop - run.start),
    **of_run,
  )


def _queries(operands: Operands) -> specs.Queries:
  ids = operands.q_segment_ids
  if ids is not None:
    ids = ids.reshape(-1).at[operands.packing.row_token].get(mode="clip")[None]
  return specs.make_queries(operands.q[None, :, None], ids, operands.q.shape[0])


def _keys(layout: Layout, operands: Operands) -> specs.Keys:
  keys = specs.near_keys(
    layout, operands.k, operands.v, operands.kv_segment_ids
  )
  k, v = (x.reshape(1, -1, *x.shape[2:]) for x in keys[:2])
  return keys._replace(k=k, v=v)


def _zero_gradient(x: Float[Array, "B S K H"], dtype: Any) -> Array:
  """As the kernels write it, [1, B K, S, H]."""
  batch, length, heads, size = x.shape
  return jnp.zeros((1, batch * heads, length, size), dtype)


def _pad_keys(x: Array, amount: int) -> Array:
  """Longer, or shorter if `amount` is negative."""
  if amount <= 0:
    return x[:, :, : x.shape[2] + amount]
  return jnp.pad(x, ((0, 0), (0, 0), (0, amount), (0, 0)))


def _public(x: Array, like: Float[Array, "B S K H"]) -> Float[Array, "B S K H"]:
  batch, length, heads, size = like.shape
  x = x[0, :, :length].reshape(batch, heads, length, size)
  return x.swapaxes(1, 2).astype(like.dtype)


def _options(
  settings: Settings, operands: Operands, layout: Layout, *, backward: bool
) -> dict[str, Any]:
  return dict(
    scale=settings.scale,
    soft_cap=None,
    overlap=head_settings.overlap(layout, backward=backward),
    vmem_bytes=head_settings.vmem_limit(layout, _head_operands(operands)),
    interpret=settings.interpret,
  )


def _head_settings(
  settings: Settings, num_heads: int
) -> head_operands.Settings:
  """What head attention would be asked for.

  Its tables have limits that looking up has not: a window takes as much memory.
  """
  rules = [
    rule if isinstance(rule, Strided) else Strided(local=1)
    for rule in settings.rules(num_heads)
  ]
  rules = [dataclasses.replace(rule, sinks=0) for rule in rules]
  pattern = HeadContexts(settings.block, tuple(rules))
  return dataclasses.replace(settings.of_heads(num_heads), pattern=pattern)


def _head_operands(operands: Operands) -> head_operands.Operands:
  """The shapes and dtypes of one long head."""
  rows, size = operands.q.shape
  ids = operands.q_segment_ids
  return head_operands.Operands(
    q=jax.ShapeDtypeStruct((1, rows, 1, size), operands.q.dtype),  # type: ignore[arg-type]
    k=operands.k,
    v=operands.v,
    q_segment_ids=ids,
    kv_segment_ids=operands.kv_segment_ids,
    q_offset=operands.q_offset,
  )
