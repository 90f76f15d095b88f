"""The forward kernel: one query tile of one head, dense or packed.

The first warp groups compute, each its own queries; the last one fetches keys
and values by TMA, some visits ahead. A visit's keys come in boxes of at most
`block` tokens, each fetched from where it lies: of a far tile the boxes are
`stride` blocks apart, of a near one they are neighbours. Both fill the same
buffer, so the products do not know the difference.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

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
    tiles: [STEPS, keys, H] in shared memory; [STEPS, keys] of segment ids.
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
    limits: As in `Job`, [groups, rows].
    q_segments: Segment ids [groups, rows], if there are any.
    q_ready: Barriers: a group's queries, limits and ids are there.
    keys, values: What is fetched.
    kv_segments: Likewise, if there are any.
    products: What the chip's `Products` take.
  """

  q: Any
  lse: Any
  limits: Any
  q_segments: Any
  q_ready: Any
  keys: Ring
  values: Ring
  kv_segments: Ring | None
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

    def ring(memory: Any, *, orders_tensor_core: bool) -> Ring:
      return Ring(
        memory,
        plgpu.Barrier(
          num_arrivals=block_kv // _box(problem), num_barriers=STEPS
        ),
        plgpu.Barrier(
          num_arrivals=groups,
          num_barriers=STEPS,
          orders_tensor_core=orders_tensor_core,
        ),
      )

    def operand() -> Ring:
      memory = tiles(STEPS, block_kv)
      return ring(memory, orders_tensor_core=chip.has_tensor_memory)

    def of_rows(dtype: Any) -> Any:
      return plgpu.SMEM((groups, chip.rows), dtype)

    q_segments = kv_segments = None
    if problem.has_segments:
      q_segments = of_rows(jnp.int32)
      ids = plgpu.SMEM((STEPS, block_kv), jnp.int32)
      kv_segments = ring(ids, orders_tensor_core=False)
    return cls(
      q=tiles(groups, chip.rows),
      lse=of_rows(jnp.float32),
      limits=of_rows(jnp.int32),
      q_segments=q_segments,
      q_ready=plgpu.Barrier(
        num_arrivals=2 + problem.has_segments, num_barriers=groups
      ),
      keys=operand(),
      values=operand(),
      kv_segments=kv_segments,
      products=chip.scratch(problem),
    )


def _box(problem: Problem) -> int:
  """Neighbouring tokens that one copy brings."""
  return min(problem.block, problem.tiling.block_kv)


class Job(NamedTuple):
  """What one program computes: a query tile of one head.

  Attributes:
    first_row: Of the tile.
    q, out: Queries and output of the head, [rows, H].
    lse: Log-sum-exp of the head, [rows].
    limits: Positions of the queries among the keys, int32 [rows]; negative if
      they see nothing.
    q_segments: Segment ids of the queries, int32 [rows], if there are any.
    k, v: Keys and values of the head's KV head, [S, H].
    kv_segments: Segment ids of the keys, int32 [S], if there are any.
    visits: What the tile visits.
    residue: The head's.
  """

  first_row: jax.Array
  q: Any
  out: Any
  lse: Any
  limits: Any
  q_segments: Any
  k: Any
  v: Any
  kv_segments: Any
  visits: ShardVisits
  residue: jax.Array


def call(
  chip: Chip,
  problem: Problem,
  body: Callable[..., None],
  *,
  grid: dict[str, int],
  inputs: Sequence[Array | None],
  out_type: Sequence[jax.ShapeDtypeStruct],
  interpret: Any,
  name: str,
) -> Any:
  """Runs `body`, which makes a `Job` and calls `attend`.

  Args:
    chip, problem: What for.
    body: Takes the refs of inputs and outputs, and a `Scratch`.
    grid: Programs by axis name.
    inputs, out_type: Arrays in, and what comes out.
    interpret: For `plgpu.kernel`.
    name: What profilers show.
  """
  return plgpu.kernel(
    body,
    out_type=tuple(out_type),
    scratch_types=(Scratch.types(chip, problem),),
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=chip.groups(problem.tiling) + 1,
    thread_name="group",
    kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret or None,
  )(*inputs)


def kernel(
  chip: Chip,
  problem: Problem,
  shards: Shards,
  q_ref: Any,
  k_ref: Any,
  v_ref: Any,
  limits_ref: Any,
  q_segments_ref: Any,
  kv_segments_ref: Any,
  residues_ref: Any,
  out_ref: Any,
  lse_ref: Any,
  scratch: Scratch,
  *,
  start: int,
) -> None:
  """A run of strided heads, the first of which is `start`."""
  head_of_run, batch = lax.axis_index("heads"), lax.axis_index("batch")
  # The last queries see most: they go first, or the end has idle cores.
  tile = problem.q_tiles - 1 - lax.axis_index("tiles")
  head = start + head_of_run
  kv_head = lax.div(head, jnp.int32(problem.groups))
  residue = residues_ref[head_of_run]
  has_segments = problem.has_segments
  job = Job(
    first_row=tile * problem.tiling.block_q,
    q=q_ref.at[batch, :, head],
    out=out_ref.at[batch, :, head_of_run],
    lse=lse_ref.at[batch, head_of_run],
    limits=limits_ref,
    q_segments=q_segments_ref.at[batch] if has_segments else None,
    k=k_ref.at[batch, :, kv_head],
    v=v_ref.at[batch, :, kv_head],
    kv_segments=kv_segments_ref.at[batch] if has_segments else None,
    visits=shards.visits(tile, residue, problem.q_offset),
    residue=residue,
  )
  attend(chip, problem, shards, job, scratch)


