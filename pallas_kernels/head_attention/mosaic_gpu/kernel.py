"""The forward kernel: one query tile of one head.

The first warp groups compute, each its own queries; the last one fetches keys
and values by TMA, some visits ahead. A visit's keys come in boxes of at most
`block` tokens, each fetched from where it lies: of a far tile the boxes are
`stride` blocks apart, of a near one they are neighbours. Both fill the same
buffer, so the products do not know the difference.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.head_attention.mosaic_gpu.chips import STEPS, Chip
from pallas_kernels.head_attention.mosaic_gpu.products import (
  SWIZZLE_COLUMNS,
  SWIZZLE_ROWS,
  Products,
  spread,
)
from pallas_kernels.head_attention.triton.problem import (
  LOG2_E,
  LOWEST,
  Problem,
)
from pallas_kernels.head_attention.triton.walks import (
  Place,
  Shards,
  ShardVisits,
)


class Ring(NamedTuple):
  """Tiles in flight of the keys, or of the values.

  Attributes:
    tiles: [STEPS, keys, H] in shared memory.
    ready: Barriers: the tile is there.
    free: Barriers: all groups have read it.
  """

  tiles: Any
  ready: Any
  free: Any


class Scratch(NamedTuple):
  """Memory and barriers of a program.

  Attributes:
    q: Queries, later the output [groups, rows, H].
    lse: Log-sum-exp [groups, rows].
    q_ready: Barriers: a group's queries are there.
    keys, values: What is fetched.
    products: What the chip's `Products` take.
  """

  q: Any
  lse: Any
  q_ready: Any
  keys: Ring
  values: Ring
  products: dict[str, Any]

  @classmethod
  def types(cls, chip: Chip, problem: Problem) -> "Scratch":
    """The same, as types."""
    groups = chip.groups(problem.tiling)
    block_kv = problem.tiling.block_kv
    transforms = (
      plgpu.TilingTransform((SWIZZLE_ROWS, SWIZZLE_COLUMNS)),
      plgpu.SwizzleTransform(128),
    )

    def tiles(count: int, rows: int) -> Any:
      shape = (count, rows, problem.H)
      return plgpu.SMEM(shape, problem.dtype, transforms=transforms)

    def ring() -> Ring:
      return Ring(
        tiles(STEPS, block_kv),
        plgpu.Barrier(
          num_arrivals=block_kv // _box(problem), num_barriers=STEPS
        ),
        plgpu.Barrier(
          num_arrivals=groups,
          num_barriers=STEPS,
          orders_tensor_core=chip.has_tensor_memory,
        ),
      )

    return cls(
      tiles(groups, chip.rows),
      plgpu.SMEM((groups, chip.rows), jnp.float32),
      plgpu.Barrier(num_barriers=groups),
      ring(),
      ring(),
      chip.scratch(problem),
    )


def _box(problem: Problem) -> int:
  """Neighbouring tokens that one copy brings."""
  return min(problem.block, problem.tiling.block_kv)


def kernel(
  chip: Chip,
  problem: Problem,
  shards: Shards,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  residues_ref: Any,
  out_ref: Any,
  lse_ref: Any,
  scratch: Scratch,
  *,
  start: int,
) -> None:
  """See the module's docstring; `start` is the run's first head."""
  groups = chip.groups(problem.tiling)
  group = lax.axis_index("group")
  head_of_run, batch = lax.axis_index("heads"), lax.axis_index("batch")
  # The last queries see most: they go first, or the end has idle cores.
  tile = problem.q_tiles - 1 - lax.axis_index("tiles")
  residue = residues_ref[head_of_run]
  visits = shards.visits(tile, residue, problem.q_offset)
  # A single group has all that a thread can use.
  moves_registers = groups > 1

  @pl.when(group == groups)
  def _fetch() -> None:
    if moves_registers:
      plgpu.set_max_registers(40, action="decrease")
    kv_head = lax.div(start + head_of_run, jnp.int32(problem.groups))

    def copy(ref: Any, position: jax.Array, tile_ref: Any, ready: Any) -> None:
      rows = pl.ds(position, _box(problem))
      plgpu.copy_gmem_to_smem(ref.at[batch, rows, kv_head], tile_ref, ready)

    _fetch_all(
      problem,
      shards,
      visits,
      (functools.partial(copy, k_ref), scratch.keys),
      (functools.partial(copy, v_ref), scratch.values),
    )

  @pl.when(group < groups)
  def _compute() -> None:
    if moves_registers:
      plgpu.set_max_registers(232, action="increase")
    first_row = tile * problem.tiling.block_q + group * chip.rows
    own_rows = pl.ds(first_row, chip.rows)
    own_q, own_lse = scratch.q.at[group], scratch.lse.at[group]
    ready = scratch.q_ready.at[group]
    plgpu.copy_gmem_to_smem(
      q_ref.at[batch, own_rows, start + head_of_run], own_q, ready
    )
    plgpu.barrier_wait(ready)
    products = chip.products(problem, own_q, group, **scratch.products)

    def mask(place: Place) -> jax.Array:
      shape = (chip.rows, problem.tiling.block_kv)
      return _mask(
        problem, shards, place, residue, first_row, shape, products.layout
      )

    acc, m, l = _walk(problem, visits, products, mask, scratch)
    empty = l == 0.0
    l = jnp.where(empty, 1.0, l)
    products.store(acc, l, own_q)
    own_lse[...] = jnp.where(empty, -jnp.inf, m * (1 / LOG2_E) + jnp.log(l))
    plgpu.commit_smem()
    # Rows past the last query are not stored.
    plgpu.copy_smem_to_gmem(own_q, out_ref.at[batch, own_rows, head_of_run])
    plgpu.copy_smem_to_gmem(own_lse, lse_ref.at[batch, head_of_run, own_rows])
    plgpu.wait_smem_to_gmem(0)


def _slot(visit: jax.Array) -> jax.Array:
  return lax.rem(visit, jnp.int32(STEPS))


def _fetch_all(
  problem: Problem,
  shards: Shards,
  visits: ShardVisits,
  *sources: tuple[Callable[..., None], Ring],
) -> None:
  """Brings the tiles of all visits, in order.

  Args:
    problem, shards, visits: What is walked.
    *sources: Copies a box from a position to a part of a tile; with the ring.
  """

  @pl.loop(0, visits.full_count + visits.edge_count)
  def _each(visit: jax.Array) -> None:
    place, slot = visits.place(visit), _slot(visit)
    box = _box(problem)
    for copy, ring in sources:

      @pl.when(visit >= STEPS)
      def _wait(free: Any = ring.free.at[slot]) -> None:
        plgpu.barrier_wait(free)

      for row in range(0, problem.tiling.block_kv, box):
        # Past the last key, TMA fills in zeros.
        position = shards.position(
          place.token + row, place.stride, place.residue
        )
        part = ring.tiles.at[slot, pl.ds(row, box)]
        copy(position, part, ring.ready.at[slot])


def _walk(
  problem: Problem,
  visits: ShardVisits,
  products: Products,
  mask: Callable[[Place], jax.Array],
  scratch: Scratch,
) -> tuple[Any, jax.Array, jax.Array]:
  """The online softmax over all visits: `acc`, its maximum and denominator."""
  keys, values = scratch.keys, scratch.values

  def visit_one(visit: jax.Array, carry: Any, *, is_edge: bool) -> Any:
    acc, m, l = carry
    slot = _slot(visit)
    plgpu.barrier_wait(keys.ready.at[slot])
    logits = products.logits(keys.tiles.at[slot], keys.free.at[slot])
    logits = _scaled(problem, logits)
    if is_edge:
      seen = mask(visits.edge(visit - visits.full_count))
      logits = jnp.where(seen, logits, -jnp.inf)
    top = jnp.maximum(m, logits.max(axis=1))
    shrink = jnp.exp2(m - top)
    weights = jnp.exp2(logits - spread(top, logits.shape))
    l = l * shrink + weights.sum(axis=1)
    acc = products.scale(acc, shrink)
    weights = weights.astype(problem.dtype)
    plgpu.barrier_wait(values.ready.at[slot])
    acc = products.add(
      acc, weights, values.tiles.at[slot], values.free.at[slot]
    )
    return acc, top, l

  def numbers(value: float) -> jax.Array:
    rows = jnp.full((scratch.q.shape[1],), value, jnp.float32)
    return plgpu.layout_cast(rows, products.layout.reduce(1))

  full = functools.partial(visit_one, is_edge=False)
  edge = functools.partial(visit_one, is_edge=True)
  carry = products.zeros(), numbers(LOWEST), numbers(0.0)
  carry = lax.fori_loop(0, visits.full_count, full, carry)
  total = visits.full_count + visits.edge_count
  return lax.fori_loop(visits.full_count, total, edge, carry)


def _scaled(problem: Problem, products: jax.Array) -> jax.Array:
  """Logits in base 2."""
  if problem.cap is None:
    return products * (problem.scale * LOG2_E)
  return jnp.tanh(products * (problem.scale / problem.cap)) * (
    problem.cap * LOG2_E
  )


def _mask(
  problem: Problem,
  shards: Shards,
  place: Place,
  residue: jax.Array,
  first_row: jax.Array,
  shape: tuple[int, int],
  layout: plgpu.Layout,
) -> jax.Array:
  """What an edge visit shows a warp group's queries."""
  rows, columns = (
    plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
    for axis in (0, 1)
  )
  assert problem.q_offset is not None
  queries = rows + (first_row + problem.q_offset)
  keys = shards.position(columns + place.token, place.stride, place.residue)
  return shards.mask(place, queries, keys, residue)
