"""Bytes by formula are those of the collectives in the traced program."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import UserError
from jaxheads.models import presets
from jaxheads.sharding import MeshShape, context, make_mesh, volume
from jaxheads.sharding.volume import Sizes
from pallas_kernels.head_attention import HeadContexts, Strided

DENSE = HeadContexts(64, (Strided(local=1, stride=1),) * 8)


def strided(block, local, stride, num_heads=8, group=1):
  return HeadContexts(
    block,
    tuple(
      Strided(local=local, stride=stride, residue=head // group % stride)
      for head in range(num_heads)
    ),
  )


def sent(jaxpr, devices):
  """Bytes that each device along `context` sends, by what is in a program."""
  total = np.zeros(devices, np.int64)
  for equation in jaxpr.eqns:
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      assert equation.primitive.name not in ("scan", "while", "cond") or not (
        sent(inner, devices).any()
      ), "counted once"
      total += sent(inner, devices)
    bytes_ = sum(
      x.aval.size * x.aval.dtype.itemsize
      for x in equation.invars
      if hasattr(x.aval, "dtype")
    )
    match equation.primitive.name:
      case "ppermute":
        for source, _ in equation.params["perm"]:
          total[source] += bytes_
      case "all_gather":
        total += bytes_ * (devices - 1)
      case "reduce_scatter" | "all_to_all":
        total += bytes_ * (devices - 1) // devices
      case name:
        assert name not in ("psum", "all_reduce", "pgather"), name
  return total


def measured(sizes, pattern, *, balanced=True):
  """Forward, and backward, of one layer."""
  B, T, N, K, H = sizes[:5]
  dtype = {2: jnp.bfloat16, 4: jnp.float32}[sizes.value_bytes]
  shape = MeshShape(context=sizes.devices, heads=sizes.shards)
  q, k, v = (
    jax.ShapeDtypeStruct((B, T, heads, H), dtype) for heads in (N, K, K)
  )

  def attend(q, k, v):
    return context.attend(
      q, k, v, pattern=pattern, balanced=balanced, implementation="reference"
    )

  def both(q, k, v, d_out):
    return jax.vjp(attend, q, k, v)[1](d_out)

  with jax.set_mesh(make_mesh(shape, jax.devices()[: shape.size])):
    forward = sent(jax.make_jaxpr(attend)(q, k, v).jaxpr, sizes.devices)
    all_of_it = sent(jax.make_jaxpr(both)(q, k, v, q).jaxpr, sizes.devices)
  return forward, all_of_it - forward


def check(formula, found):
  np.testing.assert_array_equal(formula.forward, found[0])
  np.testing.assert_array_equal(formula.backward, found[1])


@pytest.mark.parametrize(
  ("devices", "balanced"),
  [
    (4, True),
    (2, False),
    *(
      pytest.param(*one, marks=pytest.mark.exhaustive)
      for one in ((2, True), (8, True), (4, False), (8, False))
    ),
  ],
)
def test_exchange_sends_what_the_formula_says(devices, balanced):
  sizes = Sizes(2, 32 * 16, 8, 4, 8, 4, devices)
  # Chunks of two blocks at the least, windows of five.
  pattern = strided(16, 5, 2, group=2)
  check(
    volume.exchange(sizes, pattern, balanced=balanced),
    measured(sizes, pattern, balanced=balanced),
  )


def test_a_window_alone_is_a_halo_alone():
  sizes = Sizes(1, 64 * 16, 8, 8, 8, 2, 4, 2)
  pattern = HeadContexts(16, (Strided(local=40), *(Strided(local=3),) * 7))
  formula = volume.exchange(sizes, pattern)
  check(formula, measured(sizes, pattern))
  assert not volume.residue_tokens(sizes, pattern).any()


@pytest.mark.parametrize(
  ("devices", "shards", "kv_heads"), [(2, 2, 8), (4, 1, 8), (8, 1, 2)]
)
def test_all_to_all_sends_what_the_formula_says(devices, shards, kv_heads):
  sizes = Sizes(1, 128, 8, kv_heads, 8, 4, devices, shards)
  check(volume.all_to_all(sizes), measured(sizes, DENSE))


def test_the_papers_example():
  """128K tokens on 8 devices: N_prev / V blocks of a head, not N_prev.

  In contiguous chunks the last device has 1792 blocks before its own, and
  receives 15 + 224 of them (L = 16, V = 8) or 7 + 112 (L = 8, V = 16). In
  balanced chunks there are two halos.
  """
  block = 64
  sizes = Sizes(1, 2048 * block, 16, 16, 8, 2, 8)
  for local, stride, expected, both in (
    (16, 8, 239, 254),
    (8, 16, 119, 126),
  ):
    pattern = strided(block, local, stride, num_heads=16)
    for balanced, blocks in ((False, expected), (True, both)):
      halo = volume.halo_tokens(sizes, pattern, balanced=balanced)
      received = halo.sum(axis=0) + volume.residue_tokens(sizes, pattern)
      assert received.max() == blocks * block
      formula = volume.exchange(sizes, pattern, balanced=balanced)
      assert formula.forward.max() == blocks * block * sizes.kv_bytes
      ring = volume.ring(sizes)
      assert ring.forward.max() == 1792 * block * sizes.kv_bytes
      assert 4 * formula.forward.max() <= ring.forward.max()
      assert 4 * formula.most <= ring.most


@pytest.mark.exhaustive
def test_the_papers_example_sends_that():
  sizes = Sizes(1, 2048 * 64, 16, 16, 8, 2, 8)
  pattern = strided(64, 16, 8, num_heads=16)
  check(volume.exchange(sizes, pattern), measured(sizes, pattern))


def test_the_table_of_roads():
  """What the module says of presets is what its formulas give."""
  shapes = {
    name: (config.num_heads, config.num_kv_heads)
    for name in ("llm-s", "llm-b")
    for config in [presets.get(name)]
  }
  shapes["llama3-8b"] = (32, 8)
  rows = re.findall(
    r"^  (LL\S+), .*?((?: +(?:[\d.]+|-)){3})$", volume.__doc__, re.M
  )
  assert len(rows) == 3
  for name, ratios in rows:
    heads, kv_heads = shapes[name.lower()]
    for devices, ratio in zip((2, 4, 8), ratios.split(), strict=True):
      sizes = Sizes(1, 2**13, heads, kv_heads, 64, 2, devices)
      if ratio == "-":
        with pytest.raises(UserError, match="nearest that does"):
          volume.all_to_all(sizes)
        continue
      found = volume.ring(sizes).most / volume.all_to_all(sizes).most
      assert f"{found:.1f}" == ratio, (name, devices)
