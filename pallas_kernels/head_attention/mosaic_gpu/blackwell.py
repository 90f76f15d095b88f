"""Products on Blackwell: tcgen05, whose accumulators lie in tensor memory.

The weights pass through tensor memory too. The tensor cores work in the order
in which they were asked, and tell barriers when they are done: a group waits
for its logits only, and knows then that its last output product is done too.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.head_attention.mosaic_gpu.products import spread
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton.problem import Problem

ROWS = 128  # Queries of one warp group: the lanes of tensor memory.
COLUMNS = 512  # Of tensor memory, 32 bits each.
# By head size: what tensor memory and shared memory hold.
TILINGS = {
  64: Tiling(block_q=256, block_kv=128),
  128: Tiling(block_q=256, block_kv=64),
  256: Tiling(block_q=128, block_kv=64),
}
# Columns of the accumulator that are in registers at a time.
_PART = 64


def columns(tiling: Tiling, Hv: int) -> int:
  """Columns of tensor memory: logits, weights in 16 bits, accumulators."""
  groups = tiling.block_q // ROWS
  return groups * (tiling.block_kv + tiling.block_kv // 2 + Hv)


def scratch(problem: Problem) -> dict[str, Any]:
  """Memory that `BlackwellProducts` needs, side by side for all groups."""
  groups = problem.tiling.block_q // ROWS
  keys = problem.tiling.block_kv
  return dict(
    logits_ref=plgpu.TMEM((ROWS, groups * keys), jnp.float32),
    weights_ref=plgpu.TMEM((ROWS, groups * keys), problem.dtype, packed=True),
    acc_ref=plgpu.TMEM((ROWS, groups * problem.Hv), jnp.float32),
    done_ref=plgpu.Barrier(num_barriers=groups, orders_tensor_core=True),
  )


@dataclasses.dataclass(frozen=True)
class BlackwellProducts:
  """See `Products`; `acc` lies in `acc_ref`, so nothing is passed around."""

  problem: Problem
  q_ref: Any
  group: jax.Array
  logits_ref: Any
  weights_ref: Any
  acc_ref: Any
  done_ref: Any
  layout = plgpu.Layout.TCGEN05

  def zeros(self) -> tuple[()]:
    zeros = plgpu.layout_cast(
      jnp.zeros((ROWS, _PART), jnp.float32), self.layout
    )
    for part in self._parts():
      plgpu.async_store_tmem(self._acc(part), zeros)
    plgpu.commit_tmem()
    return ()

  def logits(self, k_ref: Any, free_ref: Any) -> jax.Array:
    own = self._own(self.logits_ref)
    plgpu.tcgen05_mma(
      own, self.q_ref, k_ref.transpose((1, 0)), free_ref, accumulate=False
    )
    self._wait()
    result = plgpu.async_load_tmem(own, layout=self.layout)
    # The next visit overwrites it.
    plgpu.wait_load_tmem()
    return result

  def scale(self, acc: tuple[()], factor: jax.Array) -> tuple[()]:
    for part in self._parts():
      own = self._acc(part)
      values = plgpu.async_load_tmem(own, layout=self.layout)
      plgpu.wait_load_tmem()
      plgpu.async_store_tmem(own, values * spread(factor, values.shape))
    # `add` waits for the stores.
    return acc

  def add(
    self, acc: tuple[()], weights: jax.Array, v_ref: Any, free_ref: Any
  ) -> tuple[()]:
    own = self._own(self.weights_ref)
    plgpu.async_store_tmem(own, weights)
    plgpu.commit_tmem()
    plgpu.tcgen05_mma(self._own(self.acc_ref), own, v_ref, free_ref)
    return acc

  def store(self, acc: tuple[()], divisor: jax.Array, out_ref: Any) -> None:
    del acc
    self._wait()
    for part in self._parts():
      values = plgpu.async_load_tmem(self._acc(part), layout=self.layout)
      values /= spread(divisor, values.shape)
      out_ref[:, pl.ds(part, _PART)] = values.astype(out_ref.dtype)

  def _wait(self) -> None:
    """Until all products of this group are done."""
    done = self.done_ref.at[self.group]
    plgpu.tcgen05_commit_arrive(done)
    plgpu.barrier_wait(done)

  def _own(self, ref: Any) -> Any:
    size = ref.shape[1] * ROWS // self.problem.tiling.block_q
    return ref.at[:, pl.ds(self.group * size, size)]

  def _acc(self, part: int) -> Any:
    start = self.group * self.problem.Hv + part
    return self.acc_ref.at[:, pl.ds(start, _PART)]

  def _parts(self) -> range:
    return range(0, self.problem.Hv, _PART)
