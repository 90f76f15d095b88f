"""Routed attention and projections: `xla` against `reference`, tile by tile.

`reference` itself is held to the NumPy oracle through `moh_attention`, in
tests/moh/test_execution.py.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import pack
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import Tiling, default_tiling
from pallas_kernels.routed_projection import project_in, project_out
from tests import oracles

B, T, S, N, H, D = 2, 13, 19, 4, 4, 6
TILING = Tiling(block_q=4, block_kv=8, block_edge=4)
FORWARD, GRADIENT = 1e-5, 2e-5


@functools.partial(jax.jit, static_argnames=("is_causal", "implementation"))
def run(arrays, mask, options, *, is_causal, implementation):
  """Output and gradients through packing, projections and attention."""
  packing = pack(mask, num_active=N, block_rows=TILING.block_q)

  def forward(arrays):
    rows = project_in(
      arrays["x"], arrays["w_q"], packing, implementation=implementation
    )
    rows = routed_attention(
      rows,
      arrays["k"],
      arrays["v"],
      packing,
      is_causal=is_causal,
      tiling=TILING,
      implementation=implementation,
      **options,
    )
    return project_out(
      rows, arrays["w_o"], packing, implementation=implementation
    )

  out, pullback = jax.vjp(forward, arrays)
  return out, pullback(arrays["x"])[0]


def draw(seed, kv_heads):
  rng = np.random.default_rng(seed)
  shapes = {
    "x": (B, T, D),
    "k": (B, S, kv_heads, H),
    "v": (B, S, kv_heads, H),
    "w_q": (D, N, H),
    "w_o": (N, H, D),
  }
  return {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


def agree(mask, arrays, options, is_causal):
  got = run(arrays, mask, options, is_causal=is_causal, implementation="xla")
  expected = run(
    arrays, mask, options, is_causal=is_causal, implementation="reference"
  )
  oracles.assert_close(got[0], expected[0], FORWARD)
  for name in arrays:
    oracles.assert_close(got[1][name], expected[1][name], GRADIENT)
  return got


@hypothesis.given(
  seed=st.integers(0, 1000),
  density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
  kv_heads=st.sampled_from([1, 4]),
  is_causal=st.booleans(),
  offset=st.sampled_from([-3, 0, 6, 30]),
)
def test_xla_equals_reference(seed, density, kv_heads, is_causal, offset):
  mask = np.random.default_rng(seed).random((B, T, N)) < density
  options = {"q_offset": jnp.int32(offset)}
  agree(jnp.asarray(mask), draw(seed, kv_heads), options, is_causal)


@hypothesis.given(
  seed=st.integers(0, 1000),
  axes=st.sampled_from([(B, N, T, S), (1, 1, T, S), (B, 1, 1, S)]),
  is_causal=st.booleans(),
)
@hypothesis.settings(max_examples=15)
def test_xla_equals_reference_under_masks_and_segments(seed, axes, is_causal):
  rng = np.random.default_rng(seed)
  mask = jnp.asarray(rng.random((B, T, N)) < 0.6)
  options = {
    "mask": jnp.asarray(rng.random(axes) < 0.7),
    "q_segment_ids": jnp.asarray(rng.integers(0, 3, (B, T)), jnp.int32),
    "kv_segment_ids": jnp.asarray(rng.integers(0, 3, (B, S)), jnp.int32),
  }
  agree(mask, draw(seed, 2), options, is_causal)


def test_two_runs_give_the_same_bits():
  mask = jnp.asarray(np.random.default_rng(0).random((B, T, N)) < 0.5)
  first, second = (
    run(draw(0, 2), mask, {}, is_causal=True, implementation="xla")
    for _ in range(2)
  )
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(a, b)


def test_projections_through_all_heads_are_the_references():
  arrays, rng = draw(0, 2), np.random.default_rng(0)
  mask = jnp.asarray(rng.random((B, T, N)) < 0.4)
  packing = pack(mask, num_active=N, block_rows=TILING.block_q)

  def there_and_back(implementation):
    def run(x, w_q, w_o):
      rows = project_in(x, w_q, packing, implementation=implementation)
      return project_out(rows, w_o, packing, implementation=implementation)

    operands = arrays["x"], arrays["w_q"], arrays["w_o"]
    out, pullback = jax.vjp(jax.jit(run), *operands)
    return out, pullback(arrays["x"])

  got, want = there_and_back("dense"), there_and_back("reference")
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    oracles.assert_close(one, two, GRADIENT)


def test_kv_heads_that_nobody_chose_get_zero_gradients():
  mask = jnp.ones((B, T, N), bool).at[:, :, 2:].set(False)
  _, grads = run(draw(0, 2), mask, {}, is_causal=True, implementation="xla")
  for name in ("k", "v"):
    assert not np.asarray(grads[name])[:, :, 1].any()
    assert np.asarray(grads[name])[:, :, 0].any()


def test_queries_that_see_nothing_give_zero_and_no_nan():
  mask = jnp.ones((B, T, N), bool)
  options = {"q_offset": jnp.int32(-5)}  # Tokens 0 .. 4 see no key.
  out, grads = agree(mask, draw(0, 2), options, True)
  assert not np.asarray(out)[:, :5].any()
  assert np.asarray(out)[:, 5:].any()
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_what_is_masked_may_hold_anything_finite():
  mask = jnp.ones((B, T, N), bool)
  arrays = draw(0, 2)
  hidden = jnp.arange(S) >= T  # No causal query sees these keys.
  spoilt = dict(arrays)
  for name in ("k", "v"):
    spoilt[name] = jnp.where(hidden[None, :, None, None], 1e4, arrays[name])
  clean = run(arrays, mask, {}, is_causal=True, implementation="xla")
  dirty = run(spoilt, mask, {}, is_causal=True, implementation="xla")
  for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
    np.testing.assert_array_equal(a, b)


def test_nothing_of_size_tokens_squared_is_stored():
  length = 2048
  shape = (1, length, 4, 8)
  k = jax.ShapeDtypeStruct(shape, jnp.float32)

  def forward(q, k, v, mask):
    packing = pack(mask, num_active=2, block_rows=128)
    rows = jnp.zeros((packing.num_rows, 8)) + q
    return routed_attention(rows, k, v, packing, is_causal=True)

  gradient = jax.grad(lambda *a: forward(*a).sum(), argnums=(0, 1, 2))
  compiled = (
    jax.jit(gradient)
    .lower(
      jax.ShapeDtypeStruct((), jnp.float32),
      k,
      k,
      jax.ShapeDtypeStruct(shape[:3], bool),
    )
    .compile()
  )
  temporary_bytes = compiled.memory_analysis().temp_size_in_bytes
  assert temporary_bytes < 4 * length * length / 2


@pytest.mark.parametrize(
  ("settings", "named"),
  [
    ({"block_q": 0, "block_kv": 8, "block_edge": 4}, "block_q"),
    ({"block_q": 4, "block_kv": 8, "block_edge": 3}, "block_edge"),
  ],
)
def test_tile_sizes_that_do_not_fit_are_refused_by_name(settings, named):
  with pytest.raises(ValueError, match=f"`{named}`"):
    Tiling(**settings)


@pytest.mark.parametrize("length", [1, 3, 130, 600, 5000])
@pytest.mark.parametrize("active", [0.1, 0.5, 1.0])
def test_default_tiles_fit_every_length(length, active):
  tiling = default_tiling(length, length, active)
  assert tiling.block_q < 2 * max(length, 1)
  assert tiling.block_kv < 2 * max(length, 1)


def test_unknown_implementations_and_tilings_are_refused_by_name():
  packing = pack(jnp.ones((B, T, N), bool), num_active=N, block_rows=4)
  arrays = draw(0, 2)
  q = jnp.zeros((packing.num_rows, H))
  with pytest.raises(ValueError, match="`implementation`.*'cuda'"):
    routed_attention(
      q, arrays["k"], arrays["v"], packing, implementation="cuda"
    )
  with pytest.raises(ValueError, match="`tiling.block_q`"):
    routed_attention(
      q,
      arrays["k"],
      arrays["v"],
      packing,
      tiling=Tiling(block_q=8, block_kv=8, block_edge=8),
    )
  with pytest.raises(ValueError, match="`q`"):
    routed_attention(q[1:], arrays["k"], arrays["v"], packing)
  with pytest.raises(ValueError, match="`w`"):
    project_in(arrays["x"], arrays["w_q"][:, 1:], packing)
  with pytest.raises(ValueError, match="`rows`"):
    project_out(q[1:], arrays["w_o"], packing)
