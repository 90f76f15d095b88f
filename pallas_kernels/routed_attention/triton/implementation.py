"""Routed attention on GPUs: the Triton kernels of head attention, packed.

A program over queries takes a tile of a block of rows, and computes what it
visits from the first and last position in it. A program over keys takes a key
tile, and the tiles of its heads' segments that binary searches found.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.head_attention import operands as head_operands
from pallas_kernels.head_attention import triton as head_triton
from pallas_kernels.head_attention.schedule import StridedHeads
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.launches import LEAST_TILE, Launch
from pallas_kernels.head_attention.triton.problem import (
  HIGHEST,
  LOG2_E,
  Problem,
  call,
  describe,
)
from pallas_kernels.head_attention.triton.query import (
  dq_kernel,
  forward_kernel,
)
from pallas_kernels.head_attention.triton.strided import (
  Pair,
  Source,
  for_all_heads,
  strided_keys,
)
from pallas_kernels.head_attention.triton.walks import Shards
from pallas_kernels.routed_attention.operands import (
  Operands,
  Settings,
  of_heads,
  seen_up_to,
)
from pallas_kernels.routed_attention.triton.packed import (
  PackedQueries,
  locate_packed,
)
from pallas_kernels.routed_attention.triton.segments import (
  Tiles,
  far_table,
  make_tiles,
  near_table,
)


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered; None if they are.

  Looks at shapes, dtypes and static settings only.
  """
  q, k, v, packing = operands[:4]
  if operands.mask is not None:
    return "`mask` is not known when the tiles are chosen; use a `pattern`."
  if not q.dtype == k.dtype == v.dtype:
    return (
      "`q`, `k` and `v` must have one dtype, got "
      f"{q.dtype}, {k.dtype} and {v.dtype}."
    )
  if packing.block_rows < LEAST_TILE:
    return (
      f"`packing.block_rows` must be at least {LEAST_TILE}, got "
      f"{packing.block_rows}."
    )
  return settings.refusal_of_tables(packing.num_heads) or head_triton.refusal(
    _head_settings(settings, packing.num_heads), of_heads(operands)
  )


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "rows H"], Float[Array, " rows"]]:
  """Output and log-sum-exp; see `operands.Implementation`."""
  rows = operands.q.shape[0]
  empty = (
    jnp.zeros((1, *operands.q[:, None].shape), operands.q.dtype),
    jnp.full((1, 1, rows), -jnp.inf, jnp.float32),
  )
  out, lse = _over_queries(
    forward_kernel,
    settings,
    operands,
    _launches(settings, operands).forward,
    results=empty,
    name="routed_attention_forward",
  )
  return out[0, :, 0], lse[0, 0] * LOG2_E


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
  seen = jnp.isfinite(lse)
  delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(-1)
  residuals = (
    jnp.where(seen[:, None], d_out, 0).astype(out.dtype)[None, :, None],
    jnp.where(seen, lse, HIGHEST)[None, None],
    jnp.where(seen, delta, 0.0)[None, None],
  )
  launches = _launches(settings, operands)
  (dq,) = _over_queries(
    dq_kernel,
    settings,
    operands,
    launches.dq,
    residuals=residuals,
    results=(jnp.zeros((1, *operands.q[:, None].shape), operands.q.dtype),),
    name="routed_attention_dq",
  )
  problem = _problem(settings, operands, launches.dkv)
  positions = seen_up_to(settings, operands)
  tiles = make_tiles(operands.packing, positions, problem.tiling.block_q)
  runs = _runs(settings, operands)
  dks, dvs = [], []
  for run in runs:
    dk, dv = strided_keys(
      problem,
      run,
      _inputs(operands, residuals),
      _source(problem, run, positions, tiles),
      launches.dkv,
      # Runs may share a KV head: their sums meet in float32.
      dtype=operands.k.dtype if len(runs) == 1 else jnp.dtype(jnp.float32),
      interpret=settings.interpret,
      name="routed_attention",
    )
    dks.append(for_all_heads(run, problem, dk))
    dvs.append(for_all_heads(run, problem, dv))
  return (
    dq[0, :, 0],
    functools.reduce(jnp.add, dks).astype(operands.k.dtype),
    functools.reduce(jnp.add, dvs).astype(operands.v.dtype),
  )


