"""Values that no router makes: told outside of jit, harmless under it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.extend.core import jaxprs_in_params

from jaxheads.checks import value_checks
from jaxheads.moh import (
  MoHConfig,
  RouterParams,
  Routing,
  moh_attention,
  route,
  route_by_query_norm,
)
from jaxheads.rope import apply_rope
from tests import s2_cases

B, T, N, K, H, D = 2, 7, 4, 2, 4, 6
ACTIVE = 2
BIG = 2**31 - 1


def arguments(seed=0):
  """Arrays of one layer, all of them allowed."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  mask = np.zeros((B, T, N), bool)
  picked = rng.permuted(np.broadcast_to(np.arange(N), mask.shape), axis=-1)
  np.put_along_axis(mask, picked[..., :ACTIVE], True, axis=-1)
  return {
    "x": normal(B, T, D),
    "k": normal(B, T, K, H),
    "v": normal(B, T, K, H),
    "w_q": normal(D, N, H),
    "w_o": normal(N, H, D),
    "mask": jnp.asarray(mask),
    "gates": jnp.asarray(mask * rng.uniform(0.1, 2.0, mask.shape), jnp.float32),
    "q_positions": jnp.tile(jnp.arange(T), (B, 1)),
    "q_offset": jnp.int32(0),
  }


def layer(
  arrays, execution="dispatch", pattern=None, implementation="reference"
):
  given = dict(arrays)
  x, k, v = (given.pop(name) for name in ("x", "k", "v"))
  mask, gates = given.pop("mask"), given.pop("gates")
  return moh_attention(
    x,
    k,
    v,
    routing=Routing(mask, gates, jnp.zeros((B, T, 0))),
    num_active=ACTIVE,
    rope_theta=100.0,
    is_causal=True,
    execution=execution,
    implementation=implementation,
    pattern=pattern,
    **given,
  )


def off(arrays):
  """Index of the first pair that is not active."""
  return tuple(int(i) for i in np.argwhere(~np.asarray(arrays["mask"]))[0])


def spoil(arrays, name, index, value):
  return arrays | {name: arrays[name].at[index].set(value)}


BAD = {
  "gate is NaN": ("gates", (1, 3, 0), np.nan, "finite and not negative"),
  "gate is infinite": ("gates", (1, 3, 0), np.inf, "finite and not negative"),
  "gate is negative": ("gates", (0, 2, 1), -0.25, "finite and not negative"),
  "gate of a head that is off": ("gates", off, 0.5, "`routing.mask` is False"),
  "too many heads": ("mask", (1, 5), True, "at most `num_active` = 2"),
  "position too far": ("q_positions", (1, 2), BIG, "be in [-16777216, "),
  "position too far back": ("q_positions", (1, 2), -BIG - 1, "16777216], got"),
  "offset too far": ("q_offset", (), 2**30, "be in [-536870912, 536870905]"),
}


@functools.cache
def checked(execution):
  run = jax.jit(functools.partial(layer, execution=execution))
  return checkify.checkify(run, errors=checkify.user_checks)


@pytest.mark.parametrize(
  ("execution", "name"),
  [("dispatch", name) for name in BAD] + [("dense", "gate is NaN")],
)
def test_a_bad_value_is_told_with_its_argument_and_index(execution, name):
  good = arguments()
  argument, index, value, allowed = BAD[name]
  index = index(good) if callable(index) else index
  bad = spoil(good, argument, index, value)
  with pytest.raises(ValueError, match=re.escape(allowed)) as told:
    layer(bad, execution)
  message = str(told.value)
  full = argument if argument.startswith("q_") else f"routing.{argument}"
  assert message.startswith(f"`{full}` must ")
  assert allowed in message
  assert message.endswith(f" at {list(index)}." if index else f"got {value}.")
  # Under jit, on request, the same words.
  with value_checks():
    error, _ = checked(execution)(bad)
    assert error.get().startswith(message)
    error, out = checked(execution)(good)
  assert error.get() is None
  # And what was compiled without the checks stays without them.
  assert np.isfinite(out).all()


def test_the_checks_leave_no_trace_under_jit():
  def primitives(jaxpr):
    for equation in jaxpr.eqns:
      yield equation.primitive.name
      for inner in jaxprs_in_params(equation.params):
        yield from primitives(inner)

  arrays = arguments()
  # A function each: tracing is cached.
  plain = jax.make_jaxpr(lambda x: layer(x))(arrays)
  with value_checks():
    checks = jax.make_jaxpr(lambda x: layer(x))(arrays)
  assert "check" not in set(primitives(plain.jaxpr))
  assert "check" in set(primitives(checks.jaxpr))
  assert plain.effects == set()


