"""The programs that `python -m pallas_kernels.aot` compiles."""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.aot.compile import tracing_for
from pallas_kernels.aot.targets import find
from pallas_kernels.head_attention import (
  HeadContexts,
  Strided,
  Tiling,
  head_attention,
)
from pallas_kernels.packing import pack
from pallas_kernels.paged_attention import PageTable, paged_attention
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import default_tiling


class Program(NamedTuple):
  """What to compile, and how its tiles read."""

  function: Callable[..., Any]
  arguments: tuple[Any, ...]
  tiles: str


_CHOSEN = "chosen by the implementation"


def head_program(flags: argparse.Namespace) -> Program:
  """Attention of all heads, each with its context."""
  q, kv = _queries_and_keys(flags)
  pattern, tiling = _pattern(flags), _tiling(flags)

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return head_attention(
      q,
      k,
      v,
      pattern=pattern,
      tiling=tiling,
      implementation=flags.implementation,
    )

  tiles = _CHOSEN
  if tiling is not None:
    tiles = f"{tiling.block_q} queries x {tiling.block_kv} keys"
  return Program(*_with_gradients(flags, attend, q, (q, kv, kv)), tiles)


def routed_program(flags: argparse.Namespace) -> Program:
  """Attention of the packed rows of half of the heads."""
  q, kv = _queries_and_keys(flags)
  pattern = _pattern(flags)
  with tracing_for(find(flags.chip)):
    tiling = default_tiling(flags.seq_len, flags.seq_len, 0.5)
  num_active = max(1, flags.heads // 2)

  def packing_of(active: jax.Array) -> Any:
    return pack(active, num_active=num_active, block_rows=tiling.block_q)

  packing = jax.eval_shape(packing_of, jax.ShapeDtypeStruct(q.shape[:3], bool))
  rows = jax.ShapeDtypeStruct((packing.num_rows, flags.head_dim), q.dtype)

  def attend(
    rows: jax.Array, k: jax.Array, v: jax.Array, packing: Any
  ) -> jax.Array:
    return routed_attention(
      rows,
      k,
      v,
      packing,
      pattern=pattern,
      tiling=tiling,
      implementation=flags.implementation,
    )

  arguments = (rows, kv, kv, packing)
  tiles = f"{tiling.block_q} packed queries x {tiling.block_kv} keys"
  return Program(*_with_gradients(flags, attend, rows, arguments), tiles)


def paged_program(flags: argparse.Namespace) -> Program:
  """A step of decoding over pages of one KV head, all of them in use."""
  kv_heads = flags.kv_heads or flags.heads
  if flags.heads % kv_heads:
    raise ValueError(
      f"`--kv-heads` must divide the {flags.heads} heads, got {kv_heads}."
    )
  rows = flags.batch * kv_heads
  pages_per_row = -(-flags.seq_len // flags.page_size)
  count = rows * pages_per_row
  page_dtype = jnp.dtype(flags.page_dtype or flags.dtype)

  def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, scales: Any
  ) -> jax.Array:
    k_scales, v_scales = scales or (None, None)
    return paged_attention(
      q,
      k,
      v,
      PageTable.contiguous(lengths, pages_per_row=pages_per_row),
      k_scales=k_scales,
      v_scales=v_scales,
      implementation=flags.implementation,
    )

  pool = jax.ShapeDtypeStruct(
    (count, flags.page_size, flags.head_dim), page_dtype
  )
  scales = jax.ShapeDtypeStruct((count,), jnp.float32)
  arguments = (
    jax.ShapeDtypeStruct(
      (rows, flags.heads // kv_heads, flags.head_dim), jnp.dtype(flags.dtype)
    ),
    pool,
    pool,
    jax.ShapeDtypeStruct((rows,), jnp.int32),
    (scales,) * 2 if page_dtype.itemsize == 1 else (),
  )
  return Program(attend, arguments, _CHOSEN)


PROGRAMS = {
  "head_attention": head_program,
  "routed_attention": routed_program,
  "paged_attention": paged_program,
}


def _with_gradients(
  flags: argparse.Namespace,
  attend: Callable[..., jax.Array],
  out: jax.ShapeDtypeStruct,
  arguments: tuple[Any, ...],
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """The same with those of the first three arguments, if they are wanted."""
  if not flags.backward:
    return attend, arguments

  def both(d_out: jax.Array, *arguments: Any) -> Any:
    def of_three(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
      return attend(q, k, v, *arguments[3:])

    return jax.vjp(of_three, *arguments[:3])[1](d_out)

  return both, (out, *arguments)


def _queries_and_keys(
  flags: argparse.Namespace,
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
  q, kv = (
    jax.ShapeDtypeStruct(
      (flags.batch, flags.seq_len, heads, flags.head_dim),
      jnp.dtype(flags.dtype),
    )
    for heads in (flags.heads, flags.kv_heads or flags.heads)
  )
  return q, kv


def _tiling(flags: argparse.Namespace) -> Tiling | None:
  if flags.block_q is None:
    return None
  return Tiling(block_q=flags.block_q, block_kv=flags.block_kv)


def _pattern(flags: argparse.Namespace) -> HeadContexts:
  """Strided contexts that the heads of a KV head share."""
  groups = max(1, flags.heads // (flags.kv_heads or flags.heads))
  return HeadContexts(
    flags.block,
    tuple(
      Strided(
        local=flags.local,
        stride=flags.stride,
        residue=-(head // groups) % max(1, flags.stride),
      )
      for head in range(flags.heads)
    ),
  )
