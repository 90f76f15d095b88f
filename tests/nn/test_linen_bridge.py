"""Linen users: MoH attention through Flax's own bridge.

`nnx.bridge.ToLinen` turns the NNX module into a Linen one, as in the block
below. Its parameters are in "params"; the load-balance loss and the head load
are collections of their own, named after their Variable types, that `apply`
returns when they are mutable.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jaxheads.moh import MoHConfig
from jaxheads.nn import MoHAttention
from tests import oracles

PLAN = MoHConfig(num_heads=4, num_shared=1, top_k=2)
AUX, LOAD = "AuxLoss", "RoutingStats"


class Block(linen.Module):
  """A Linen block with a mixture-of-head attention inside."""

  features: int

  @linen.compact
  def __call__(self, x, *, deterministic):
    attention = nnx.bridge.ToLinen(
      MoHAttention,
      args=(PLAN.num_heads, self.features),
      kwargs={"moh": PLAN, "decode": False},
      name="attention",
    )
    normed = linen.LayerNorm()(x)
    return x + attention(normed, is_causal=True, deterministic=deterministic)


@functools.cache
def start():
  x = np.random.default_rng(0).standard_normal((2, 7, 8)).astype(np.float32)
  block = Block(features=8)
  init = jax.jit(block.init, static_argnames="deterministic")
  variables = init(jax.random.key(0), x, deterministic=True)
  return block, variables, x


def test_init_gives_parameters_and_statistics_as_collections():
  _, variables, _ = start()
  attention = variables["params"]["attention"]
  assert attention["query"]["kernel"].shape == (8, 4, 2)
  assert attention["router_routed"].shape == (8, 3)
  assert variables[AUX]["attention"]["aux_loss"].shape == ()
  assert variables[LOAD]["attention"]["head_load"].shape == (4,)


def test_apply_returns_the_auxiliary_loss_through_mutable_collections():
  block, variables, x = start()

  @jax.jit
  def step(variables, x):
    return block.apply(variables, x, deterministic=False, mutable=[AUX, LOAD])

  out, updates = step(variables, x)
  assert out.shape == x.shape
  assert set(updates) == {AUX, LOAD}
  loss = updates[AUX]["attention"]["aux_loss"]
  load = updates[LOAD]["attention"]["head_load"]
  assert float(loss) > 0
  assert float(load[0]) == 1.0  # shared
  np.testing.assert_allclose(load.sum(), PLAN.num_active, rtol=1e-6)
  # A second step starts from the updated variables.
  out_again, _ = step({**variables, **updates}, x)
  np.testing.assert_array_equal(out_again, out)


def test_apply_without_mutable_collections_is_a_plain_function():
  block, variables, x = start()
  apply = jax.jit(block.apply, static_argnames="deterministic")
  out = apply(variables, x, deterministic=True)
  assert isinstance(out, jax.Array)
  assert out.shape == x.shape


def test_linen_equals_the_nnx_module_with_the_same_parameters():
  block, variables, x = start()
  params = variables["params"]
  module = MoHAttention(
    PLAN.num_heads, 8, moh=PLAN, decode=False, rngs=nnx.Rngs(5)
  )
  for name in ("query", "key", "value", "out"):
    part = getattr(module, name)
    part.kernel[...] = params["attention"][name]["kernel"]
    part.bias[...] = params["attention"][name]["bias"]
  for name in ("router_routed", "router_kind"):
    getattr(module, name)[...] = params["attention"][name]
  normed = linen.LayerNorm().apply({"params": params["LayerNorm_0"]}, x)
  run = nnx.jit(lambda m, x: m(x, is_causal=True, deterministic=True))
  expected = x + run(module, normed)
  apply = jax.jit(block.apply, static_argnames="deterministic")
  actual = apply(variables, x, deterministic=True)
  oracles.assert_close(actual, expected, 1e-5)


def test_gradients_reach_the_routers_of_a_linen_block():
  block, variables, x = start()
  rest = {name: value for name, value in variables.items() if name != "params"}

  @jax.jit
  def gradients(params):
    def loss(params):
      out, updates = block.apply(
        {"params": params, **rest}, x, deterministic=False, mutable=[AUX]
      )
      balance = updates[AUX]["attention"]["aux_loss"]
      return jnp.mean(jnp.square(out)) + 0.01 * balance

    return jax.grad(loss)(params)

  grads = gradients(variables["params"])["attention"]
  for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(gradient).all(), path
  for name in ("router_routed", "router_kind"):
    assert np.abs(grads[name]).max() > 0, name
