"""Rotary embedding: rotate-half convention, angles by absolute position."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.rope import apply_rope
from tests import oracles

B, T, N, H = 2, 11, 3, 8


def heads(seed=0, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return rng.standard_normal((B, T, N, H)).astype(dtype)


def positions(seed=0, limit=64):
  return np.random.default_rng(seed).integers(0, limit, (B, T)).astype(np.int32)


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
def test_equals_the_oracle_at_scattered_positions(theta):
  x, at = heads(), positions()
  actual = apply_rope(x, at, theta=theta)
  oracles.assert_close(actual, oracles.rope(x, at, theta), 1e-5)


def test_default_theta_is_ten_thousand():
  x, at = heads(), positions()
  oracles.assert_close(apply_rope(x, at), oracles.rope(x, at, 10_000.0), 1e-5)


def test_far_positions_lose_no_more_than_float32_angles_do():
  x, at = heads(), positions(limit=100_000)
  # An angle near 1e5 is known to 1e5 * 2**-24.
  oracles.assert_close(apply_rope(x, at), oracles.rope(x, at, 10_000.0), 1.5e-2)


def test_position_zero_changes_nothing():
  x = heads()
  np.testing.assert_array_equal(apply_rope(x, np.zeros((B, T), np.int32)), x)


def test_pairs_are_the_two_halves_not_neighbours():
  # The first pair turns by one radian per position: (0, H/2).
  x = np.zeros((1, 1, 1, H), np.float32)
  x[..., 0] = 1.0
  out = np.asarray(apply_rope(x, np.array([[1]], np.int32)))[0, 0, 0]
  expected = np.zeros(H)
  expected[0], expected[H // 2] = np.cos(1), np.sin(1)
  np.testing.assert_allclose(out, expected, atol=1e-6)


def test_norms_are_kept():
  x = heads()
  out = np.asarray(apply_rope(x, positions(limit=4096)))
  oracles.assert_close(
    np.linalg.norm(out, axis=-1), np.linalg.norm(x, axis=-1), 1e-5
  )


def test_products_depend_on_the_distance_only():
  q, k = heads(1)[:, :1], heads(2)[:, :1]

  def product(q_at, k_at):
    at = lambda p: np.full((B, 1), p, np.int32)
    return jnp.sum(apply_rope(q, at(q_at)) * apply_rope(k, at(k_at)), axis=-1)

  oracles.assert_close(product(40, 33), product(7, 0), 1e-5)
  assert np.abs(np.asarray(product(40, 33) - product(33, 40))).max() > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtype_is_kept_and_angles_are_float32(dtype):
  x, at = jnp.asarray(heads(), dtype), positions(limit=2000)
  out = apply_rope(x, at)
  assert out.dtype == dtype
  expected = oracles.rope(np.asarray(x.astype(jnp.float32)), at, 10_000.0)
  # One rounding of the result; angles kept in bfloat16 would be off by radians.
  rounding = {jnp.float32: 3e-4, jnp.bfloat16: 2**-7, jnp.float16: 2**-10}
  oracles.assert_close(out.astype(jnp.float32), expected, rounding[dtype])


def test_gradient_is_the_inverse_rotation():
  x, at, dout = heads(), positions(), heads(5)
  dx = jax.grad(lambda x: jnp.sum(apply_rope(x, at) * dout))(x)
  oracles.assert_close(dx, oracles.rope(dout, -at, 10_000.0), 2e-5)


@pytest.mark.parametrize(
  ("x", "at", "named"),
  [
    (jnp.ones((B, T, N, 7)), jnp.zeros((B, T), jnp.int32), "x"),
    (jnp.ones((B, T, H)), jnp.zeros((B, T), jnp.int32), "x"),
    (jnp.ones((B, T, N, H)), jnp.zeros((B, T + 1), jnp.int32), "positions"),
    (jnp.ones((B, T, N, H)), jnp.zeros((T,), jnp.int32), "positions"),
  ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(x, at, named):
  with pytest.raises(ValueError, match=f"`{named}`"):
    apply_rope(x, at)
