"""Hopper and Blackwell in JAX's interpreter, for Mosaic GPU kernels."""

import dataclasses

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.head_attention.mosaic_gpu import chips
from pallas_kernels.head_attention.mosaic_gpu.hopper import HopperProducts

needs_interpreter = pytest.mark.skipif(
  not hasattr(plgpu, "InterpretGPUParams"),
  reason="JAX interprets tensor memory and layouts from 0.12 on",
)


@dataclasses.dataclass(frozen=True)
class HalfInterpreted(HopperProducts):
  """The interpreter's wgmma wants both operands in shared memory.

  Weights times values is an ordinary product here; the rest of the kernel is
  Hopper's own.
  """

  def add(self, acc, weights, v_ref, free_ref):
    acc += jnp.dot(weights, v_ref[...], preferred_element_type=jnp.float32)
    # Read by the threads, not by tensor cores: copies must wait for that.
    plgpu.commit_smem()
    plgpu.barrier_arrive(free_ref)
    return acc


CHIPS = {
  "9.0": dataclasses.replace(chips.HOPPER, products=HalfInterpreted),
  "10.0": chips.BLACKWELL,
}
