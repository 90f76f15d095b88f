"""Routers against the NumPy oracle: who is picked, by which gate, and why."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.moh import (
  MoHConfig,
  RouterParams,
  init_router,
  route,
  route_by_query_norm,
)
from tests import oracles, strategies

# top_k = 1 in the scaled form warns by design; test_config.py checks it.
pytestmark = pytest.mark.filterwarnings("ignore:.*top_k.*:UserWarning")

B, T, D, H = 2, 9, 6, 4
FORMS = ("scaled", "paper")


def make_config(plan, **fields):
  return MoHConfig(
    num_heads=plan.num_heads,
    num_shared=plan.num_shared,
    top_k=plan.top_k,
    **fields,
  )


@functools.cache
def compiled_route(config):
  return jax.jit(
    lambda x, params, valid=None: route(x, params, config, token_mask=valid)
  )


@functools.cache
def compiled_norm_route(config):
  return jax.jit(
    lambda q, valid=None: route_by_query_norm(q, config, token_mask=valid)
  )


def integer_params(rng, plan, width):
  """Router weights as small integers, absent where the paper has none."""

  def table(columns, present):
    if not present:
      return None
    return rng.integers(-2, 3, (width, columns)).astype(np.float32)

  return RouterParams(
    routed=table(plan.num_routed, plan.top_k > 0),
    kind=table(2, plan.top_k > 0 and plan.num_shared > 0),
    shared=table(plan.num_shared, plan.num_shared > 1),
  )


def normal_params(rng, plan, width, scale=1.0):
  params = integer_params(rng, plan, width)
  return jax.tree.map(
    lambda w: (scale * rng.standard_normal(w.shape)).astype(np.float32), params
  )


def normal(rng, *dims):
  return rng.standard_normal(dims).astype(np.float32)


def ids(plan):
  return f"{plan.num_shared}+{plan.top_k}of{plan.num_heads}"


each_plan = pytest.mark.parametrize("plan", strategies.HEAD_PLANS, ids=ids)
each_form = pytest.mark.parametrize("form", FORMS)


# ---------------------------------------------------------------- parameters


@pytest.mark.parametrize(
  ("shared", "top_k", "expected"),
  [
    (2, 4, {"routed": (D, 6), "kind": (D, 2), "shared": (D, 2)}),
    (0, 4, {"routed": (D, 8), "kind": None, "shared": None}),
    (1, 4, {"routed": (D, 7), "kind": (D, 2), "shared": None}),
    (8, 0, {"routed": None, "kind": None, "shared": (D, 8)}),
  ],
)
def test_router_parameters_are_present_where_the_paper_has_them(
  shared, top_k, expected
):
  config = MoHConfig(num_heads=8, num_shared=shared, top_k=top_k)
  params = jax.eval_shape(
    lambda key: init_router(key, config, D), jax.random.key(0)
  )
  for name, shape in expected.items():
    member = getattr(params, name)
    assert (None if member is None else member.shape) == shape, name


def test_router_initialisation_follows_key_stddev_and_dtype():
  config = MoHConfig(num_heads=64, num_shared=8, top_k=8)
  draw = jax.jit(lambda key: init_router(key, config, 256))
  params = draw(jax.random.key(0))
  assert params.routed.dtype == jnp.float32
  assert np.std(params.routed) == pytest.approx(0.02, rel=0.15)
  again, other = draw(jax.random.key(0)), draw(jax.random.key(1))
  np.testing.assert_array_equal(params.routed, again.routed)
  assert not np.array_equal(params.routed, other.routed)
  # The three maps are drawn independently.
  assert not np.array_equal(params.routed[:, :8], params.shared)
  wide = jax.jit(
    lambda key: init_router(key, config, 256, stddev=0.5, dtype=jnp.bfloat16)
  )(jax.random.key(0))
  assert wide.kind.dtype == jnp.bfloat16
  spread = np.std(np.asarray(wide.routed.astype(jnp.float32)))
  assert spread == pytest.approx(0.5, rel=0.15)


# ----------------------------------------------------------------- selection


@each_plan
@strategies.sweep(15)
@hypothesis.given(data=st.data())
def test_selection_equals_the_oracle_with_exact_ties(plan, data):
  x, valid, rng = data.draw(strategies.integer_tokens(B, T, D))
  params = integer_params(rng, plan, D)
  routing = compiled_route(make_config(plan))(x, params, valid)
  logits = np.asarray(x, np.float64) @ params.routed
  expected = oracles.select(logits, plan.top_k, valid)
  routed = np.asarray(routing.mask)[..., plan.num_shared :]
  np.testing.assert_array_equal(routed, expected)
  shared = np.asarray(routing.mask)[..., : plan.num_shared]
  np.testing.assert_array_equal(
    shared, np.broadcast_to(valid[..., None], shared.shape)
  )


@each_plan
@strategies.sweep(15)
@hypothesis.given(data=st.data())
def test_query_norm_selection_equals_the_oracle_with_exact_ties(plan, data):
  flat, valid, _ = data.draw(
    strategies.integer_tokens(B, T, plan.num_heads * H)
  )
  q = flat.reshape(B, T, plan.num_heads, H)
  config = make_config(plan, router="query_norm")
  routing = compiled_norm_route(config)(q, valid)
  norms = oracles.query_norms(q)[..., plan.num_shared :]
  expected = oracles.select(norms, plan.top_k, valid)
  routed = np.asarray(routing.mask)[..., plan.num_shared :]
  np.testing.assert_array_equal(routed, expected)


def test_equal_logits_pick_the_lowest_indices():
  config = MoHConfig(num_heads=8, num_shared=2, top_k=3)
  params = RouterParams(
    routed=jnp.zeros((D, 6)), kind=jnp.zeros((D, 2)), shared=jnp.zeros((D, 2))
  )
  x = normal(np.random.default_rng(0), B, T, D)
  mask = compiled_route(config)(x, params).mask
  np.testing.assert_array_equal(
    mask, np.broadcast_to([True] * 5 + [False] * 3, (B, T, 8))
  )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_query_norms_pick_the_lowest_indices_without_nan(value):
  config = MoHConfig(num_heads=8, num_shared=2, top_k=3, router="query_norm")
  q = np.full((B, T, 8, H), value, np.float32)

  def total(q):
    routing = compiled_norm_route(config)(q)
    return jnp.sum(routing.gates * jnp.arange(8.0)[None, None]), routing

  (_, routing), dq = jax.jit(jax.value_and_grad(total, has_aux=True))(q)
  np.testing.assert_array_equal(
    routing.mask, np.broadcast_to([True] * 5 + [False] * 3, (B, T, 8))
  )
  assert np.isfinite(routing.probs).all()
  assert np.isfinite(dq).all()


def test_one_routed_head_has_finite_query_norm_scores():
  # The unbiased deviation of one number is 0 / 0.
  config = MoHConfig(num_heads=3, num_shared=2, top_k=1, router="query_norm")
  q = normal(np.random.default_rng(0), B, T, 3, H)

  def total(q):
    routing = compiled_norm_route(config)(q)
    return jnp.sum(routing.gates), routing

  (_, routing), dq = jax.jit(jax.value_and_grad(total, has_aux=True))(q)
  assert np.asarray(routing.mask).all()
  np.testing.assert_array_equal(routing.gates, np.ones((B, T, 3)))
  np.testing.assert_allclose(routing.probs, np.ones((B, T, 1)), atol=1e-6)
  assert np.isfinite(dq).all()


def test_selection_is_by_logits_where_probabilities_underflow():
  # p = (1, 0, 0, 0) in float32: the second pick is visible in logits only.
  logits = [200.0, -2.0, 0.0, -1.0]
  config = MoHConfig(num_heads=4, num_shared=0, top_k=2)
  params = RouterParams(routed=jnp.asarray([logits]), kind=None, shared=None)
  routing = route(jnp.ones((1, 1, 1)), params, config)
  np.testing.assert_array_equal(routing.mask[0, 0], [True, False, True, False])
  assert np.isfinite(routing.gates).all()


def test_query_norm_selection_is_by_norm_where_probabilities_underflow():
  config = MoHConfig(num_heads=4, num_shared=0, top_k=2, router="query_norm")
  q = np.array([1e6, 1.0, 3.0, 2.0], np.float32).reshape(1, 1, 4, 1)
  routing = compiled_norm_route(config)(q)
  np.testing.assert_array_equal(routing.mask[0, 0], [True, False, True, False])


def test_selection_is_in_float32_whatever_the_activations_are():
  # Two logits that bfloat16 cannot tell apart: 1 + 2**-9 rounds to 1.
  config = MoHConfig(num_heads=2, num_shared=0, top_k=1, gates="paper")
  x = jnp.ones((1, 1, 2), jnp.bfloat16)
  routed = jnp.asarray([[1.0, 1.0], [0.0, 2.0**-9]], jnp.bfloat16)
  params = RouterParams(routed=routed, kind=None, shared=None)
  routing = compiled_route(config)(x, params)
  np.testing.assert_array_equal(routing.mask[0, 0], [False, True])
  # 16 ** 2 + 1 rounds to 16 ** 2 in bfloat16.
  q = jnp.asarray([[16.0, 0.0], [16.0, 1.0]], jnp.bfloat16)[None, None]
  norm = MoHConfig(num_heads=2, num_shared=0, top_k=1, router="query_norm")
  routing = route_by_query_norm(q, norm)
  np.testing.assert_array_equal(routing.mask[0, 0], [False, True])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_routing_is_float32_whatever_the_activations_are(dtype):
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  x = jnp.asarray(normal(rng, B, T, D), dtype)
  two_stage = compiled_route(make_config(plan))(x, normal_params(rng, plan, D))
  q = jnp.asarray(normal(rng, B, T, 8, H), dtype)
  by_norm = compiled_norm_route(make_config(plan, router="query_norm"))(q)
  for routing in (two_stage, by_norm):
    assert routing.mask.dtype == jnp.bool_
    assert routing.gates.dtype == jnp.float32
    assert routing.probs.dtype == jnp.float32
    assert routing.mask.shape == routing.gates.shape == (B, T, 8)
    assert routing.probs.shape == (B, T, 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_activations_still_pick_exactly_top_k_heads(bad):
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  x = normal(rng, B, T, D)
  x[0, 3, 2] = bad
  x[1, 0] = bad
  q = normal(rng, B, T, 8, H)
  q[0, 3, 5, 1] = bad
  q[1, 0] = bad
  params = normal_params(rng, plan, D)
  masks = (
    compiled_route(make_config(plan))(x, params).mask,
    compiled_norm_route(make_config(plan, router="query_norm"))(q).mask,
  )
  for mask in masks:
    mask = np.asarray(mask)
    assert mask[..., : plan.num_shared].all()
    np.testing.assert_array_equal(
      mask[..., plan.num_shared :].sum(axis=-1), np.full((B, T), plan.top_k)
    )


def test_a_bad_token_does_not_change_its_neighbours():
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  clean = compiled_route(make_config(plan))(x, params)
  x[0, 3] = np.nan
  dirty = compiled_route(make_config(plan))(x, params)
  others = np.ones((B, T), bool)
  others[0, 3] = False
  np.testing.assert_array_equal(
    np.asarray(dirty.gates)[others], np.asarray(clean.gates)[others]
  )


# -------------------------------------------------------------------- groups


GROUPED = (
  strategies.HeadPlan(num_heads=8, num_shared=4, top_k=2),
  strategies.HeadPlan(num_heads=12, num_shared=4, top_k=4),
  strategies.HeadPlan(num_heads=8, num_shared=0, top_k=8),
)


@pytest.mark.parametrize("plan", GROUPED, ids=ids)
@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
@strategies.sweep(8)
@hypothesis.given(data=st.data())
def test_groups_are_picked_whole(plan, router, data):
  x, valid, rng = data.draw(strategies.integer_tokens(B, T, D))
  config = make_config(plan, router=router, group_size=2)
  if router == "two_stage":
    params = integer_params(rng, plan, D)
    scores = np.asarray(x, np.float64) @ params.routed
    routing = compiled_route(config)(x, params, valid)
  else:
    q = rng.integers(-2, 3, (B, T, plan.num_heads, H)).astype(np.float32)
    scores = oracles.query_norms(q)[..., plan.num_shared :]
    routing = compiled_norm_route(config)(q, valid)
  mask = np.asarray(routing.mask)[..., plan.num_shared :]
  pairs = mask.reshape(B, T, -1, 2)
  np.testing.assert_array_equal(pairs[..., 0], pairs[..., 1])
  counts = mask.sum(axis=-1)
  np.testing.assert_array_equal(counts, np.where(valid, plan.top_k, 0))
  # However a group is scored, one that is better in every head goes first.
  scores = scores.reshape(B, T, -1, 2)
  for b, t in zip(*np.nonzero(valid), strict=True):
    low, high = scores[b, t].min(axis=-1), scores[b, t].max(axis=-1)
    for i, j in np.ndindex(len(low), len(low)):
      if low[i] > high[j]:
        assert pairs[b, t, i, 0] >= pairs[b, t, j, 0], (b, t, i, j)


def test_equal_groups_are_picked_lowest_first():
  config = MoHConfig(num_heads=8, num_shared=2, top_k=4, group_size=2)
  params = RouterParams(
    routed=jnp.zeros((D, 6)), kind=jnp.zeros((D, 2)), shared=jnp.zeros((D, 2))
  )
  mask = route(jnp.ones((1, 1, D)), params, config).mask
  np.testing.assert_array_equal(mask[0, 0], [True] * 6 + [False] * 2)


# --------------------------------------------------------------------- gates


@each_plan
@each_form
@strategies.sweep(6)
@hypothesis.given(data=st.data())
def test_two_stage_gates_equal_the_oracle(plan, form, data):
  x, valid, rng = data.draw(strategies.integer_tokens(B, T, D))
  x = x + normal(rng, B, T, D)
  x[~valid] = strategies.HUGE
  params = normal_params(rng, plan, D, scale=0.5)
  routing = compiled_route(make_config(plan, gates=form))(x, params, valid)
  mask = np.asarray(routing.mask)
  gates, probs = oracles.two_stage_gates(
    x,
    *params,
    num_shared=plan.num_shared,
    top_k=plan.top_k,
    form=form,
    routed_mask=mask[..., plan.num_shared :],
  )
  oracles.assert_close(routing.gates, gates, 1e-5, "gates")
  oracles.assert_close(
    np.asarray(routing.probs)[valid], probs[valid], 1e-5, "probs"
  )


@each_form
@pytest.mark.parametrize("plan", GROUPED[:2], ids=ids)
def test_gates_of_heads_picked_in_groups_equal_the_oracle(plan, form):
  # A group decides who is on; each head keeps a weight of its own.
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  config = make_config(plan, gates=form, group_size=2)
  routing = compiled_route(config)(x, params)
  gates, probs = oracles.two_stage_gates(
    x,
    *params,
    num_shared=plan.num_shared,
    top_k=plan.top_k,
    form=form,
    routed_mask=np.asarray(routing.mask)[..., plan.num_shared :],
  )
  oracles.assert_close(routing.gates, gates, 1e-5, "gates")
  oracles.assert_close(routing.probs, probs, 1e-5, "probs")


@each_form
def test_all_shared_gates_equal_the_oracle(form):
  plan = strategies.ALL_SHARED
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  routing = compiled_route(make_config(plan, gates=form))(x, params)
  gates, _ = oracles.two_stage_gates(
    x,
    *params,
    num_shared=5,
    top_k=0,
    form=form,
    routed_mask=np.zeros((B, T, 0), bool),
  )
  assert routing.probs.shape == (B, T, 0)
  assert np.asarray(routing.mask).all()
  oracles.assert_close(routing.gates, gates, 1e-5)
  # Gated, hence not plain multi-head attention.
  assert np.abs(gates - 1).max() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_a_single_shared_head_without_routing_has_gate_one(form):
  config = MoHConfig(num_heads=1, num_shared=1, top_k=0, gates=form)
  params = init_router(jax.random.key(0), config, D)
  assert params == RouterParams(routed=None, kind=None, shared=None)
  routing = route(jnp.ones((B, T, D)), params, config)
  np.testing.assert_array_equal(routing.gates, np.ones((B, T, 1)))


@pytest.mark.parametrize("shared", [0, 1, 3, 11, 22, 32])
def test_neutral_routers_with_every_head_picked_give_gates_of_exactly_one(
  shared,
):
  num_heads = shared + 4
  config = MoHConfig(num_heads=num_heads, num_shared=shared, top_k=4)
  params = init_router(jax.random.key(0), config, D, stddev=0.0)
  x = normal(np.random.default_rng(0), B, T, D)
  gates = compiled_route(config)(x, params).gates
  np.testing.assert_array_equal(gates, np.ones((B, T, num_heads)))


@each_plan
def test_gates_are_exactly_zero_for_heads_not_picked_and_positive_else(plan):
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  q = normal(rng, B, T, plan.num_heads, H)
  for routing in (
    compiled_route(make_config(plan))(x, params),
    compiled_route(make_config(plan, gates="paper"))(x, params),
    compiled_norm_route(make_config(plan, router="query_norm"))(q),
  ):
    mask, gates = np.asarray(routing.mask), np.asarray(routing.gates)
    np.testing.assert_array_equal(gates[~mask], 0.0)
    assert (gates[mask] > 0).all()


def test_scaled_gates_sum_to_their_share_of_alpha():
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  gates = np.asarray(compiled_route(make_config(plan))(x, params).gates)
  alpha = oracles.softmax(np.asarray(x, np.float64) @ params.kind)
  oracles.assert_close(gates[..., :2].sum(axis=-1), 2 * 2 * alpha[..., 0], 1e-5)
  oracles.assert_close(gates[..., 2:].sum(axis=-1), 2 * 4 * alpha[..., 1], 1e-5)


def test_scaled_routed_gates_are_the_papers_after_dividing_by_picked_mass():
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  scaled = compiled_route(make_config(plan))(x, params)
  paper = compiled_route(make_config(plan, gates="paper"))(x, params)
  np.testing.assert_array_equal(scaled.mask, paper.mask)
  probs = np.asarray(paper.probs, np.float64)
  picked = np.asarray(paper.mask)[..., 2:]
  mass = (probs * picked).sum(axis=-1, keepdims=True)
  expected = 2 * plan.top_k * np.asarray(paper.gates)[..., 2:] / mass
  oracles.assert_close(scaled.gates[..., 2:], expected, 1e-5)


@each_plan
def test_probabilities_are_a_softmax_over_all_routed_heads(plan):
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  probs = np.asarray(compiled_route(make_config(plan))(x, params).probs)
  assert probs.shape == (B, T, plan.num_routed)
  oracles.assert_close(probs.sum(axis=-1), np.ones((B, T)), 1e-5)


def test_query_norm_gates_are_the_mask_bit_for_bit():
  plan = strategies.HEAD_PLANS[0]
  q = normal(np.random.default_rng(0), B, T, 8, H)
  for mode in ("selected", "dense"):
    config = make_config(plan, router="query_norm", straight_through=mode)
    routing = compiled_norm_route(config)(q)
    mask, gates = np.asarray(routing.mask), np.asarray(routing.gates)
    assert gates.tobytes() == mask.astype(np.float32).tobytes(), mode


def test_query_norm_probs_divide_by_the_unbiased_deviation():
  plan = strategies.HEAD_PLANS[0]
  q = normal(np.random.default_rng(0), B, T, 8, H)
  routing = compiled_norm_route(make_config(plan, router="query_norm"))(q)
  oracles.assert_close(
    routing.probs, oracles.query_norm_probs(q, plan.num_shared), 1e-5
  )


def test_query_norm_with_every_head_picked_is_plain_attention():
  plan = strategies.HEAD_PLANS[3]
  q = normal(np.random.default_rng(0), B, T, 5, H)
  routing = compiled_norm_route(make_config(plan, router="query_norm"))(q)
  np.testing.assert_array_equal(routing.gates, np.ones((B, T, 5)))


# ----------------------------------------------------------------- gradients


def gate_gradients(x, params, config, weights):
  def total(x, params):
    gates = compiled_route(config)(x, params).gates
    return jnp.sum(gates * weights)

  return jax.jit(jax.grad(total, argnums=(0, 1)))(x, params)


@each_plan
@each_form
def test_gate_gradients_equal_finite_differences_of_the_oracle(plan, form):
  rng = np.random.default_rng(3)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  config = make_config(plan, gates=form)
  weights = normal(rng, B, T, plan.num_heads)
  mask = np.asarray(compiled_route(config)(x, params).mask)

  def oracle(x, params):
    gates, _ = oracles.two_stage_gates(
      x,
      *params,
      num_shared=plan.num_shared,
      top_k=plan.top_k,
      form=form,
      routed_mask=mask[..., plan.num_shared :],
    )
    return float((gates * weights).sum())

  dx, dparams = gate_gradients(x, params, config, weights)
  for _ in range(3):
    direction = rng.standard_normal(x.shape)
    expected = oracles.directional_derivative(
      lambda value: oracle(value, params), x, direction
    )
    actual = float((np.asarray(dx, np.float64) * direction).sum())
    assert actual == pytest.approx(expected, rel=1e-4, abs=2e-4), "x"
  for name in RouterParams._fields:
    table, gradient = getattr(params, name), getattr(dparams, name)
    if table is None:
      assert gradient is None
      continue
    scale = float(np.abs(np.asarray(gradient)).max())
    for column in range(table.shape[1]):
      direction = np.zeros(table.shape)
      direction[:, column] = rng.standard_normal(table.shape[0])
      expected = oracles.directional_derivative(
        lambda value, name=name: oracle(x, params._replace(**{name: value})),
        table,
        direction,
      )
      actual = float((np.asarray(gradient, np.float64) * direction).sum())
      assert actual == pytest.approx(
        expected, rel=2e-5, abs=2e-5 * scale + 1e-6
      ), (
        name,
        column,
      )


def logit_gradient(form, num_heads=6, num_shared=2, top_k=3):
  """Gradient of a task by each routed logit of a single token."""
  config = MoHConfig(
    num_heads=num_heads, num_shared=num_shared, top_k=top_k, gates=form
  )
  rng = np.random.default_rng(0)
  num_routed = num_heads - num_shared
  # x = (1,): the routed table is the logits.
  params = normal_params(
    rng,
    strategies.HeadPlan(
      num_heads=num_heads, num_shared=num_shared, top_k=top_k
    ),
    1,
  )
  weights = normal(rng, 1, 1, num_heads)
  _, dparams = gate_gradients(
    np.ones((1, 1, 1), np.float32), params, config, weights
  )
  mask = np.asarray(route(np.ones((1, 1, 1), np.float32), params, config).mask)
  picked = mask[0, 0, num_shared:]
  assert picked.sum() == top_k < num_routed
  return np.asarray(dparams.routed)[0], picked


def test_scaled_form_gives_unpicked_logits_no_task_gradient():
  gradient, picked = logit_gradient("scaled")
  np.testing.assert_array_equal(gradient[~picked], 0.0)
  assert (np.abs(gradient[picked]) > 1e-4).all()


def test_paper_form_gives_unpicked_logits_a_task_gradient():
  gradient, picked = logit_gradient("paper")
  assert (np.abs(gradient) > 1e-5).all()
  assert not picked.all()


def test_top_1_scaled_gives_the_router_a_task_gradient_of_exactly_zero():
  gradient, _ = logit_gradient("scaled", top_k=1)
  np.testing.assert_array_equal(gradient, 0.0)


def test_top_1_paper_gives_the_router_a_task_gradient():
  gradient, picked = logit_gradient("paper", top_k=1)
  assert np.abs(gradient[picked]).max() > 1e-4


@pytest.mark.parametrize("mode", ["selected", "dense"])
def test_straight_through_hands_the_gradient_to_the_scores(mode):
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  q = normal(rng, B, T, 8, H)
  config = make_config(plan, router="query_norm", straight_through=mode)
  weights = normal(rng, B, T, 8)
  mask = np.asarray(compiled_norm_route(config)(q).mask)[..., plan.num_shared :]
  reach = mask if mode == "selected" else np.ones_like(mask)
  routed_weights = weights[..., plan.num_shared :] * reach

  def total(q):
    return jnp.sum(compiled_norm_route(config)(q).gates * weights)

  dq = np.asarray(jax.jit(jax.grad(total))(q), np.float64)
  np.testing.assert_array_equal(dq[..., : plan.num_shared, :], 0.0)
  for _ in range(5):
    direction = rng.standard_normal(q.shape)
    expected = oracles.directional_derivative(
      lambda value: float(
        (
          oracles.query_norm_probs(value, plan.num_shared) * routed_weights
        ).sum()
      ),
      q,
      direction,
    )
    actual = float((dq * direction).sum())
    assert actual == pytest.approx(expected, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("router", ["two_stage", "query_norm"])
def test_padding_gets_no_head_no_gate_and_no_gradient(router):
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  valid = np.arange(T) < np.array([[T], [4]])
  config = make_config(plan, router=router)
  weights = normal(rng, B, T, 8)
  params = normal_params(rng, plan, D)
  if router == "two_stage":
    inputs = normal(rng, B, T, D)
    fn = lambda inputs: route(inputs, params, config, token_mask=valid)
  else:
    inputs = normal(rng, B, T, 8, H)
    fn = lambda inputs: route_by_query_norm(inputs, config, token_mask=valid)
  inputs[~valid] = strategies.HUGE
  fn = jax.jit(fn)
  routing = fn(inputs)
  assert not np.asarray(routing.mask)[~valid].any()
  np.testing.assert_array_equal(np.asarray(routing.gates)[~valid], 0.0)
  gradient = jax.jit(
    jax.grad(lambda inputs: jnp.sum(fn(inputs).gates * weights))
  )(inputs)
  np.testing.assert_array_equal(np.asarray(gradient)[~valid], 0.0)
  # The valid tokens do not notice.
  inputs[~valid] = 0.0
  np.testing.assert_array_equal(
    np.asarray(fn(inputs).gates)[valid], np.asarray(routing.gates)[valid]
  )


def test_no_token_mask_means_every_token_is_valid():
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  bare = compiled_route(make_config(plan))(x, params)
  full = compiled_route(make_config(plan))(x, params, np.ones((B, T), bool))
  for a, b in zip(bare, full, strict=True):
    np.testing.assert_array_equal(a, b)


def test_every_token_is_routed_on_its_own():
  plan = strategies.HEAD_PLANS[0]
  rng = np.random.default_rng(0)
  x, params = normal(rng, B, T, D), normal_params(rng, plan, D)
  whole = compiled_route(make_config(plan))(x, params)
  one = compiled_route(make_config(plan))(x[1:, 4:5], params)
  np.testing.assert_array_equal(one.mask[0, 0], whole.mask[1, 4])
  oracles.assert_close(one.gates[0, 0], whole.gates[1, 4], 1e-5)


# ----------------------------------------------------------------- bad input


def test_two_stage_refuses_inputs_that_do_not_fit():
  plan = strategies.HEAD_PLANS[0]
  config = make_config(plan)
  params = init_router(jax.random.key(0), config, D)
  x = jnp.ones((B, T, D))
  with pytest.raises(ValueError, match="`x`|`params"):
    route(jnp.ones((B, T, D + 1)), params, config)
  with pytest.raises(ValueError, match="`x`"):
    route(jnp.ones((B, D)), params, config)
  with pytest.raises(ValueError, match="`token_mask`"):
    route(x, params, config, token_mask=jnp.ones((B, T + 1), bool))
  with pytest.raises(ValueError, match="params"):
    route(x, params._replace(kind=None), config)
  with pytest.raises(ValueError, match="params"):
    route(x, params._replace(routed=jnp.ones((D, 5))), config)
  with pytest.raises(ValueError, match="router"):
    route(x, params, make_config(plan, router="query_norm"))


def test_query_norm_refuses_inputs_that_do_not_fit():
  plan = strategies.HEAD_PLANS[0]
  config = make_config(plan, router="query_norm")
  with pytest.raises(ValueError, match="`q`"):
    route_by_query_norm(jnp.ones((B, T, 7, H)), config)
  with pytest.raises(ValueError, match="`q`"):
    route_by_query_norm(jnp.ones((B, T, 8 * H)), config)
  with pytest.raises(ValueError, match="`token_mask`"):
    route_by_query_norm(
      jnp.ones((B, T, 8, H)), config, token_mask=jnp.ones((B,), bool)
    )
  with pytest.raises(ValueError, match="router"):
    route_by_query_norm(jnp.ones((B, T, 8, H)), make_config(plan))


def test_init_router_refuses_a_width_below_one():
  with pytest.raises(ValueError, match="`embed_dim`"):
    init_router(jax.random.key(0), make_config(strategies.HEAD_PLANS[0]), 0)
