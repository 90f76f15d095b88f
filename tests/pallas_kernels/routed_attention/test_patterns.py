"""Routed queries under a pattern: every implementation against NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import pack
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import Tiling
from tests import oracles_s2, routed_cases
from tests.routed_cases import (
  HEADS,
  check,
  draw,
  expected,
  picks,
  routed,
  segments,
)

TILINGS = (
  Tiling(block_q=4, block_kv=8, block_edge=4),
  Tiling(block_q=8, block_kv=16, block_edge=16),
  Tiling(block_q=16, block_kv=4, block_edge=2),
)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@hypothesis.given(
  seed=st.integers(0, 1000),
  density=st.sampled_from([0.3, 1.0, 0.0]),
  tiling=st.sampled_from(TILINGS),
  offset=st.sampled_from([0, 13]),
  has_segments=st.booleans(),
)
@hypothesis.settings(max_examples=2)
def test_equals_masked_dense_attention(
  implementation, heads, seed, density, tiling, offset, has_segments
):
  arrays = draw(seed)
  active = picks(seed, arrays["q"].shape[:3], density)
  options = {"q_offset": jnp.int32(offset)}
  if has_segments:
    options |= segments(seed, arrays, offset)
  got = routed(
    arrays,
    active,
    options,
    pattern=heads.pattern,
    tiling=tiling,
    implementation=implementation,
  )
  check(got, expected(arrays, active, heads.blocks, heads.pattern, options))


def test_one_head_takes_every_token_and_another_none():
  heads = HEADS["strided"]
  arrays = draw(0)
  active = jnp.zeros(arrays["q"].shape[:3], bool).at[:, :, 1].set(True)
  got = routed(
    arrays,
    active,
    {},
    pattern=heads.pattern,
    tiling=TILINGS[0],
    implementation="xla",
  )
  check(got, expected(arrays, active, heads.blocks, heads.pattern, {}))
  # Heads 2 and 3 read the second KV head, and nobody picked them.
  assert not np.asarray(got[1][1])[:, :, 1].any()
  assert not np.asarray(got[1][2])[:, :, 1].any()


@pytest.mark.parametrize(
  ("implementation", "interpret", "tiling"),
  [
    ("xla", False, TILINGS[1]),
    ("mosaic_tpu", True, TILINGS[1]),
    pytest.param("triton", True, TILINGS[2], marks=pytest.mark.exhaustive),
  ],
)
def test_bfloat16_errs_no_more_than_dense_attention(
  implementation, interpret, tiling
):
  heads = HEADS["strided"]
  arrays = draw(0, T=40, S=40, H=32, dtype=jnp.bfloat16)
  arrays["q"] *= 2
  active = picks(0, arrays["q"].shape[:3], 0.5)
  exact = expected(arrays, active, heads.blocks, heads.pattern, {})
  out, grads = routed(
    arrays,
    active,
    {},
    pattern=heads.pattern,
    tiling=tiling,
    implementation=implementation,
    interpret=interpret,
  )
  seen = routed_cases.visible(arrays, heads.blocks, heads.pattern, {})

  @jax.jit
  def dense(q, k, v, d_out):
    def attend(q, k, v):
      result = oracles_s2.jnp_dense(q, k, v, seen, scale=32**-0.5)
      return jnp.where(active[..., None], result, 0)

    result, pullback = jax.vjp(attend, q, k, v)
    return result, pullback(d_out)

  dense_out, dense_grads = dense(*arrays.values())
  for ours, theirs, truth, factor in (
    (out, dense_out, exact[0], 2),
    *zip(grads, dense_grads, exact[1], (3, 3, 3), strict=True),
  ):
    assert ours.dtype == jnp.bfloat16
    mine, other = (
      np.abs(np.asarray(x, np.float64) - truth) for x in (ours, theirs)
    )
    assert mine.max() <= factor * other.max()
    assert (mine**2).mean() <= factor**2 * (other**2).mean()


def test_patterns_that_do_not_fit_are_refused():
  arrays = draw(0)
  packing = pack(jnp.ones((2, 37, 4), bool), num_active=4, block_rows=8)
  rows = jnp.zeros((packing.num_rows, 8))
  with pytest.raises(ValueError, match="`pattern` is for 2 query heads"):
    routed_attention(
      rows,
      arrays["k"],
      arrays["v"],
      packing,
      pattern=routed_cases.s2_cases.strided(2).pattern,
    )
  short = routed_cases.s2_cases.random_blocks(4, reach=4).pattern
  with pytest.raises(ValueError, match="covers 32 .* tokens"):
    routed_attention(rows, arrays["k"], arrays["v"], packing, pattern=short)
