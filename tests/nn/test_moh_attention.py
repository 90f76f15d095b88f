"""The Flax module: drops in for nnx.MultiHeadAttention, and routes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxheads.moh import MoHConfig
from jaxheads.nn import AuxLoss, MoHAttention, RoutingStats, auxiliary_loss
from pallas_kernels import platform
from tests import oracles, strategies

B, T, N, H, D = 2, 9, 8, 4, 12
FORWARD, GRADIENT = 1e-5, 2e-5

PLAN = MoHConfig(num_heads=N, num_shared=2, top_k=4)
PAPER = MoHConfig(num_heads=N, num_shared=2, top_k=4, gates="paper")
BY_NORM = MoHConfig(num_heads=N, num_shared=2, top_k=4, router="query_norm")
EVERY_HEAD = MoHConfig(num_heads=N, num_shared=1, top_k=7)
ALL_SHARED = MoHConfig(num_heads=N, num_shared=N, top_k=0)
ROUTERS = ("router_routed", "router_kind", "router_shared")


def normal(*dims, seed=0):
  return np.random.default_rng(seed).standard_normal(dims).astype(np.float32)


def make(moh, *, seed=0, spread=True, **options):
  """A module; `spread` widens the routers so that selections differ."""
  options = {"qkv_features": N * H, "decode": False} | options
  module = MoHAttention(N, D, moh=moh, rngs=nnx.Rngs(seed), **options)
  if spread:
    for i, name in enumerate(ROUTERS):
      table = getattr(module, name, None)
      if isinstance(table, nnx.Param):
        table[...] = 0.5 * normal(*table.shape, seed=100 + i)
  return module


@functools.partial(nnx.jit, static_argnames=("options",))
def _call(module, inputs, arrays, options):
  return module(*inputs, **arrays, **dict(options))


def call(module, *inputs, **keywords):
  """The module under `nnx.jit`; flags static, arrays traced."""
  flags = {
    k: v for k, v in keywords.items() if v is None or isinstance(v, bool)
  }
  arrays = {k: v for k, v in keywords.items() if k not in flags}
  return _call(module, inputs, arrays, tuple(sorted(flags.items())))


# -------------------------------------- parity with nnx.MultiHeadAttention


def flax_twin(module_options, seed=1):
  options = {"qkv_features": N * H, "decode": False} | module_options
  twin = nnx.MultiHeadAttention(N, D, rngs=nnx.Rngs(seed), **options)
  # Biases and scales start at 0 and 1, where a mistake would not show.
  state = nnx.state(twin, nnx.Param)
  leaves, tree = jax.tree.flatten(state)
  leaves = [
    leaf + 0.1 * normal(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)
  ]
  nnx.update(twin, jax.tree.unflatten(tree, leaves))
  return twin


def zero_routers(module):
  for name in ROUTERS:
    table = getattr(module, name, None)
    if isinstance(table, nnx.Param):
      table[...] = jnp.zeros(table.shape, table.dtype)


OPTIONS = (
  {},
  {"use_bias": False},
  {"num_kv_heads": 2},
  {"num_kv_heads": 1, "out_features": 7},
  {"normalize_qk": True},
)


@pytest.mark.parametrize(
  ("moh", "options"),
  [(None, options) for options in OPTIONS]
  + [(EVERY_HEAD, {}), (EVERY_HEAD, {"num_kv_heads": 2})],
)
def test_every_head_with_neutral_routers_is_flax_attention(moh, options):
  twin = flax_twin(options)
  module = make(moh, spread=False, **options)
  nnx.update(module, nnx.state(twin, nnx.Param))
  zero_routers(module)
  x = normal(B, T, D)
  mask = np.random.default_rng(3).random((B, N, T, T)) < 0.7
  mask |= np.eye(T, dtype=bool)  # Rows that see nothing differ by design.
  calls = ({}, {"is_causal": True}, {"mask": mask})
  for keywords in calls if not options else calls[2:]:
    expected = call(twin, x, **keywords)
    oracles.assert_close(call(module, x, **keywords), expected, FORWARD)


def test_every_head_with_neutral_routers_has_flax_gradients():
  twin = flax_twin({})
  module = make(EVERY_HEAD, spread=False)
  nnx.update(module, nnx.state(twin, nnx.Param))
  zero_routers(module)
  x, dout = normal(B, T, D), normal(B, T, D, seed=1)

  @nnx.jit
  def gradients(model):
    return nnx.grad(lambda m: jnp.sum(m(x, is_causal=True) * dout))(model)

  expected = nnx.to_pure_dict(gradients(twin))
  actual = nnx.to_pure_dict(gradients(module))
  for name in ("query", "key", "value", "out"):
    for part in ("kernel", "bias"):
      # A key bias moves every logit of a row alike: its gradient is 0, and
      # what is left is rounding.
      oracles.assert_close(
        actual[name][part],
        expected[name][part],
        GRADIENT,
        f"{name}.{part}",
        floor=1.0 if (name, part) == ("key", "bias") else 1e-6,
      )


def test_parameter_names_and_shapes_are_flaxs_plus_the_routers():
  twin = nnx.MultiHeadAttention(
    N, D, qkv_features=N * H, num_kv_heads=2, in_kv_features=5,
    decode=False, rngs=nnx.Rngs(0),
  )  # fmt: skip
  module = make(PLAN, num_kv_heads=2, in_kv_features=5)

  def shapes(model):
    return {
      path: leaf.shape
      for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }

  expected = shapes(twin) | {
    ("router_routed",): (D, 6),
    ("router_kind",): (D, 2),
    ("router_shared",): (D, 2),
  }
  assert shapes(module) == expected


def test_features_default_to_flaxs_defaults():
  module = MoHAttention(4, 12, moh=None, decode=False, rngs=nnx.Rngs(0))
  assert module.query.kernel.shape == (12, 4, 3)
  assert module.key.kernel.shape == (12, 4, 3)
  assert module.out.kernel.shape == (4, 3, 12)
  assert module.query.bias.shape == (4, 3)
  assert module(normal(B, T, 12)).shape == (B, T, 12)


def test_cross_attention_inputs_fill_in_as_in_flax():
  twin = flax_twin({})
  module = make(None)
  nnx.update(module, nnx.state(twin, nnx.Param))
  q, k, v = normal(B, T, D), normal(B, 5, D, seed=1), normal(B, 5, D, seed=2)
  for inputs in ((q,), (q, k), (q, k, v)):
    oracles.assert_close(call(module, *inputs), call(twin, *inputs), FORWARD)
  np.testing.assert_array_equal(call(module, q), call(module, q, q))
  np.testing.assert_array_equal(call(module, q, k), call(module, q, k, k))


def test_keys_and_values_may_have_features_of_their_own():
  module = make(PLAN, in_kv_features=5)
  out = call(module, normal(B, T, D), normal(B, 4, 5, seed=1))
  assert out.shape == (B, T, D)


def test_masks_broadcast_over_heads_and_batch():
  module = make(PLAN)
  x = normal(B, T, D)
  mask = np.random.default_rng(0).random((B, 1, T, T)) < 0.6
  full = call(module, x, mask=np.broadcast_to(mask, (B, N, T, T)))
  np.testing.assert_allclose(call(module, x, mask=mask), full, atol=1e-6)
  shared = call(module, x, mask=mask[:1])
  full = call(module, x, mask=np.broadcast_to(mask[:1], (B, N, T, T)))
  np.testing.assert_allclose(shared, full, atol=1e-6)


def test_flaxs_own_float_masks_work():
  # nnx.make_causal_mask gives float32 zeros and ones.
  module = make(PLAN)
  x = normal(B, T, D)
  mask = nnx.make_causal_mask(jnp.ones((B, T)))
  expected = call(module, x, is_causal=True)
  oracles.assert_close(call(module, x, mask=mask), expected, FORWARD)


def test_a_mask_and_is_causal_both_hold():
  module = make(PLAN)
  x = normal(B, T, D)
  mask = np.random.default_rng(0).random((B, 1, T, T)) < 0.6
  both = mask & np.tri(T, dtype=bool)
  expected = call(module, x, mask=both)
  actual = call(module, x, mask=mask, is_causal=True)
  oracles.assert_close(actual, expected, FORWARD)


def captured(module, x, **keywords):
  """The output, and the sown attention weights."""
  forward = nnx.capture(module, nnx.Intermediate)
  out, sown = forward(x, sow_weights=True, **keywords)
  (weights,) = jax.tree.leaves(sown["attention_weights"])
  return out, weights


def test_sown_attention_weights_are_flaxs():
  twin = flax_twin({})
  module = make(None)
  nnx.update(module, nnx.state(twin, nnx.Param))
  x = normal(B, T, D)
  oracles.assert_close(captured(module, x)[1], captured(twin, x)[1], FORWARD)


def test_sowing_does_not_change_the_output():
  module = make(PLAN)
  x = normal(B, T, D)
  plain = call(module, x, is_causal=True)
  sown, weights = captured(module, x, is_causal=True)
  oracles.assert_close(sown, plain, FORWARD)
  assert weights.shape == (B, N, T, T)
  oracles.assert_close(weights.sum(axis=-1), np.ones((B, N, T)), FORWARD)


# ---------------------------------------------------------------- the oracle


def layer_oracle(module, x, *, moh, theta, causal, valid, segments, selection):
  """The whole layer from its parameters; `selection` is [B, T, N]."""

  def linear(part, inputs):
    return oracles.project(inputs, part.kernel[...], part.bias[...])

  q, k, v = (
    linear(part, x) for part in (module.query, module.key, module.value)
  )
  if moh.router == "query_norm":
    gates = selection.astype(np.float64)
    probs = oracles.query_norm_probs(q, moh.num_shared)
  else:
    gates, probs = oracles.two_stage_gates(
      x,
      *(np.asarray(getattr(module, name)[...]) for name in ROUTERS),
      num_shared=moh.num_shared,
      top_k=moh.top_k,
      form=moh.gates,
      routed_mask=selection[..., moh.num_shared :],
    )
  at = np.tile(np.arange(x.shape[1]), (x.shape[0], 1))
  seen = oracles.visible(
    num_heads=N,
    q_positions=at,
    kv_positions=at,
    causal=causal,
    mask=valid[:, None, None, :],
    q_segments=segments,
    kv_segments=segments,
  )
  if theta is not None:
    q, k = oracles.rope(q, at, theta), oracles.rope(k, at, theta)
  out = oracles.moh_heads(
    q, k, v, module.out.kernel[...], gates, seen, q.shape[-1] ** -0.5
  )
  return out + np.asarray(module.out.bias[...]), probs


def routed_scores(module, x, moh):
  if moh.router == "query_norm":
    q = oracles.project(x, module.query.kernel[...], module.query.bias[...])
    return oracles.query_norms(q)[..., moh.num_shared :]
  return np.asarray(x, np.float64) @ np.asarray(module.router_routed[...])


@pytest.mark.parametrize(
  ("moh", "kv_heads", "execution"),
  [
    (PLAN, 2, "dispatch"),
    (PAPER, 8, "dispatch"),
    (BY_NORM, 2, "dispatch"),
    (PLAN, 2, "dense"),
  ],
  ids=["scaled", "paper", "norm", "dense"],
)
def test_module_equals_the_oracle_with_rope_padding_and_segments(
  moh, kv_heads, execution
):
  module = make(
    moh, num_kv_heads=kv_heads, rope_theta=100.0, execution=execution
  )
  for part in (module.query, module.key, module.value, module.out):
    part.bias[...] = 0.2 * normal(*part.bias.shape, seed=7)
  x = normal(B, T, D)
  valid = np.arange(T) < np.array([[T], [6]])
  x[~valid] = strategies.HUGE
  segments = np.array([[0] * 4 + [1] * 5, [3] * 9], np.int32)
  picked = oracles.select(routed_scores(module, x, moh), moh.top_k, valid)
  shared = np.broadcast_to(valid[..., None], (B, T, moh.num_shared))
  selection = np.concatenate([shared, picked], axis=-1)
  out = call(
    module,
    x,
    is_causal=True,
    token_mask=valid,
    segment_ids=segments,
    deterministic=False,
  )
  expected, probs = layer_oracle(
    module,
    x,
    moh=moh,
    theta=100.0,
    causal=True,
    valid=valid,
    segments=segments,
    selection=selection,
  )
  oracles.assert_close(np.asarray(out)[valid], expected[valid], FORWARD)
  assert np.isfinite(out).all()
  oracles.assert_close(
    module.aux_loss[...], oracles.load_balance(probs, picked, valid), FORWARD
  )
  oracles.assert_close(
    module.head_load[...], selection[valid].mean(axis=0), FORWARD
  )


def test_positions_override_the_index_for_rope_only():
  module = make(PLAN, rope_theta=100.0)
  x = normal(B, T, D)
  at = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  plain = call(module, x, is_causal=True)
  same = call(module, x, is_causal=True, positions=at)
  moved = call(module, x, is_causal=True, positions=at + 11)
  stretched = call(module, x, is_causal=True, positions=3 * at)
  oracles.assert_close(same, plain, FORWARD)
  oracles.assert_close(moved, plain, FORWARD)  # RoPE is relative.
  assert np.abs(np.asarray(stretched - plain)).max() > 1e-3


@pytest.mark.parametrize("batch", [(), (3, 2)], ids=str)
def test_any_number_of_batch_axes_works_as_in_flax(batch):
  module = make(PLAN)
  x = normal(*batch, T, D)
  out = call(module, x, is_causal=True)
  flat = call(module, x.reshape(-1, T, D), is_causal=True)
  assert out.shape == x.shape
  oracles.assert_close(out, np.asarray(flat).reshape(x.shape), FORWARD)


def test_left_and_right_padded_batches_agree():
  module = make(PLAN, rope_theta=100.0)
  length = 6
  tokens = normal(B, length, D)
  outs = []
  for side in ("left", "right"):
    x = np.full((B, T, D), strategies.HUGE, np.float32)
    place = slice(T - length, T) if side == "left" else slice(0, length)
    x[:, place] = tokens
    valid = np.zeros((B, T), bool)
    valid[:, place] = True
    out = call(module, x, token_mask=valid, is_causal=True)
    assert np.isfinite(out).all()
    outs.append(np.asarray(out)[:, place])
  oracles.assert_close(outs[0], outs[1], FORWARD)
  bare = call(module, tokens, is_causal=True)
  oracles.assert_close(outs[0], bare, FORWARD)


def test_padding_passes_no_gradient():
  module = make(PLAN)
  valid = np.arange(T) < np.array([[T], [4]])
  x = normal(B, T, D)
  x[~valid] = strategies.HUGE

  def loss(module, x):
    out = module(x, token_mask=valid, deterministic=False)
    return jnp.sum(jnp.square(jnp.where(valid[..., None], out, 0.0)))

  dx = np.asarray(nnx.jit(nnx.grad(loss, argnums=1))(module, x))
  np.testing.assert_array_equal(dx[~valid], 0.0)
  assert np.abs(dx[valid]).min() > 0


# ------------------------------------------------ execution, all gradients


@pytest.mark.parametrize(
  "moh",
  [
    PLAN,
    BY_NORM,
    MoHConfig(num_heads=N, num_shared=2, top_k=4, group_size=2),
  ],
  ids=["scaled", "norm", "groups"],
)
def test_dispatch_equals_dense_in_outputs_and_every_parameter_gradient(moh):
  x, dout = normal(B, T, D), normal(B, T, D, seed=1)
  valid = np.arange(T) < np.array([[T], [5]])

  def run(execution):
    module = make(moh, num_kv_heads=4, rope_theta=100.0, execution=execution)

    @nnx.jit
    def step(module, x):
      def loss(module, x):
        out = module(x, is_causal=True, token_mask=valid, deterministic=False)
        out = jnp.where(valid[..., None], out, 0.0)
        return jnp.sum(out * dout) + 0.01 * auxiliary_loss(module), out

      return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(module, x)

    (loss, out), (grads, dx) = step(module, x)
    return loss, out, dict(nnx.to_flat_state(grads)), dx

  dense, dispatch = run("dense"), run("dispatch")
  oracles.assert_close(dispatch[0], dense[0], FORWARD, "loss")
  oracles.assert_close(dispatch[1], dense[1], FORWARD, "out")
  oracles.assert_close(dispatch[3], dense[3], GRADIENT, "dx")
  assert dispatch[2].keys() == dense[2].keys()
  for path, gradient in dense[2].items():
    oracles.assert_close(dispatch[2][path][...], gradient[...], GRADIENT, path)


def test_dense_straight_through_reaches_unpicked_heads_in_every_execution():
  # The surrogate needs the outputs of heads that are off.
  moh = MoHConfig(
    num_heads=N, num_shared=2, top_k=4, router="query_norm",
    straight_through="dense",
  )  # fmt: skip
  x, dout = normal(B, T, D), normal(B, T, D, seed=1)

  @nnx.jit
  def step(module):
    return nnx.grad(lambda m: jnp.sum(m(x, is_causal=True) * dout))(module)

  def gradient(plan, execution):
    return step(make(plan, execution=execution)).query.kernel[...]

  expected = gradient(moh, "dense")
  oracles.assert_close(gradient(moh, None), expected, GRADIENT)
  oracles.assert_close(gradient(moh, "dispatch"), expected, GRADIENT)
  selected_only = gradient(BY_NORM, "dense")
  assert np.abs(selected_only - expected).max() > 1e-3


def test_causality_holds_through_the_router():
  module = make(PLAN)
  x = normal(B, T, D)

  def at_3(module, x):
    return jnp.sum(module(x, is_causal=True)[:, 3])

  dx = np.asarray(nnx.jit(nnx.grad(at_3, argnums=1))(module, x))
  np.testing.assert_array_equal(dx[:, 4:], 0.0)
  assert (np.abs(dx[:, :4]).max(axis=-1) > 0).all()


@pytest.mark.parametrize(
  "moh", [PLAN, BY_NORM, None], ids=["linear", "norm", "none"]
)
def test_bfloat16_computation_keeps_float32_parameters_and_statistics(moh):
  module = make(moh, dtype=jnp.bfloat16)
  exact = make(moh)
  x = normal(B, T, D)
  out = call(module, x, is_causal=True)
  assert out.dtype == jnp.bfloat16
  assert module.query.kernel.dtype == jnp.float32
  for _, stat in nnx.to_flat_state(nnx.state(module, (AuxLoss, RoutingStats))):
    assert stat.dtype == jnp.float32
  # Tokens whose selection rounding did not flip are close; most are.
  expected = call(exact, x, is_causal=True)
  error = np.abs(np.asarray(out.astype(jnp.float32) - expected)).max(axis=-1)
  limit = 0.05 * float(jnp.abs(expected).max())
  assert (error < limit).mean() > 0.7


# ------------------------------------------------------ auxiliary variables


def test_auxiliary_variables_exist_from_construction():
  module = make(PLAN)
  loss, load = module.aux_loss, module.head_load
  assert isinstance(loss, AuxLoss)
  assert isinstance(load, RoutingStats)
  assert loss.shape == ()
  assert load.shape == (N,)
  assert loss.dtype == load.dtype == jnp.float32
  assert float(loss[...]) == 0.0


def test_auxiliary_variables_are_neither_parameters_nor_each_other():
  assert issubclass(AuxLoss, nnx.Variable)
  assert issubclass(RoutingStats, nnx.Variable)
  assert not issubclass(AuxLoss, nnx.Param)
  assert not issubclass(RoutingStats, nnx.Param)
  module = make(PLAN)
  assert next(iter(nnx.to_flat_state(nnx.state(module, AuxLoss))))[0] == (
    "aux_loss",
  )
  assert next(iter(nnx.to_flat_state(nnx.state(module, RoutingStats))))[0] == (
    "head_load",
  )


def test_auxiliary_loss_is_zero_in_deterministic_calls():
  module = make(PLAN)
  x = normal(B, T, D)
  call(module, x, deterministic=False)
  assert float(module.aux_loss[...]) > 0
  call(module, x, deterministic=True)
  assert float(module.aux_loss[...]) == 0.0
  assert float(auxiliary_loss(module)) == 0.0
  # The load is still worth looking at.
  assert float(module.head_load[...].sum()) == pytest.approx(6.0, rel=1e-5)


def test_train_and_eval_switch_the_auxiliary_loss():
  module = make(PLAN)
  x = normal(B, T, D)
  module.train()
  call(module, x)
  assert float(module.aux_loss[...]) > 0
  module.eval()
  call(module, x)
  assert float(module.aux_loss[...]) == 0.0


def test_all_padding_gives_finite_zero_statistics():
  module = make(PLAN)
  out = call(
    module,
    normal(B, T, D),
    token_mask=np.zeros((B, T), bool),
    deterministic=False,
  )
  assert np.isfinite(out).all()
  assert float(module.aux_loss[...]) == 0.0
  np.testing.assert_array_equal(module.head_load[...], np.zeros(N))


class Stack(nnx.Module):
  """Two routed layers, one all shared, one plain."""

  def __init__(self, plans=(PLAN, ALL_SHARED, PAPER, None)):
    self.first, self.second, self.third, self.fourth = (
      make(plan, seed=i) for i, plan in enumerate(plans)
    )

  def __call__(self, x, **keywords):
    for layer in (self.first, self.second, self.third, self.fourth):
      x = x + layer(x, **keywords)
    return x


def test_auxiliary_loss_is_the_mean_over_routed_layers_only():
  model = Stack()
  call(model, normal(B, T, D), deterministic=False)
  first, third = model.first.aux_loss[...], model.third.aux_loss[...]
  assert float(first) > 0
  assert float(third) > 0
  assert float(first) != float(third)
  loss = auxiliary_loss(model)
  assert loss.shape == ()
  assert loss.dtype == jnp.float32
  assert float(loss) == pytest.approx(float(first + third) / 2, rel=1e-6)


@pytest.mark.parametrize("plan", [None, ALL_SHARED], ids=["none", "all shared"])
def test_auxiliary_loss_of_a_model_that_does_not_route_is_a_zero_tensor(plan):
  model = Stack([plan] * 4)
  call(model, normal(B, T, D), deterministic=False)
  loss = auxiliary_loss(model)
  assert isinstance(loss, jax.Array)
  assert loss.shape == ()
  assert loss.dtype == jnp.float32
  assert float(loss) == 0.0


def test_all_shared_heads_are_gated():
  module = make(ALL_SHARED)
  plain = make(None)
  x = normal(B, T, D)
  difference = np.asarray(call(module, x) - call(plain, x))
  assert np.abs(difference).max() > 1e-3


def test_two_models_in_one_process_do_not_share_statistics():
  one, other = make(PLAN), make(PLAN, seed=5)
  call(one, normal(B, T, D), deterministic=False)
  kept = float(one.aux_loss[...])
  call(other, normal(B, T, D, seed=9), deterministic=False)
  assert float(one.aux_loss[...]) == kept


# ------------------------------------------------------------ nnx transforms


def test_jit_keeps_the_structure_and_traces_once():
  model = Stack()
  traces = itertools.count()

  @nnx.jit
  def step(model, x):
    next(traces)
    return model(x, is_causal=True, deterministic=False)

  before = jax.tree.structure(nnx.state(model))
  graph = nnx.graphdef(model)
  x = normal(B, T, D)
  step(model, x)
  after = jax.tree.structure(nnx.state(model))
  assert before == after
  assert nnx.graphdef(model) == graph
  step(model, 2 * x)
  assert next(traces) == 1  # The counter gives 0 to the only trace.
  for _, value in nnx.to_flat_state(nnx.state(model)):
    assert np.isfinite(value[...]).all()


def test_statistics_survive_split_merge_and_jax_scan():
  modules = [make(PLAN, seed=i) for i in range(2)]
  x = normal(B, T, D)
  graph, _ = nnx.split(modules[0])
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *map(nnx.state, modules))

  def body(x, state):
    module = nnx.merge(graph, state)
    x = x + module(x, deterministic=False)
    return x, nnx.state(module, (AuxLoss, RoutingStats))

  out, stats = jax.jit(lambda x, s: jax.lax.scan(body, x, s))(x, stacked)
  expected = x
  for module in modules:
    expected = expected + call(module, expected, deterministic=False)
  oracles.assert_close(out, expected, FORWARD)
  oracles.assert_close(
    stats["aux_loss"][...],
    np.stack([module.aux_loss[...] for module in modules]),
    FORWARD,
  )


def test_value_and_grad_reaches_every_parameter_including_the_routers():
  model = Stack()
  x = normal(B, T, D)

  @nnx.jit
  def step(model, x):
    def loss(model):
      out = model(x, is_causal=True, deterministic=False)
      return jnp.mean(jnp.square(out)) + 0.01 * auxiliary_loss(model)

    return nnx.value_and_grad(loss)(model)

  value, grads = step(model, x)
  assert np.isfinite(value)
  for path, gradient in nnx.to_flat_state(grads):
    assert np.isfinite(gradient[...]).all(), path
    if path[-2:] != ("key", "bias"):
      assert np.abs(gradient[...]).max() > 0, path
  # The statistics of the forward pass came out of the transform.
  assert float(model.first.aux_loss[...]) > 0


@pytest.mark.parametrize("execution", ["dense", "dispatch"])
def test_a_batch_sharded_over_devices_gives_the_same_loss_and_gradients(
  execution,
):
  devices = 4
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
  module = make(PLAN, rope_theta=100.0, execution=execution)
  x = normal(2 * devices, T, D)

  @nnx.jit
  def step(module, x):
    def loss(module):
      out = module(x, is_causal=True, deterministic=False)
      return jnp.mean(jnp.square(out)) + 0.01 * auxiliary_loss(module)

    return nnx.value_and_grad(loss)(module)

  value, grads = step(module, x)
  graph, state = nnx.split(module)
  replicated = nnx.merge(
    graph, jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
  )
  rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  sharded_value, sharded_grads = step(replicated, rows)
  oracles.assert_close(sharded_value, value, FORWARD)
  sharded_flat = dict(nnx.to_flat_state(sharded_grads))
  for path, gradient in nnx.to_flat_state(grads):
    oracles.assert_close(
      sharded_flat[path][...], gradient[...], GRADIENT, path, floor=1e-3
    )


def test_the_balance_loss_alone_moves_the_routed_table_only():
  module = make(PLAN)
  x = normal(B, T, D)

  @nnx.jit
  def step(module):
    def loss(module):
      module(x, deterministic=False)
      return auxiliary_loss(module)

    return nnx.grad(loss)(module)

  grads = step(module)
  assert np.abs(grads.router_routed[...]).max() > 1e-4
  np.testing.assert_array_equal(grads.router_kind[...], 0.0)
  np.testing.assert_array_equal(grads.router_shared[...], 0.0)
  np.testing.assert_array_equal(grads.query.kernel[...], 0.0)


@pytest.mark.filterwarnings("ignore:.*top_k.*:UserWarning")
def test_top_1_scaled_module_has_no_task_gradient_in_the_routed_table():
  def gradient(gates):
    moh = MoHConfig(num_heads=N, num_shared=2, top_k=1, gates=gates)
    module = make(moh)
    x, dout = normal(B, T, D), normal(B, T, D, seed=1)
    step = nnx.jit(nnx.grad(lambda m: jnp.sum(m(x) * dout)))
    return np.asarray(step(module).router_routed[...])

  np.testing.assert_array_equal(gradient("scaled"), 0.0)
  assert np.abs(gradient("paper")).max() > 1e-3


# ------------------------------------------------------------------- dropout


def test_dropout_is_reproducible_by_rngs():
  module = make(PLAN, dropout_rate=0.5, deterministic=False)
  x = normal(B, T, D)
  one = call(module, x, rngs=nnx.Rngs(dropout=1))
  same = call(module, x, rngs=nnx.Rngs(dropout=1))
  other = call(module, x, rngs=nnx.Rngs(dropout=2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(np.asarray(one - other)).max() > 1e-3


def test_dropout_draws_anew_on_every_call():
  module = make(PLAN, dropout_rate=0.5, deterministic=False)
  x = normal(B, T, D)
  assert np.abs(np.asarray(call(module, x) - call(module, x))).max() > 1e-3


def test_the_call_flag_wins_over_the_constructors():
  module = make(PLAN, dropout_rate=0.5, deterministic=False)
  still = make(PLAN, dropout_rate=0.0)
  x = normal(B, T, D)
  expected = call(still, x, deterministic=True)
  oracles.assert_close(call(module, x, deterministic=True), expected, FORWARD)
  noisy = call(module, x)
  assert np.abs(np.asarray(noisy - expected)).max() > 1e-3


def test_dropout_scales_what_it_keeps():
  # One key: each query's weight is 1, so it is dropped or doubled.
  module = make(
    None, dropout_rate=0.5, broadcast_dropout=False, execution="dense"
  )
  x = np.broadcast_to(normal(1, 1, D), (4, 1, D))
  full = np.asarray(call(module, x, deterministic=True))
  heads = np.asarray(
    oracles.project(x, module.value.kernel[...], module.value.bias[...])
  )
  parts = np.einsum("btnh,nhd->btnd", heads, module.out.kernel[...])
  oracles.assert_close(full, parts.sum(axis=2), FORWARD)
  out = np.asarray(
    call(module, x, deterministic=False, rngs=nnx.Rngs(dropout=3))
  )
  choices = np.array(list(itertools.product([0.0, 2.0], repeat=N)))
  options = choices @ parts[0, 0]
  for b in range(4):
    assert np.abs(options - out[b, 0]).max(axis=-1).min() < 1e-4, b


def test_dropout_without_a_flag_or_without_rngs_is_refused():
  x = normal(B, T, D)
  undecided = make(PLAN, dropout_rate=0.5)
  with pytest.raises(ValueError, match="`deterministic`"):
    undecided(x)
  without = make(PLAN, dropout_rate=0.5, keep_rngs=False)
  with pytest.raises(ValueError, match="rngs"):
    without(x, deterministic=False)
  out = call(without, x, deterministic=False, rngs=nnx.Rngs(dropout=0))
  assert np.isfinite(out).all()


@pytest.mark.parametrize("execution", [None, "dispatch"])
def test_accelerators_use_their_kernels(execution):
  module = make(PLAN, num_kv_heads=2, rope_theta=100.0, execution=execution)
  x = normal(B, T, D)
  segments = np.sort(np.random.default_rng(0).integers(0, 2, (B, T)))
  options = {"is_causal": True, "segment_ids": jnp.asarray(segments)}
  expected = call(module, x, **options)
  graph, state = nnx.split(module)

  def run(state, x):
    return nnx.merge(graph, state)(x, **options)

  with platform.compiling_for("tpu"), platform.interpreting():
    traced = jax.jit(run).trace(state, x)
    out = traced.lower().compile()(state, x)
  assert "pallas_call" in str(traced.jaxpr)
  oracles.assert_close(out, expected, FORWARD)


# -------------------------------------------------------------- decode cache


@pytest.mark.parametrize(
  ("moh", "kv_heads", "steps"),
  [
    (PLAN, 2, [1] * T),
    (PLAN, 8, [T]),
    (BY_NORM, 2, [5, 1, 3]),
    (None, 2, [2, 1, 6]),
  ],
  ids=["one by one", "all at once", "query norm", "no plan"],
)
def test_decoding_equals_one_shot_causal_attention(moh, kv_heads, steps):
  module = make(moh, num_kv_heads=kv_heads, rope_theta=100.0)
  x = normal(B, T, D)
  expected = np.asarray(call(module, x, is_causal=True))
  module.init_cache((B, T + 2, D))
  outs, start = [], 0
  for count in steps:
    outs.append(call(module, x[:, start : start + count], decode=True))
    start += count
  oracles.assert_close(np.concatenate(outs, axis=1), expected, FORWARD)


def test_decoding_matches_flax_token_by_token():
  twin = flax_twin({"num_kv_heads": 2})
  module = make(None, num_kv_heads=2)
  nnx.update(module, nnx.state(twin, nnx.Param))
  x = normal(B, 4, D)
  twin.init_cache((B, 4, D))
  module.init_cache((B, 4, D))
  for t in range(4):
    expected = call(twin, x[:, t : t + 1], decode=True)
    actual = call(module, x[:, t : t + 1], decode=True)
    oracles.assert_close(actual, expected, FORWARD)
  for name in ("cached_key", "cached_value"):
    ours, theirs = getattr(module, name), getattr(twin, name)
    assert isinstance(ours, nnx.Cache)
    # Heads before slots, and a whole page of these.
    held = ours[...].swapaxes(1, 2)[:, :4]
    oracles.assert_close(held, theirs[...], FORWARD, name)
  assert int(module.cache_index[...]) == 4


def test_a_decode_step_does_not_retrace():
  module = make(PLAN, rope_theta=100.0)
  module.init_cache((B, T, D))
  traces = itertools.count()

  @nnx.jit
  def step(module, x):
    next(traces)
    return module(x, decode=True)

  x = normal(B, T, D)
  for t in range(4):
    step(module, x[:, t : t + 1])
  assert next(traces) == 1


@pytest.mark.parametrize("heads", [N, 2])
def test_a_decode_step_writes_its_cache_in_place(heads):
  module = make(PLAN, num_kv_heads=heads, rope_theta=100.0)
  module.init_cache((B, 1 << 16, D))
  graph, cache, rest = nnx.split(module, nnx.Cache, ...)

  def step(cache, rest, x):
    merged = nnx.merge(graph, cache, rest, copy=True)
    return merged(x, decode=True), nnx.state(merged, nnx.Cache)

  compiled = (
    jax.jit(step, donate_argnums=0).lower(cache, rest, normal(B, 1, D))
  ).compile()
  keys = module.cached_key[...].nbytes
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes >= 2 * keys
  assert memory.temp_size_in_bytes < keys / 4


def test_keys_are_cached_for_heads_nobody_has_picked_yet():
  # Token 0 picks heads by +x, the last token by -x: other heads.
  moh = MoHConfig(num_heads=N, num_shared=0, top_k=2, gates="paper")
  module = make(moh)
  x = np.repeat(normal(B, 1, D), 4, axis=1)
  x[:, 3] *= -1
  expected = np.asarray(call(module, x, is_causal=True))
  module.init_cache((B, 4, D))
  out = np.concatenate(
    [call(module, x[:, t : t + 1], decode=True) for t in range(4)], axis=1
  )
  oracles.assert_close(out, expected, FORWARD)
  scores = routed_scores(module, x, moh)
  valid = np.ones((B, 4), bool)
  picked = oracles.select(scores, 2, valid)
  assert not (picked[:, 0] & picked[:, 3]).any()


def test_decoding_without_a_cache_is_refused():
  with pytest.raises(ValueError, match="init_cache"):
    make(PLAN)(normal(B, 1, D), decode=True)


def test_init_cache_starts_over():
  module = make(PLAN, rope_theta=100.0)
  x = normal(B, 3, D)
  module.init_cache((B, 5, D))
  first = call(module, x, decode=True)
  module.init_cache((B, 5, D))
  np.testing.assert_array_equal(call(module, x, decode=True), first)


def test_more_new_tokens_than_the_cache_holds_are_refused():
  module = make(PLAN)
  module.init_cache((B, 4, D))
  with pytest.raises(ValueError, match="cache"):
    module(normal(B, 9, D), decode=True)


def test_a_cache_that_is_too_full_is_told():
  module = make(None)
  module.init_cache((B, 8, D))
  call(module, normal(B, 7, D), decode=True)
  with pytest.raises(ValueError, match="`cache_index` must .* 8 tokens .* 7."):
    module(normal(B, 2, D), decode=True)


def test_a_cache_of_another_batch_size_is_refused():
  module = make(PLAN)
  module.init_cache((B + 1, 4, D))
  with pytest.raises(ValueError, match="cache"):
    module(normal(B, 1, D), decode=True)


# ----------------------------------------------------------------- bad input


@pytest.mark.parametrize(
  ("options", "named"),
  [
    ({"moh": MoHConfig(num_heads=4, num_shared=2, top_k=2)}, "num_heads"),
    ({"num_kv_heads": 3}, "num_kv_heads"),
    ({"num_kv_heads": 0}, "num_kv_heads"),
    ({"qkv_features": N * H + 1}, "qkv_features"),
    ({"qkv_features": N * 3, "rope_theta": 100.0}, "rope_theta|head_dim"),
    ({"dropout_rate": 1.5}, "dropout_rate"),
    ({"dropout_rate": -0.1}, "dropout_rate"),
    ({"execution": "sparse"}, "execution"),
    ({"implementation": "cuda"}, "implementation"),
  ],
  ids=lambda value: value if isinstance(value, str) else None,
)
def test_constructor_arguments_that_do_not_fit_are_refused_by_name(
  options, named
):
  given = {"moh": PLAN, "qkv_features": N * H, "decode": False} | options
  with pytest.raises(ValueError, match=named):
    MoHAttention(N, D, rngs=nnx.Rngs(0), **given)(normal(B, T, D))


@pytest.mark.parametrize(
  ("inputs", "keywords", "named"),
  [
    ([(B, T, D + 1)], {}, "inputs_q"),
    ([(D,)], {}, "inputs_q"),
    ([(B, T, D), (B, 5, D + 1)], {}, "inputs_k"),
    ([(B, T, D), (B, 5, D), (B, 6, D)], {}, "inputs_v"),
    ([(B, T, D), (B + 1, 5, D)], {}, "inputs_k"),
    ([(B, T, D)], {"mask": np.ones((B, 1, T, T + 1), bool)}, "`mask`"),
    ([(B, T, D)], {"mask": np.ones((B, 3, T, T), bool)}, "`mask`"),
    ([(B, T, D)], {"token_mask": np.ones((B, T + 1), bool)}, "`token_mask`"),
    (
      [(B, T, D)],
      {"segment_ids": np.zeros((B + 1, T), np.int32)},
      "`segment_ids`",
    ),
    ([(B, T, D)], {"positions": np.zeros((T,), np.int32)}, "`positions`"),
  ],
)
@pytest.mark.parametrize("moh", [PLAN, None], ids=["routed", "plain"])
def test_call_arguments_that_do_not_fit_are_refused_by_name(
  inputs, keywords, named, moh
):
  module = make(moh, rope_theta=100.0)
  with pytest.raises(ValueError, match=named):
    module(*(jnp.ones(shape) for shape in inputs), **keywords)


def test_values_without_keys_are_refused_as_in_flax():
  x = normal(B, T, D)
  with pytest.raises(ValueError, match="`inputs_k`"):
    make(PLAN)(x, inputs_v=x)
