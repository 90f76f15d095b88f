"""The load-balance loss against sums written out, and its limits."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxheads.moh import load_balance_loss
from tests import oracles, strategies

B, T, E, K = 4, 6, 5, 2


def draw_case(rng, batch=B, length=T):
  probs = oracles.softmax(rng.standard_normal((batch, length, E)) * 2)
  probs = probs.astype(np.float32)
  mask = np.zeros(probs.shape, bool)
  for b, t in np.ndindex(batch, length):
    mask[b, t] = oracles.pick_top(rng.standard_normal(E), K)
  return probs, mask


@functools.cache
def compiled(**options):
  return jax.jit(
    lambda probs, mask, valid: load_balance_loss(
      probs, mask, token_mask=valid, **options
    )
  )


compiled_loss = compiled()


@strategies.sweep(30)
@hypothesis.given(data=st.data())
def test_loss_equals_the_oracle_without_the_padding(data):
  x, valid, rng = data.draw(strategies.integer_tokens(B, T, 1))
  del x
  probs, mask = draw_case(rng)
  expected = oracles.load_balance(probs, mask, valid)
  # What stands in the padding is nobody's business.
  probs[~valid] = strategies.HUGE
  mask[~valid] = True
  actual = compiled_loss(probs, mask, valid)
  assert actual.shape == ()
  assert actual.dtype == jnp.float32
  oracles.assert_close(actual, expected, 1e-5)


def test_no_token_mask_means_every_token_counts():
  probs, mask = draw_case(np.random.default_rng(0))
  expected = oracles.load_balance(probs, mask, np.ones((B, T), bool))
  oracles.assert_close(load_balance_loss(probs, mask), expected, 1e-5)


def test_perfect_balance_costs_top_k():
  probs = np.full((1, E, E), 1 / E, np.float32)
  mask = np.stack(
    [np.roll([True] * K + [False] * (E - K), i) for i in range(E)]
  )
  oracles.assert_close(load_balance_loss(probs, mask[None]), K, 1e-6)


def test_collapse_costs_the_number_of_routed_heads():
  probs = np.zeros((B, T, E), np.float32)
  probs[..., 3] = 1.0
  oracles.assert_close(load_balance_loss(probs, probs > 0.5), E, 1e-6)


def test_every_head_picked_costs_a_constant_with_zero_gradient():
  logits = (
    np.random.default_rng(0).standard_normal((B, T, E)).astype(np.float32)
  )
  everyone = np.ones((B, T, E), bool)

  def loss(logits):
    return load_balance_loss(jax.nn.softmax(logits, axis=-1), everyone)

  value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
  oracles.assert_close(value, E, 1e-6)
  np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_gradient_is_routed_times_load_over_tokens_and_none_for_padding():
  rng = np.random.default_rng(0)
  probs, mask = draw_case(rng)
  valid = rng.random((B, T)) < 0.6
  gradient = jax.grad(lambda p: load_balance_loss(p, mask, token_mask=valid))(
    probs
  )
  load = mask[valid].mean(axis=0)
  expected = np.where(valid[..., None], E * load / valid.sum(), 0.0)
  oracles.assert_close(gradient, expected, 1e-6)
  np.testing.assert_array_equal(np.asarray(gradient)[~valid], 0.0)


def test_load_has_no_gradient_of_its_own():
  # A float mask that depends on the router must not open a second path.
  probs, mask = draw_case(np.random.default_rng(0))

  def loss(probs, through_mask):
    source = probs if through_mask else jax.lax.stop_gradient(probs)
    soft = jnp.where(source > 0.2, mask, mask)
    return load_balance_loss(probs, soft)

  np.testing.assert_array_equal(
    jax.grad(loss)(probs, True), jax.grad(loss)(probs, False)
  )


def test_all_padding_costs_zero_with_zero_gradient():
  probs, mask = draw_case(np.random.default_rng(0))
  nobody = np.zeros((B, T), bool)
  probs[:] = np.nan  # Whatever a router makes of an empty batch.
  value, gradient = jax.value_and_grad(
    lambda p: load_balance_loss(p, mask, token_mask=nobody)
  )(probs)
  assert float(value) == 0.0
  np.testing.assert_array_equal(gradient, 0.0)


def test_no_routed_heads_cost_a_zero_tensor():
  loss = load_balance_loss(jnp.zeros((B, T, 0)), jnp.zeros((B, T, 0), bool))
  assert isinstance(loss, jax.Array)
  assert loss.shape == ()
  assert loss.dtype == jnp.float32
  assert float(loss) == 0.0


def test_low_precision_probabilities_are_summed_in_float32():
  # 0.2 + ... in bfloat16 stops growing long before 4096 tokens.
  probs = jnp.full((1, 4096, E), 0.2, jnp.bfloat16)
  mask = np.zeros((1, 4096, E), bool)
  mask[..., :K] = True
  loss = load_balance_loss(probs, mask)
  assert loss.dtype == jnp.float32
  expected = oracles.load_balance(
    np.asarray(probs.astype(jnp.float32)), mask, np.ones((1, 4096), bool)
  )
  oracles.assert_close(loss, expected, 1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_local_statistics_average_the_losses_of_contiguous_groups(groups):
  rng = np.random.default_rng(1)
  probs, mask = draw_case(rng)
  valid = rng.random((B, T)) < 0.7
  valid[:, 0] = True
  losses = [
    oracles.load_balance(p, m, v)
    for p, m, v in zip(
      *(np.split(a, groups) for a in (probs, mask, valid)), strict=True
    )
  ]
  actual = compiled(num_groups=groups)(probs, mask, valid)
  oracles.assert_close(actual, np.mean(losses), 1e-5)


def test_local_statistics_tolerate_a_group_of_padding_only():
  probs, mask = draw_case(np.random.default_rng(1))
  valid = np.ones((B, T), bool)
  valid[:2] = False
  fn = lambda p: load_balance_loss(p, mask, token_mask=valid, num_groups=2)
  value, gradient = jax.value_and_grad(fn)(probs)
  assert np.isfinite(value)
  assert np.isfinite(gradient).all()


def sharded(axis_size, probs, mask, valid):
  """The loss as each shard of a data-parallel axis computes it."""

  def one(p, m, v):
    return load_balance_loss(p, m, token_mask=v, axis_name="data")

  split = (a.reshape(axis_size, -1, *a.shape[1:]) for a in (probs, mask, valid))
  return jax.vmap(one, axis_name="data")(*split)


@pytest.mark.parametrize("padded", [False, True])
def test_global_statistics_equal_the_loss_of_the_whole_batch(padded):
  rng = np.random.default_rng(2)
  probs, mask = draw_case(rng)
  valid = np.ones((B, T), bool)
  if padded:  # unevenly: 1, 6, 0 and 3 tokens
    valid = np.arange(T) < np.array([[1], [6], [0], [3]])
  losses = sharded(4, probs, mask, valid)
  expected = oracles.load_balance(probs, mask, valid)
  oracles.assert_close(losses, np.full(4, expected), 1e-5)


def test_global_statistics_hold_under_shard_map_with_their_gradient():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  probs, mask = draw_case(np.random.default_rng(2))
  valid = np.arange(T) < np.array([[1], [6], [0], [3]])
  loss = jax.shard_map(
    lambda p, m, v: load_balance_loss(p, m, token_mask=v, axis_name="data"),
    mesh=mesh,
    in_specs=PartitionSpec("data"),
    out_specs=PartitionSpec(),
  )
  value, gradient = jax.jit(jax.value_and_grad(loss))(probs, mask, valid)
  whole = lambda p: load_balance_loss(p, mask, token_mask=valid)
  expected = jax.jit(jax.value_and_grad(whole))(probs)
  oracles.assert_close(value, expected[0], 1e-5)
  oracles.assert_close(gradient, expected[1], 2e-5)


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"probs": jnp.ones((B, T))}, "probs"),
    ({"routed_mask": jnp.ones((B, T, E + 1), bool)}, "routed_mask"),
    ({"token_mask": jnp.ones((B, T + 1), bool)}, "token_mask"),
    ({"num_groups": 3}, "num_groups"),
    ({"num_groups": 0}, "num_groups"),
  ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(change, named):
  arguments = {
    "probs": jnp.ones((B, T, E)),
    "routed_mask": jnp.ones((B, T, E), bool),
  }
  with pytest.raises(ValueError, match=f"`{named}`"):
    load_balance_loss(**(arguments | change))
