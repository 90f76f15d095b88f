"""The keys' gradients of strided heads: the calls of their two kernels.

`far_kernel` first, on the tiles of every shard that a KV head's query heads
own; then `near_kernel`, which adds its sums to its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels.head_attention.schedule import StridedHeads
from pallas_kernels.head_attention.triton.keys import (
  MakeQueries,
  far_kernel,
  near_kernel,
)
from pallas_kernels.head_attention.triton.launches import Launch
from pallas_kernels.head_attention.triton.problem import Problem, call
from pallas_kernels.head_attention.triton.walks import Shards

# Query tiles that one program of a long column takes; a column of a shard is
# seen by all later queries.
COLUMN = 64


class Pair(NamedTuple):
  """A shard and a KV head some of whose query heads own it.

  Attributes:
    kv_head, residue: Which ones.
    heads: These query heads.
  """

  kv_head: int
  residue: int
  heads: tuple[int, ...]


class Source(NamedTuple):
  """How the kernels find the queries.

  Attributes:
    make: What they make of the arrays that follow.
    near: Arrays of the near kernel.
    far: Pairs -> arrays of the far kernel.
    longest: The most query tiles of one head.
  """

  make: MakeQueries
  near: tuple[Array, ...]
  far: Callable[[list[Pair]], tuple[Array, ...]]
  longest: int


def strided_keys(
  problem: Problem,
  run: StridedHeads,
  reading: tuple[Array, ...],
  source: Source,
  launch: Launch,
  *,
  dtype: Any,
  interpret: Any,
  name: str,
) -> tuple[Array, Array]:
  """Dk and dv [B, S, KV heads of the run, H] of strided heads.

  Args:
    problem: What is computed.
    run: The heads.
    reading: q, k, v, d_out, log-sum-exp in base 2, delta, segment ids of
      queries and keys if any.
    source: Where the queries are.
    launch: Of the kernels.
    dtype: Of the results.
    interpret: For `pallas_call`.
    name: Of the operation, for profilers.
  """
  shards = Shards.of(problem, run.local, run.stride)
  options: dict[str, Any] = dict(
    num_warps=launch.num_warps,
    num_stages=launch.num_stages,
    interpret=interpret,
  )
  first, last = kv_heads_of(run, problem)
  far: tuple[Array, ...] = ()
  pieces = 1
  if run.stride:
    pairs = pairs_of(run, problem.groups)
    blocks = -(-problem.S // problem.block)
    tokens = min(-(-blocks // run.stride) * problem.block, problem.S)
    pieces = _pieces(problem, run.stride, len(pairs), source.longest)
    shape = (problem.B * pieces, tokens, len(pairs))
    residues = ints([pair.residue for pair in pairs])
    kv_heads = [pair.kv_head for pair in pairs]
    dk, dv = call(
      functools.partial(
        far_kernel, shards=shards, pieces=pieces, make_queries=source.make
      ),
      problem,
      grid=(
        pl.cdiv(tokens, problem.tiling.block_kv) * pieces,
        len(pairs),
        problem.B,
      ),
      inputs=(*reading, residues, ints(kv_heads), *source.far(pairs)),
      out_shape=(
        jax.ShapeDtypeStruct((*shape, problem.H), jnp.float32),
        jax.ShapeDtypeStruct((*shape, problem.Hv), jnp.float32),
      ),
      name=f"{name}_far_dkv",
      **options,
    )
    starts = np.searchsorted(kv_heads, np.arange(first, last + 2))
    far = (residues, ints(starts), dk, dv)
  shape = (problem.B, problem.S, last - first + 1)
  dk, dv = call(
    functools.partial(
      near_kernel,
      shards=shards,
      start=run.start,
      stop=run.stop,
      pieces=pieces,
      make_queries=source.make,
    ),
    problem,
    grid=(problem.kv_tiles, last - first + 1, problem.B),
    inputs=(*reading, ints(run.residues), *far, *source.near),
    out_shape=(
      jax.ShapeDtypeStruct((*shape, problem.H), dtype),
      jax.ShapeDtypeStruct((*shape, problem.Hv), dtype),
    ),
    name=f"{name}_near_dkv",
    **options,
  )
  return dk, dv


def kv_heads_of(run: Any, problem: Problem) -> tuple[int, int]:
  """First and last KV head of a run."""
  return run.start // problem.groups, (run.stop - 1) // problem.groups


def for_all_heads(run: Any, problem: Problem, gradient: Array) -> Array:
  """A run's dk or dv, with zeros for the KV heads that it has not."""
  first, last = kv_heads_of(run, problem)
  after = problem.K - 1 - last
  if not first + after:
    return gradient
  return jnp.pad(gradient, ((0, 0), (0, 0), (first, after), (0, 0)))


def ints(values: Any) -> Array:
  """An int32 array of static numbers."""
  return jnp.asarray(np.asarray(values, np.int32))


def pairs_of(run: StridedHeads, groups: int) -> list[Pair]:
  """By KV head: heads of a group that have different residues interleave."""
  heads_of: dict[tuple[int, int], list[int]] = {}
  for head, residue in enumerate(run.residues, run.start):
    heads_of.setdefault((head // groups, residue), []).append(head)
  return [Pair(*key, tuple(heads)) for key, heads in sorted(heads_of.items())]


def _pieces(problem: Problem, stride: int, pairs: int, longest: int) -> int:
  """Programs that share a far tile, so that long columns do not serialise.

  Each leaves a partial sum: together at most half a dk in float32, where the
  heads of a KV head share their residue.
  """
  most = max(1, stride * problem.K // (2 * pairs))
  return min(pl.cdiv(longest, COLUMN), most)