def test_several_devices_are_checked_too():
  mesh = jax.make_mesh(
    (2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  bad = spoil(arguments(), "gates", (1, 4, 2), -1.0)
  checked = checkify.checkify(jax.jit(layer), errors=checkify.user_checks)
  with jax.set_mesh(mesh), value_checks():
    error, _ = checked(bad)
  assert "got -1.0 at [1, 4, 2]" in error.get()


def test_gradients_can_be_checked_too():
  bad = spoil(arguments(), "gates", (0, 4, 2), -1.0)

  @functools.partial(checkify.checkify, errors=checkify.user_checks)
  @jax.jit
  @jax.grad
  def gradient(gates):
    return layer(bad | {"gates": gates}).sum()

  with value_checks():
    error, _ = gradient(bad["gates"])
  with pytest.raises(Exception, match="`routing.gates` .* -1.0 at .0, 4, 2."):
    error.throw()


def test_layers_in_a_scan_are_checked():
  bad = spoil(arguments(), "gates", (0, 4, 2), -1.0)

  @functools.partial(checkify.checkify, errors=checkify.user_checks)
  @jax.jit
  def loss(gates):
    def step(total, gates):
      return total + layer(bad | {"gates": gates}).sum(), None

    return jax.lax.scan(step, 0.0, gates[None])[0]

  with value_checks():
    error, _ = loss(bad["gates"])
  assert "got -1.0 at [0, 4, 2]" in error.get()


def test_an_offset_beyond_the_patterns_table_is_told_in_both_executions():
  pattern = s2_cases.random_blocks(N, reach=4).pattern  # 32 tokens.
  arrays = arguments() | {"q_offset": jnp.int32(26)}
  for execution in ("dense", "dispatch"):
    with pytest.raises(
      ValueError, match="`q_offset` must .* 25. for 7 queries"
    ):
      layer(arrays, execution, pattern)
    with pytest.raises(ValueError, match="covers 32 query tokens"):
      layer(arrays | {"q_offset": 26}, execution, pattern)
    with pytest.raises(ValueError, match="`pattern` is for 2 query heads"):
      layer(arrays, execution, s2_cases.strided(2).pattern)


def test_a_mask_must_be_bool():
  arrays = arguments()
  with pytest.raises(TypeError, match="`routing.mask` must be bool, got int32"):
    layer(arrays | {"mask": arrays["mask"].astype(jnp.int32)})


def test_routers_refuse_what_is_not_finite_but_in_padding():
  config = MoHConfig(num_heads=N, num_shared=1, top_k=2)
  params = RouterParams(jnp.ones((D, 3)), jnp.ones((D, 2)), None)
  x = jnp.ones((B, T, D)).at[1, 2, 3].set(jnp.inf)
  real = jnp.ones((B, T), bool)
  with pytest.raises(ValueError, match=r"`x` must be .* inf at \[1, 2, 3\]"):
    route(x, params, config, token_mask=real)
  route(x, params, config, token_mask=real.at[1, 2].set(False))
  by_norm = MoHConfig(num_heads=N, num_shared=1, top_k=2, router="query_norm")
  q = jnp.ones((B, T, N, H)).at[0, 1, 2, 3].set(jnp.nan)
  with pytest.raises(ValueError, match=r"`q` must be .* nan at \[0, 1, 2, 3\]"):
    route_by_query_norm(q, by_norm)
  route_by_query_norm(q, by_norm, token_mask=real.at[0, 1].set(False))


def test_positions_may_be_negative_and_in_any_order_but_not_too_far():
  x = jnp.ones((1, 3, 2, 4))
  apply_rope(x, jnp.asarray([[5, -1, 5]]))
  with pytest.raises(ValueError, match=r"`positions` must .* at \[0, 1\]"):
    apply_rope(x, jnp.asarray([[5, 2**24 + 1, 5]]))


# ------------------------------------------------- under jit, without checks


@functools.partial(jax.jit, static_argnums=1)
def run(arrays, execution):
  return layer(arrays, execution, implementation=None)


@pytest.mark.parametrize("execution", ["dense", "dispatch"])
@pytest.mark.parametrize(
  ("name", "at", "value"),
  [
    ("gates", (1, 3), np.nan),
    ("gates", (1, 3), -np.inf),
    ("q_positions", (1, 3), BIG),
    ("q_positions", (1, 3), -BIG - 1),
    ("x", (1, 3), np.nan),
  ],
)
def test_a_bad_value_spoils_its_own_token_only(execution, name, at, value):
  good = arguments()
  expected = run(good, execution)
  got = run(spoil(good, name, at, value), execution)
  others = np.ones((B, T), bool)
  others[at] = False
  np.testing.assert_array_equal(got[others], expected[others])
  assert not np.array_equal(got[at], expected[at])


@pytest.mark.parametrize("offset", [BIG, 2**29, T, -T, -(2**30), -BIG - 1])
def test_any_offset_gives_finite_numbers(offset):
  arrays = arguments() | {"q_offset": jnp.int32(offset)}
  assert np.isfinite(run(arrays, "dispatch")).all()