def attend(
  chip: Chip, problem: Problem, shards: Shards, job: Job, scratch: Scratch
) -> None:
  """One program; see the module's docstring."""
  groups = chip.groups(problem.tiling)
  group = lax.axis_index("group")
  # A single group has all that a thread can use.
  moves_registers = groups > 1

  @pl.when(group == groups)
  def _fetch() -> None:
    if moves_registers:
      plgpu.set_max_registers(40, action="decrease")

    def copy(ref: Any, position: jax.Array, tile_ref: Any, ready: Any) -> None:
      rows = pl.ds(position, _box(problem))
      plgpu.copy_gmem_to_smem(ref.at[rows], tile_ref, ready)

    sources = [
      (job.k, scratch.keys),
      (job.kv_segments, scratch.kv_segments),
      (job.v, scratch.values),
    ]
    _fetch_all(
      problem,
      shards,
      job.visits,
      *(
        (functools.partial(copy, ref), ring)
        for ref, ring in sources
        if ring is not None
      ),
    )

  @pl.when(group < groups)
  def _compute() -> None:
    if moves_registers:
      plgpu.set_max_registers(232, action="increase")
    rows = pl.ds(job.first_row + group * chip.rows, chip.rows)
    own_q, own_lse = scratch.q.at[group], scratch.lse.at[group]
    ready = scratch.q_ready.at[group]
    of_rows = [
      (job.q, scratch.q),
      (job.limits, scratch.limits),
      (job.q_segments, scratch.q_segments),
    ]
    for ref, memory in of_rows[: 2 + problem.has_segments]:
      plgpu.copy_gmem_to_smem(ref.at[rows], memory.at[group], ready)
    plgpu.barrier_wait(ready)
    products = chip.products(problem, own_q, group, **scratch.products)
    layout = products.layout
    shape = (chip.rows, problem.tiling.block_kv)

    def numbers(memory: Any) -> jax.Array:
      return plgpu.layout_cast(memory[group], layout.reduce(1))

    limits = numbers(scratch.limits)

    def mask(place: Place) -> jax.Array:
      columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
      keys = shards.position(columns + place.token, place.stride, place.residue)
      return shards.mask(place, spread(limits, shape), keys, job.residue)

    def is_own_segment(slot: jax.Array) -> jax.Array:
      ring = scratch.kv_segments
      assert ring is not None
      plgpu.barrier_wait(ring.ready.at[slot])
      ids = plgpu.layout_cast(ring.tiles[slot], layout.reduce(0))
      # Threads have read it: copies must wait for that.
      plgpu.commit_smem()
      plgpu.barrier_arrive(ring.free.at[slot])
      # Cast at once: of several layouts this could be, it is that one.
      keys = plgpu.layout_cast(lax.broadcast_in_dim(ids, shape, [1]), layout)
      return spread(numbers(scratch.q_segments), shape) == keys

    acc, m, l = _walk(
      problem,
      job.visits,
      products,
      mask,
      is_own_segment if problem.has_segments else None,
      scratch,
    )
    # Tiles without a mask show their keys to rows that see nothing, too.
    empty = (l == 0.0) | (limits < 0)
    l = jnp.where(empty, jnp.inf, l)
    products.store(acc, l, own_q)
    own_lse[...] = jnp.where(empty, -jnp.inf, m * (1 / LOG2_E) + jnp.log(l))
    plgpu.commit_smem()
    # Rows past the last query are not stored.
    plgpu.copy_smem_to_gmem(own_q, job.out.at[rows])
    plgpu.copy_smem_to_gmem(own_lse, job.lse.at[rows])
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
  is_own_segment: Callable[[jax.Array], jax.Array] | None,
  scratch: Scratch,
) -> tuple[Any, jax.Array, jax.Array]:
  """The online softmax over all visits: `acc`, its maximum and denominator.

  Args:
    problem, visits, products: What is computed.
    mask: What an edge visit shows.
    is_own_segment: Slot -> which keys are of a query's segment, if there are
      segments.
    scratch: The memory.
  """
  keys, values = scratch.keys, scratch.values

  def visit_one(visit: jax.Array, carry: Any, *, is_edge: bool) -> Any:
    acc, m, l = carry
    slot = _slot(visit)
    plgpu.barrier_wait(keys.ready.at[slot])
    logits = products.logits(keys.tiles.at[slot], keys.free.at[slot])
    logits = _scaled(problem, logits)
    if is_own_segment is not None:
      logits = jnp.where(is_own_segment(slot), logits, -jnp.inf)
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
