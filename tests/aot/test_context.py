"""Devices that share sequences: the program compiles for a slice of TPUs."""

import math
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxheads.sharding import AXES, context, spec
from pallas_kernels import aot, platform
from pallas_kernels.aot import targets
from pallas_kernels.head_attention import HeadContexts, Strided

pytestmark = [pytest.mark.compile, pytest.mark.slow]


def slice_of_four():
  """A mesh of context=4 of chips that are not here."""
  chip = targets.find("v5e")
  try:
    targets.device(chip)  # Sets what the compiler needs.
  except aot.CompilerMissing as error:
    if os.environ.get("JAXHEADS_REQUIRE_COMPILERS"):
      raise
    pytest.skip(str(error))
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=chip.topology
  )
  devices = np.array(topology.devices).reshape(1, 1, 4, 1)
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def test_strided_heads_exchange_and_gather_no_more():
  """Forward and backward; keys of one device's heads are never all there."""
  length, heads, kv_heads, head_dim, block, stride = 4096, 4, 2, 128, 64, 4
  pattern = HeadContexts(
    block,
    tuple(
      Strided(local=4, stride=stride, residue=head // 2)
      for head in range(heads)
    ),
  )
  mesh = slice_of_four()

  def both(q, k, v, d_out):
    out, pullback = jax.vjp(
      lambda *qkv: context.attend(*qkv, pattern=pattern, balanced=True),
      q,
      k,
      v,
    )
    return out, pullback(d_out)

  where = NamedSharding(mesh, spec("batch", "length", "heads", None))
  arrays = (
    jax.ShapeDtypeStruct(
      (1, length, number, head_dim), jnp.bfloat16, sharding=where
    )
    for number in (heads, kv_heads, kv_heads, heads)
  )
  with platform.compiling_for("tpu"), jax.set_mesh(mesh):
    compiled = jax.jit(both).lower(*arrays).compile()
  text = compiled.as_text()
  assert "custom-call" in text  # The kernels, not their portable stand-in.
  assert "collective-permute" in text
  whole = length * kv_heads * head_dim
  for shape in re.findall(r"= \w+\[([\d,]+)\]\S* all-gather", text):
    assert math.prod(map(int, shape.split(","))) == whole // stride
  assert not re.search(r"\ball-to-all", text)
