"""Routed attention on TPUs, in interpret mode, against NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.routed_attention.mosaic_tpu import worklist
from pallas_kernels.routed_attention.tiling import Tiling
from tests import s2_cases
from tests.routed_cases import (
  HEADS,
  check,
  draw,
  expected,
  picks,
  routed,
  segments,
)

STRIDED = {
  name: HEADS[name]
  for name in (
    "strided",
    "strided, shared by the group",
    "strided and dense",
    "window",
    "strided, not causal in a block",
  )
}
STRIDED["everything"] = s2_cases.strided(4, local=1, stride=1)
TILINGS = (
  Tiling(block_q=8, block_kv=8, block_edge=8),
  Tiling(block_q=16, block_kv=8, block_edge=8),
  Tiling(block_q=8, block_kv=16, block_edge=8),
)
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def run(heads, arrays, active, options, tiling=TILINGS[0], interpret=True):
  return routed(
    arrays,
    active,
    options,
    pattern=heads.pattern,
    tiling=tiling,
    implementation="mosaic_tpu",
    interpret=interpret,
  )


def small(seed):
  """Few tiles each way: interpreting takes long."""
  return draw(seed, T=27, S=34)


@pytest.mark.slow
@pytest.mark.parametrize("heads", STRIDED.values(), ids=STRIDED)
@hypothesis.given(
  seed=st.integers(0, 1000),
  density=st.sampled_from([0.0, 0.4, 1.0]),
  tiling=st.sampled_from(TILINGS),
  offset=st.sampled_from([0, 13]),
  has_segments=st.booleans(),
)
@hypothesis.settings(max_examples=3)
def test_equals_masked_dense_attention(
  heads, seed, density, tiling, offset, has_segments
):
  arrays = small(seed)
  active = picks(seed, arrays["q"].shape[:3], density)
  options = {"q_offset": jnp.int32(offset)}
  if has_segments:
    options |= segments(seed, arrays, offset)
  got = run(heads, arrays, active, options, tiling)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, options))


@pytest.mark.parametrize("name", ["strided", "strided and dense"])
def test_no_races_and_nothing_uninitialised_is_read(name):
  arrays = small(0)
  # A head with every token, one with none, two with some.
  active = picks(0, arrays["q"].shape[:3], 0.5)
  active = active.at[:, :, 0].set(True).at[:, :, 3].set(False)
  heads = STRIDED[name]
  got = run(heads, arrays, active, {}, interpret=RACES)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, {}))


def test_long_lists_are_cut(monkeypatch):
  arrays = small(1)
  active = picks(1, arrays["q"].shape[:3], 0.7)
  heads = STRIDED["strided"]
  monkeypatch.setattr(worklist, "MOST_ITEMS", 24)
  # A tiling of its own: nothing that was traced before is used again.
  tiling = Tiling(block_q=8, block_kv=8, block_edge=4)
  got = run(heads, arrays, active, {}, tiling)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, {}))
