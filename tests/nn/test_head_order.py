"""Heads stored in another order than their own: nothing else may change."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import head_order, s2
from jaxheads.moh import MoHConfig
from jaxheads.nn import HeadAttention
from tests import oracles

B, T, N, H, D = 2, 9, 8, 4, 12
FORWARD, GRADIENT = 1e-5, 2e-5
EXHAUSTIVE = pytest.mark.exhaustive

ORDER = (5, 0, 3, 6, 1, 7, 2, 4)  # Not its own inverse.
PAIRS = head_order.of_groups((2, 0, 3, 1), 2)
ROUTED = MoHConfig(num_heads=N, num_shared=2, top_k=4)
GROUPED = MoHConfig(
  num_heads=N, num_shared=2, top_k=2, gates="paper", group_size=2
)
BY_NORM = MoHConfig(num_heads=N, num_shared=3, top_k=2, router="query_norm")
BY_NORM_DENSE = MoHConfig(
  num_heads=N,
  num_shared=2,
  top_k=2,
  router="query_norm",
  group_size=2,
  straight_through="dense",
)
SHARDS = s2.strided(N, block_size=2, local_blocks=1, vertical_stride=4)
HYBRID = s2.strided(
  N,
  block_size=2,
  local_blocks=1,
  vertical_stride=3,
  num_kv_heads=4,
  dense_heads=1,
)

LAYERS = {
  "dense": dict(head_order=ORDER),
  "dense, groups, layer norms": dict(
    head_order=PAIRS, num_kv_heads=4, normalize_qk=True
  ),
  "routed": dict(head_order=ORDER, moh=ROUTED, execution="dense"),
  "routed, dispatch": dict(
    head_order=PAIRS, num_kv_heads=4, moh=ROUTED, execution="dispatch"
  ),
  "routed in groups": dict(
    head_order=PAIRS, num_kv_heads=4, moh=GROUPED, execution="dispatch"
  ),
  "by norm": dict(head_order=ORDER, moh=BY_NORM, execution="dense"),
  "by norm in groups": dict(
    head_order=PAIRS, num_kv_heads=4, moh=BY_NORM_DENSE
  ),
  "shards": dict(head_order=ORDER, pattern=SHARDS),
  "shards, routed": dict(
    head_order=PAIRS,
    num_kv_heads=4,
    pattern=HYBRID,
    moh=ROUTED,
    execution="dispatch",
  ),
}


def normal(*dims, seed=0):
  return np.random.default_rng(seed).standard_normal(dims).astype(np.float32)


def make(options, *, own=False, **more):
  """A layer whose biases and routers matter; the same parameters if `own`."""
  options = {"rope_theta": 100.0, "qkv_features": N * H, **options, **more}
  if own:
    options = {**options, "head_order": None}
  return HeadAttention(
    N,
    D,
    rngs=nnx.Rngs(0),
    bias_init=nnx.initializers.normal(0.3),
    router_init=nnx.initializers.normal(0.5),
    **options,
  )


def pair(name, **more):
  return make(LAYERS[name], own=True, **more), make(LAYERS[name], **more)


def permuted(tree, order, num_kv_heads):
  """A layer's parameters, or gradients, from their own to the stored order."""
  kv_order = order[:: N // num_kv_heads]
  kv_order = [head // (N // num_kv_heads) for head in kv_order]
  of = {"query": order, "key": kv_order, "value": kv_order}
  result = {}
  for path, leaf in tree.items():
    leaf = np.asarray(leaf)
    if path[0] in of:
      leaf = np.take(leaf, of[path[0]], axis=-2)
    elif path == ("out", "kernel"):
      leaf = leaf[list(order)]
    result[path] = leaf
  return result


def flat(module_or_state):
  state = nnx.state(module_or_state, nnx.Param)
  return {path: leaf[...] for path, leaf in nnx.to_flat_state(state)}


@functools.partial(nnx.jit, static_argnames="flags")
def call(module, x, arrays, flags=()):
  return module(x, **arrays, **dict(flags))


def some(names, *quick):
  """All of them; those that are not `quick` on request only."""
  return [
    name
    if name in quick
    else pytest.param(
      *([name] if isinstance(name, str) else name), marks=EXHAUSTIVE
    )
    for name in names
  ]


CALLS = {
  "causal": ({}, {"is_causal": True}),
  "padding": (
    {"token_mask": np.arange(T) < np.array([[T], [4]])},
    {"is_causal": True},
  ),
  "segments": (
    {"segment_ids": np.repeat([[0, 1]], B, 0).repeat([4, T - 4], 1)},
    {"is_causal": True},
  ),
  "a mask by head": (
    {"mask": np.random.default_rng(3).random((B, N, T, T)) < 0.7},
    {},
  ),
}


@pytest.mark.parametrize(
  ("name", "how"),
  some(
    itertools.product(LAYERS, CALLS),
    ("by norm in groups", "padding"),
    ("routed, dispatch", "segments"),
    ("shards", "segments"),
  ),
)
def test_outputs_and_statistics_are_the_same(name, how):
  own, stored = pair(name)
  x = normal(B, T, D)
  arrays, flags = CALLS[how]
  arrays = {key: jnp.asarray(value) for key, value in arrays.items()}
  flags = tuple(flags.items())
  expected = call(own, x, arrays, flags)
  oracles.assert_close(call(stored, x, arrays, flags), expected, FORWARD)
  if own.moh is not None:
    assert len(set(np.asarray(own.head_load[...]).tolist())) > 1
    oracles.assert_close(stored.head_load[...], own.head_load[...], FORWARD)
    oracles.assert_close(stored.aux_loss[...], own.aux_loss[...], FORWARD)


@pytest.mark.parametrize("name", some(LAYERS, "by norm", "shards"))
def test_parameters_and_gradients_are_permuted(name):
  own, stored = pair(name)
  order = LAYERS[name]["head_order"]
  kv_heads = LAYERS[name].get("num_kv_heads", N)
  x, dout = normal(B, T, D), normal(B, T, D, seed=1)

  @nnx.jit
  def gradients(module):
    def loss(module, x):
      out = module(x, is_causal=True)
      aux = 0.0 if module.aux_loss is None else module.aux_loss[...]
      return jnp.sum(out * dout) + 0.1 * aux

    return nnx.grad(loss, argnums=(0, 1))(module, x)

  expected = permuted(flat(own), order, kv_heads)
  assert any(
    not np.array_equal(leaf, expected[path]) for path, leaf in flat(own).items()
  )
  for path, leaf in flat(stored).items():
    np.testing.assert_array_equal(leaf, expected[path])
  d_own, dx_own = gradients(own)
  d_stored, dx_stored = gradients(stored)
  oracles.assert_close(dx_stored, dx_own, GRADIENT)
  expected = permuted(flat(d_own), order, kv_heads)
  for path, leaf in flat(d_stored).items():
    oracles.assert_close(leaf, expected[path], GRADIENT)


@pytest.mark.parametrize("name", some(LAYERS, "by norm in groups"))
def test_decoding_and_caches_kept_outside(name):
  own, stored = pair(name)
  x = normal(B, T, D)
  groups = N // LAYERS[name].get("num_kv_heads", N)
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))

  @nnx.jit
  def decoded(module):
    module.init_cache((B, T, D))
    prompt = module(x[:, : T - 2], decode=True)
    steps = [module(x[:, t : t + 1], decode=True) for t in (T - 2, T - 1)]
    return jnp.concatenate([prompt, *steps], axis=1)

  @nnx.jit
  def in_parts(module):
    k, v = module.project_kv(x, positions)
    out = module.attend(x, k, v)
    seen = jnp.tril(jnp.ones((T, T), bool))

    def read(q, active):
      logits = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, groups, axis=2))
      weights = jax.nn.softmax(jnp.where(seen, logits * H**-0.5, -1e30))
      every = jnp.einsum("bnts,bsnh->btnh", weights, v.repeat(groups, axis=2))
      return every if active is None else jnp.where(active[..., None], every, 0)

    return out, module.attend_with(x, positions, read)

  oracles.assert_close(decoded(stored), decoded(own), FORWARD)
  for out, expected in zip(in_parts(stored), in_parts(own), strict=True):
    oracles.assert_close(out, expected, FORWARD)