def _over_queries(
  kernel: Any,
  settings: Settings,
  operands: Operands,
  launch: Launch,
  *,
  residuals: tuple[Array, ...] = (),
  results: tuple[Array, ...],
  name: str,
) -> tuple[Array, ...]:
  """Runs a kernel over the tiles of all runs; it writes into `results`."""
  problem = _problem(settings, operands, launch)
  packing = operands.packing
  positions = seen_up_to(settings, operands)
  tiles = make_tiles(packing, positions, problem.tiling.block_q)
  residues = jnp.asarray(
    [getattr(rule, "residue", 0) for rule in settings.rules(problem.N)],
    jnp.int32,
  )
  inputs = _inputs(operands)
  for run in _runs(settings, operands):
    segments = (run.start * problem.B, run.stop * problem.B)
    arrays = (
      jnp.stack([tiles.starts[segment] for segment in segments]),
      positions,
      tiles.first,
      tiles.last,
      residues[tiles.head],
      tiles.sequence,
      tiles.head // problem.groups,
      *results,
    )
    before = len(inputs) + len(arrays) - len(results)
    results = call(
      functools.partial(
        kernel,
        locate=functools.partial(
          locate_packed, local=run.local, stride=run.stride
        ),
        run_refs=len(arrays),
      ),
      problem,
      grid=(min(tiles.number, (segments[1] - segments[0]) * tiles.longest),),
      inputs=(*inputs, *arrays, *residuals),
      out_shape=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results),
      num_warps=launch.num_warps,
      num_stages=launch.num_stages,
      interpret=settings.interpret,
      name=name,
      aliases={before + i: i for i in range(len(results))},
    )
  return results


def _source(
  problem: Problem, run: StridedHeads, positions: Array, tiles: Tiles
) -> Source:
  """Where the keys' kernels find queries."""
  shards = Shards.of(problem, run.local, run.stride)
  rows = positions, tiles.first

  def far(pairs: list[Pair]) -> tuple[Array, ...]:
    return *rows, far_table(shards, run, tiles, pairs)

  near = *rows, near_table(shards, run, tiles)
  return Source(PackedQueries, near, far, tiles.longest)


def _runs(settings: Settings, operands: Operands) -> list[StridedHeads]:
  runs = settings.runs(operands.packing.num_heads)
  return [run for run in runs if isinstance(run, StridedHeads)]


def _launches(settings: Settings, operands: Operands) -> launches.Launches:
  """As head attention's; no tile is larger than `settings.tiling` says."""
  size = operands.q.shape[1]
  return launches.choose(
    None,
    H=size,
    Hv=size,
    dtype=operands.q.dtype,
    T=settings.tiling.block_q,
    S=min(settings.tiling.block_kv, operands.k.shape[1]),
  )


def _problem(settings: Settings, operands: Operands, launch: Launch) -> Problem:
  heads = operands.packing.num_heads
  return describe(
    _head_settings(settings, heads), of_heads(operands), launch.tiling
  )


def _inputs(
  operands: Operands, residuals: tuple[Array, ...] = ()
) -> tuple[Array, ...]:
  arrays = (operands.q[None, :, None], operands.k, operands.v, *residuals)
  ids = operands.q_segment_ids
  if ids is None or operands.kv_segment_ids is None:
    return arrays
  ids = ids.reshape(-1).at[operands.packing.row_token].get(mode="clip")
  return (*arrays, ids[None], operands.kv_segment_ids)


def _head_settings(
  settings: Settings, num_heads: int
) -> head_operands.Settings:
  """What head attention would be asked for, with tiles of its own choice."""
  return dataclasses.replace(settings.of_heads(num_heads), tiling=None)
