"""Products on Hopper: wgmma, whose accumulator lies in registers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.head_attention.mosaic_gpu.products import spread
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton.problem import Problem

ROWS = 64  # Queries of one warp group: what one wgmma has.
# By head size: two warp groups compute, and what shared memory holds.
TILINGS = {
  64: Tiling(block_q=128, block_kv=128),
  128: Tiling(block_q=128, block_kv=128),
  256: Tiling(block_q=128, block_kv=64),
}


def scratch(problem: Problem) -> dict[str, Any]:
  """Memory that `HopperProducts` needs: none, `acc` is an array."""
  del problem
  return {}


@dataclasses.dataclass(frozen=True)
class HopperProducts:
  """See `Products`."""

  problem: Problem
  q_ref: Any
  group: jax.Array
  layout = plgpu.Layout.WGMMA

  def zeros(self) -> jax.Array:
    return plgpu.layout_cast(
      jnp.zeros((ROWS, self.problem.Hv), jnp.float32), self.layout
    )

  def logits(self, k_ref: Any, free_ref: Any) -> jax.Array:
    def multiply(acc_ref: Any) -> jax.Array:
      plgpu.wgmma(acc_ref, self.q_ref, k_ref.transpose((1, 0)))
      return acc_ref[...]

    result = pl.run_scoped(
      multiply,
      plgpu.WGMMAAccumulatorRef((ROWS, k_ref.shape[0]), jnp.float32),
    )
    plgpu.barrier_arrive(free_ref)
    return result

  def scale(self, acc: jax.Array, factor: jax.Array) -> jax.Array:
    return acc * spread(factor, acc.shape)

  def add(
    self, acc: jax.Array, weights: jax.Array, v_ref: Any, free_ref: Any
  ) -> jax.Array:
    def multiply(acc_ref: Any) -> None:
      plgpu.wgmma(acc_ref, weights, v_ref)

    acc = pl.run_state(multiply)(plgpu.WGMMAAccumulatorRef.init(acc))
    plgpu.barrier_arrive(free_ref)
    return acc

  def store(self, acc: jax.Array, divisor: jax.Array, out_ref: Any) -> None:
    acc /= spread(divisor, acc.shape)
    out_ref[...] = acc.astype(out_ref.dtype)
