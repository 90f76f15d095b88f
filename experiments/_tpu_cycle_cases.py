"""What `bench_tpu_cycles.py` compiles: our kernel and splash attention.

Each case is compiled in a process of its own, because the TPU compiler reads
its flags once.
"""

import dataclasses
import functools
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)

from pallas_kernels import aot
from pallas_kernels.aot import bundles
from pallas_kernels.head_attention import (
  HeadContexts,
  Strided,
  Tiling,
  head_attention,
)
from pallas_kernels.packing import pack
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import Tiling as RoutedTiling

HEAD_SIZE = 128
# Splash attention takes masks token by token; its code does not know the
# length, so a short one will do.
_SPLASH_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Case:
  """One compile, forward and backward.

  Attributes:
    chip: As in `aot.compile_for`.
    kernel: "ours", "routed" (ours on packed rows), "splash fused" or "splash
      unfused" (its backward).
    mask: "causal"; "none" (splash only); "s2", heads that differ in their
      residue.
    block_q, block_kv: The tile.
  """

  chip: str
  kernel: str
  mask: str
  block_q: int
  block_kv: int

  def __str__(self) -> str:
    tile = f"{self.block_q} x {self.block_kv}"
    return f"{self.chip} {self.kernel} {self.mask} {tile}"


@dataclasses.dataclass(frozen=True)
class Problem:
  """Strided heads of equal width; every head has a residue of its own."""

  length: int = 32768
  block: int = 64
  local: int = 8
  stride: int = 16
  heads: int = 16

  def pattern(self, heads: int | None = None) -> HeadContexts:
    """Contexts of the first `heads` heads, or of all."""
    return HeadContexts(
      self.block,
      tuple(
        Strided(
          local=self.local, stride=self.stride, residue=head % self.stride
        )
        for head in range(self.heads if heads is None else heads)
      ),
    )

  def density(self) -> float:
    """Visible pairs of blocks over those of causal attention."""
    blocks = range(self.length // self.block)
    pattern = self.pattern()
    kept = sum(
      int(pattern.block_mask(rule, blocks, blocks).sum())
      for rule in pattern.rules
    )
    return kept / (self.heads * len(blocks) * (len(blocks) + 1) // 2)


Schedules = list[bundles.Schedule]


def compile_case(case: Case, problem: Problem) -> Schedules | str:
  """The kernels of a case in program order, or why it does not compile.

  Call it first thing in a fresh process.
  """
  makers = {"ours": _ours, "routed": _routed}
  program = makers.get(case.kernel, _splash)(case, problem)

  def both(q: Any, k: Any, v: Any, d_out: Any, rest: Any) -> Any:
    def attention(q: Any, k: Any, v: Any) -> Any:
      return program.attention(q, k, v, *rest)

    return jax.vjp(attention, q, k, v)[1](d_out)

  q, keys = (
    jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for shape in (program.queries, program.keys)
  )
  arguments = (q, keys, keys, q, program.rest)
  return schedules(case.chip, both, arguments, "head_attention|splash_mha")


def schedules(
  chip: str, program: Callable[..., Any], arguments: Any, names: str
) -> Schedules | str:
  """The kernels of a program in its order, or why it does not compile.

  Args:
    chip: As in `aot.compile_for`.
    program, arguments: What to compile; abstract arguments.
    names: See `bundles.read_dump`.
  """
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LIBTPU_INIT_ARGS"] = bundles.dump_flags(pathlib.Path(folder))
    # Else the compiler warns about a network that is not there.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    jax.config.update("jax_platforms", "cpu")
    try:
      aot.compile_for(chip, program, *arguments)
    except (aot.DoesNotCompile, NotImplementedError) as error:
      return str(error)
    return bundles.read_dump(pathlib.Path(folder), names)


def routed_tiling(case: Case) -> RoutedTiling:
  """The case's tile; there is no other one on a TPU."""
  return RoutedTiling(
    block_q=case.block_q, block_kv=case.block_kv, block_edge=case.block_kv
  )


class _Program(NamedTuple):
  """What to compile.

  Attributes:
    attention: Takes q, k, v and the rest.
    queries, keys: Shapes of q and the output, and of k and v.
    rest: Other arguments, abstract.
  """

  attention: Callable[..., Any]
  queries: tuple[int, ...]
  keys: tuple[int, ...]
  rest: tuple[Any, ...] = ()


def _routed(case: Case, problem: Problem) -> _Program:
  tiling = routed_tiling(case)
  keys = (1, problem.length, 2, HEAD_SIZE)
  packing = jax.eval_shape(
    functools.partial(pack, num_active=2, block_rows=tiling.block_q),
    jax.ShapeDtypeStruct(keys[:3], bool),
  )

  def attention(q: Any, k: Any, v: Any, packing: Any) -> Any:
    return routed_attention(
      q,
      k,
      v,
      packing,
      pattern=_pattern(case, problem),
      tiling=tiling,
      implementation="mosaic_tpu",
    )

  rows = (packing.num_rows, HEAD_SIZE)
  return _Program(attention, rows, keys, (packing,))


def _pattern(case: Case, problem: Problem) -> HeadContexts:
  """Of two heads."""
  if case.mask == "causal":
    return HeadContexts(problem.block, (Strided(local=1, stride=1),) * 2)
  return problem.pattern(2)


def _ours(case: Case, problem: Problem) -> _Program:
  def attention(q: Any, k: Any, v: Any) -> Any:
    return head_attention(
      q,
      k,
      v,
      pattern=_pattern(case, problem),
      tiling=Tiling(block_q=case.block_q, block_kv=case.block_kv),
      implementation="mosaic_tpu",
    )

  shape = (1, problem.length, 2, HEAD_SIZE)
  return _Program(attention, shape, shape)


def _splash(case: Case, problem: Problem) -> _Program:
  length = _SPLASH_LENGTH
  masks: list[splash_mask.Mask]
  if case.mask == "causal":
    masks = [splash_mask.CausalMask((length, length))] * 2
  elif case.mask == "none":
    masks = [splash_mask.FullMask((length, length))] * 2
  else:
    masks = [
      splash_mask.NumpyMask(each)
      for each in dense_masks(problem.pattern(2), length)
    ]
  bq, bkv = case.block_q, case.block_kv
  fused = case.kernel == "splash fused"
  attention = splash_kernel.make_splash_mha(
    mask=splash_mask.MultiHeadMask(masks),
    block_sizes=splash_kernel.BlockSizes(
      block_q=bq,
      block_kv=bkv,
      block_kv_compute=bkv,
      block_q_dkv=bq,
      block_kv_dkv=bkv,
      block_kv_dkv_compute=bkv,
      block_q_dq=None if fused else bq,
      block_kv_dq=None if fused else bkv,
      use_fused_bwd_kernel=fused,
    ),
    head_shards=1,
    q_seq_shards=1,
  )
  shape = (2, length, HEAD_SIZE)
  return _Program(attention, shape, shape)


def dense_masks(pattern: HeadContexts, length: int) -> list[np.ndarray]:
  """What the heads see, token by token: bool [length, length] each."""
  blocks = range(length // pattern.block_size)
  causal = np.tri(length, dtype=bool)
  ones = np.ones((pattern.block_size,) * 2, bool)
  return [
    np.kron(pattern.block_mask(rule, blocks, blocks), ones) & causal
    for rule in pattern.rules
  ]