@pytest.mark.parametrize("name", some(("routed", "shards"), "routed"))
def test_what_is_sown_and_dropped_is_of_the_same_heads(name):
  own, stored = pair(name, dropout_rate=0.5, broadcast_dropout=False)
  x = normal(B, T, D)
  seen = []
  for module in (own, stored):
    out, sown = nnx.capture(module, nnx.Intermediate)(
      x, is_causal=True, sow_weights=True, deterministic=False, rngs=nnx.Rngs(1)
    )
    seen.append((out, sown))
  assert len(jax.tree.leaves(seen[0])) == 2 + (name == "routed")
  for ours, expected in zip(*map(jax.tree.leaves, seen), strict=True):
    oracles.assert_close(ours, expected, FORWARD)


def test_active_heads_are_in_their_own_order():
  x = normal(B, T, D)
  for name in ("routed", "by norm"):
    own, stored = pair(name)
    expected = own.active_heads(x)
    assert not expected.all()
    np.testing.assert_array_equal(stored.active_heads(x), expected)
  assert pair("dense")[1].active_heads(x) is None


@pytest.mark.parametrize(
  ("order", "kv_heads", "message"),
  [
    ((0, 1, 2), N, "each of the 8 heads once"),
    ((0, 0, *range(2, N)), N, "each of the 8 heads once"),
    (ORDER, 4, "the 2 query heads of each KV head together"),
    ((1, 0, *range(2, N)), 4, "the 2 query heads of each KV head together"),
  ],
)
def test_bad_orders_are_named(order, kv_heads, message):
  with pytest.raises(ValueError, match=f"`head_order` must .*{message}"):
    make({"head_order": order, "num_kv_heads": kv_heads})


def test_the_own_order_is_no_order():
  assert make({"head_order": range(N)}).head_order is None
