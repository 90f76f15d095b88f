"""Layers whose heads see a part of the context each, and Flax's own with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxheads import s2
from jaxheads.moh import MoHConfig
from jaxheads.nn import (
  HeadAttention,
  MoHAttention,
  S2Attention,
  _attention,
  _patterned,
  attention_fn,
  auxiliary_loss,
)
from tests import oracles, strategies

B, T, N, K, H, D = 2, 21, 4, 2, 4, 12
FORWARD, GRADIENT = 1e-5, 2e-5

STRIDED = s2.strided(
  N, block_size=4, local_blocks=1, vertical_stride=2, num_kv_heads=K
)
PER_HEAD = s2.strided(
  N, block_size=2, local_blocks=2, vertical_stride=4, num_kv_heads=K,
  per_query_head=True,
)  # fmt: skip
WINDOW = s2.sliding_window(N, block_size=4, local_blocks=2, sink_blocks=1)
_random = np.random.default_rng(0).random((N, 12, 12)) < 0.4
TABLE = s2.from_block_mask(_random | np.eye(12, dtype=bool), block_size=2)
PATTERNS = {
  "strided": STRIDED,
  "per head": PER_HEAD,
  "window": WINDOW,
  "table": TABLE,
}
MOH = MoHConfig(num_heads=N, num_shared=1, top_k=2)


def normal(*dims, seed=0):
  return np.random.default_rng(seed).standard_normal(dims).astype(np.float32)


def make(pattern, *, seed=0, **options):
  """A module; by the definition, which compiles fast, unless told otherwise."""
  options = {
    "qkv_features": N * H, "num_kv_heads": K, "implementation": "reference",
  } | options  # fmt: skip
  return S2Attention(N, D, pattern=pattern, rngs=nnx.Rngs(seed), **options)


def unmasked_twin(module, **options):
  """A layer without a pattern and the same parameters, for dense masks."""
  options = {
    "qkv_features": N * H, "num_kv_heads": K, "rope_theta": module.rope_theta,
    "execution": "dense",
  } | options  # fmt: skip
  twin = MoHAttention(N, D, moh=module.moh, rngs=nnx.Rngs(9), **options)
  nnx.update(twin, nnx.state(module, nnx.Param))
  return twin


@nnx.jit(static_argnames=("flags",))
def _call(module, inputs, arrays, flags):
  return module(*inputs, **arrays, **dict(flags))


def call(module, *inputs, **keywords):
  flags = {k: v for k, v in keywords.items() if isinstance(v, bool)}
  arrays = {k: v for k, v in keywords.items() if k not in flags}
  return _call(module, inputs, arrays, tuple(sorted(flags.items())))


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_equals_flax_attention_under_the_token_mask(pattern):
  twin = nnx.MultiHeadAttention(
    N, D, qkv_features=N * H, num_kv_heads=K, decode=False, rngs=nnx.Rngs(1)
  )
  x, d_out = normal(B, T, D), normal(B, T, D, seed=1)
  mask = np.broadcast_to(pattern.to_dense(T), (B, N, T, T))

  @nnx.jit
  def run(layer, keywords):
    def loss(layer, x):
      out = layer(x, **keywords)
      return jnp.sum(out * d_out), out

    (_, out), grads = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
      layer, x
    )
    return out, grads

  expected, (expected_grads, expected_dx) = run(twin, {"mask": mask})
  module = make(pattern, implementation=None)
  nnx.update(module, nnx.state(twin, nnx.Param))
  out, (grads, dx) = run(module, {})
  oracles.assert_close(out, expected, FORWARD)
  oracles.assert_close(dx, expected_dx, GRADIENT)
  actual = dict(nnx.to_flat_state(grads))
  for path, gradient in nnx.to_flat_state(expected_grads):
    # A key bias moves every logit of a row alike: its gradient is 0.
    floor = 1.0 if path == ("key", "bias") else 1e-6
    oracles.assert_close(
      actual[path][...], gradient[...], GRADIENT, path, floor=floor
    )


@pytest.mark.parametrize("moh", [None, MOH], ids=["plain", "routed"])
def test_padding_segments_and_rope_equal_the_dense_mask(moh):
  module = make(STRIDED, rope_theta=100.0, moh=moh)
  twin = unmasked_twin(module)
  x = normal(B, T, D)
  valid = np.arange(T) < np.array([[T], [15]])
  x[~valid] = strategies.HUGE
  segments = np.array([[0] * 9 + [1] * 12, [3] * T], np.int32)
  given = {"token_mask": valid, "segment_ids": segments}
  mask = np.broadcast_to(STRIDED.to_dense(T), (B, N, T, T))
  out = call(module, x, **given)
  expected = call(twin, x, mask=mask, **given)
  assert np.isfinite(out).all()
  oracles.assert_close(
    np.asarray(out)[valid], np.asarray(expected)[valid], FORWARD
  )
  if moh is not None:
    oracles.assert_close(module.aux_loss[...], twin.aux_loss[...], FORWARD)
    oracles.assert_close(module.head_load[...], twin.head_load[...], FORWARD)


@pytest.mark.parametrize(
  ("pattern", "moh", "steps", "implementation"),
  [
    (STRIDED, None, [1] * T, None),
    (PER_HEAD, None, [9, 1, 1, 9, 1], "reference"),
    (WINDOW, MOH, [10, 1, 10], "reference"),
    (TABLE, None, [T], "reference"),
  ],
  ids=["one by one", "chunks", "routed window", "table at once"],
)
def test_decoding_equals_one_shot(pattern, moh, steps, implementation):
  module = make(
    pattern, rope_theta=100.0, moh=moh, implementation=implementation
  )
  x = normal(B, T, D)
  expected = call(module, x)
  module.init_cache((B, T + 2, D))
  # Nothing that lies in slots not yet filled may be seen.
  for cache in (module.cached_key, module.cached_value):
    cache[...] = jnp.full(cache.shape, strategies.HUGE, cache.dtype)
  outs, start = [], 0
  for count in steps:
    outs.append(call(module, x[:, start : start + count], decode=True))
    start += count
  oracles.assert_close(np.concatenate(outs, axis=1), expected, FORWARD)


def test_what_no_head_sees_has_no_gradient():
  module = make(dataclasses.replace(WINDOW, rules=(WINDOW.rules[0],) * N))
  x = normal(B, T, D)
  query = 17  # In block 4: it sees blocks 3 and 4, and the sink block 0.

  def at_query(module, x):
    return jnp.sum(module(x)[:, query])

  dx = np.asarray(nnx.jit(nnx.grad(at_query, argnums=1))(module, x))
  reached = np.abs(dx).max(axis=(0, 2)) > 0
  expected = np.zeros(T, bool)
  expected[[*range(4), *range(12, 18)]] = True
  np.testing.assert_array_equal(reached, expected)


@pytest.mark.parametrize(
  ("execution", "implementation"),
  [("dense", "reference"), ("dispatch", "xla")],
)
@pytest.mark.parametrize(
  "moh",
  [
    MOH,
    dataclasses.replace(MOH, router="query_norm"),
    dataclasses.replace(MOH, router="query_norm", straight_through="dense"),
  ],
  ids=["two stage", "norm", "norm, dense gradient"],
)
def test_routed_and_sharded_is_masked_then_gated(
  moh, execution, implementation
):
  module = make(
    PER_HEAD,
    moh=moh,
    rope_theta=100.0,
    execution=execution,
    implementation=implementation,
  )
  twin = unmasked_twin(module)
  x, d_out = normal(B, T, D), normal(B, T, D, seed=1)
  mask = np.broadcast_to(PER_HEAD.to_dense(T), (B, N, T, T))

  @nnx.jit
  def run(layer, keywords):
    def loss(layer):
      out = layer(x, **keywords)
      return jnp.sum(out * d_out) + 0.01 * auxiliary_loss(layer)

    return nnx.value_and_grad(loss)(layer)

  expected, expected_grads = run(twin, {"mask": mask})
  value, grads = run(module, {})
  oracles.assert_close(value, expected, FORWARD)
  actual = dict(nnx.to_flat_state(grads))
  for path, gradient in nnx.to_flat_state(expected_grads):
    oracles.assert_close(
      actual[path][...], gradient[...], GRADIENT, path, floor=1e-2
    )


def test_masks_dropout_and_sown_weights_take_the_dense_way():
  module = make(STRIDED, dropout_rate=0.5, deterministic=True)
  twin = unmasked_twin(module, dropout_rate=0.5, deterministic=True)
  x = normal(B, T, D)
  seen = np.broadcast_to(STRIDED.to_dense(T), (B, N, T, T))
  mask = np.random.default_rng(3).random((B, 1, T, T)) < 0.7
  mask |= np.eye(T, dtype=bool)
  oracles.assert_close(
    call(module, x, mask=mask), call(twin, x, mask=mask & seen), FORWARD
  )
  dropped = [
    call(layer, x, deterministic=False, rngs=nnx.Rngs(dropout=3), **given)
    for layer, given in ((module, {}), (twin, {"mask": seen}))
  ]
  oracles.assert_close(*dropped, FORWARD)
  plain = call(module, x)
  assert np.abs(np.asarray(dropped[0] - plain)).max() > 1e-3
  forward = nnx.capture(module, nnx.Intermediate)
  out, sown = forward(x, sow_weights=True)
  (weights,) = jax.tree.leaves(sown["attention_weights"])
  oracles.assert_close(out, plain, FORWARD)
  np.testing.assert_array_equal(np.asarray(weights) > 0, seen)


def test_the_dense_way_is_refused_where_it_would_not_fit(monkeypatch):
  monkeypatch.setattr(_patterned, "_MOST_DENSE_WEIGHTS", B * N * T * T - 1)
  module = make(STRIDED, dropout_rate=0.5, deterministic=True)
  x = normal(B, T, D)
  mask = np.ones((B, 1, T, T), bool)
  for keywords, named in (
    ({"mask": mask}, "`mask` needs"),
    ({"sow_weights": True}, "`sow_weights` needs"),
    ({"deterministic": False}, "`dropout_rate` above 0"),
  ):
    with pytest.raises(ValueError, match=named):
      module(x, **keywords)
  assert call(module, x).shape == x.shape


def test_cross_attention_and_a_pattern_that_is_not_causal():
  mask = np.random.default_rng(1).random((N, 4, 3)) < 0.6
  mask[:, :, 0] = True
  pattern = s2.from_block_mask(mask, block_size=4, is_causal=False)
  module = make(pattern)
  twin = unmasked_twin(module)
  x, keys = normal(B, 15, D), normal(B, 11, D, seed=1)
  tokens = mask.repeat(4, axis=1).repeat(4, axis=2)[None, :, :15, :11]
  tokens = np.broadcast_to(tokens, (B, N, 15, 11))
  oracles.assert_close(
    call(module, x, keys), call(twin, x, keys, mask=tokens), FORWARD
  )
  # `is_causal` makes it so.
  square = make(s2.from_block_mask(mask[:, :3], block_size=4, is_causal=False))
  twin = unmasked_twin(square)
  seen = np.tril(mask[:, :3].repeat(4, axis=1).repeat(4, axis=2))[:, :11, :11]
  oracles.assert_close(
    call(square, keys, is_causal=True),
    call(twin, keys, mask=np.broadcast_to(seen, (B, N, 11, 11))),
    FORWARD,
  )


def test_bfloat16_stays_close_to_float32():
  module, exact = make(STRIDED, dtype=jnp.bfloat16), make(STRIDED)
  x = normal(B, T, D)
  out, expected = call(module, x), call(exact, x)
  assert out.dtype == jnp.bfloat16
  error = np.abs(np.asarray(out.astype(jnp.float32) - expected)).max()
  assert error < 0.03 * np.abs(expected).max()


def test_a_batch_sharded_over_devices_gives_the_same_gradients():
  devices = 4
  mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
  module = make(STRIDED, rope_theta=100.0, moh=MOH, implementation=None)
  x = normal(2 * devices, T, D)

  @nnx.jit
  def step(module, x):
    return nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x))))(module)

  value, grads = step(module, x)
  graph, state = nnx.split(module)
  replicated = nnx.merge(
    graph, jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
  )
  rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
  with jax.set_mesh(mesh):
    sharded_value, sharded_grads = step(replicated, rows)
  oracles.assert_close(sharded_value, value, FORWARD)
  sharded = dict(nnx.to_flat_state(sharded_grads))
  for path, gradient in nnx.to_flat_state(grads):
    oracles.assert_close(
      sharded[path][...], gradient[...], GRADIENT, path, floor=1e-3
    )


def test_empty_inputs_give_empty_outputs():
  module = make(STRIDED)
  for shape in ((0, T, D), (B, 0, D)):
    assert module(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"pattern": s2.dense(N + 1)}, "`pattern.num_heads` must equal"),
    ({"execution": "dispatch"}, "`execution` must be None or 'dense'"),
    ({"implementation": "cuda"}, "`implementation` must be None or one of"),
  ],
)
def test_what_does_not_fit_is_refused_by_name(options, message):
  with pytest.raises(ValueError, match=message):
    make(**({"pattern": STRIDED} | options))(normal(B, T, D))


def test_a_cache_longer_than_a_block_mask_is_refused():
  with pytest.raises(ValueError, match="`pattern` covers 24 query tokens"):
    make(TABLE).init_cache((B, 25, D))


def test_a_pattern_must_be_given():
  with pytest.raises(TypeError, match="pattern"):
    S2Attention(N, D, rngs=nnx.Rngs(0))


def test_head_attention_without_either_is_moh_attention_without_plan():
  options = dict(qkv_features=N * H, num_kv_heads=K, rngs=nnx.Rngs(0))
  plain = HeadAttention(N, D, **options)
  twin = MoHAttention(N, D, moh=None, **options)
  nnx.update(twin, nnx.state(plain, nnx.Param))
  x = normal(B, T, D)
  np.testing.assert_array_equal(
    call(plain, x, is_causal=True), call(twin, x, is_causal=True)
  )


# ------------------------------------------------- nnx.MultiHeadAttention


def flax_layer(pattern, **options):
  options = {"decode": False, "rngs": nnx.Rngs(0)} | options
  follow = attention_fn(pattern)
  return nnx.MultiHeadAttention(
    N, D, qkv_features=N * H, num_kv_heads=K, attention_fn=follow, **options
  )


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_attention_fn_equals_s2_attention(batch):
  layer = flax_layer(PER_HEAD)
  module = make(PER_HEAD, implementation=None)
  nnx.update(module, nnx.state(layer, nnx.Param))
  x = normal(*batch, T, D)
  expected = call(module, x)
  oracles.assert_close(call(layer, x), expected, FORWARD)
  oracles.assert_close(call(layer, x, is_causal=True), expected, FORWARD)


def test_attention_fns_of_equal_patterns_are_equal():
  other = s2.strided(
    N, block_size=4, local_blocks=1, vertical_stride=2, num_kv_heads=K
  )
  assert attention_fn(STRIDED) == attention_fn(other)
  assert hash(attention_fn(STRIDED)) == hash(attention_fn(other))
  assert attention_fn(STRIDED) != attention_fn(PER_HEAD)


def test_attention_fn_refuses_what_it_cannot_honour():
  x = normal(B, T, D)
  with pytest.raises(ValueError, match="`mask` cannot be joined"):
    flax_layer(STRIDED)(x, mask=np.ones((B, N, T, T), bool))
  with pytest.raises(ValueError, match="`sow_weights` needs"):
    flax_layer(STRIDED)(x, sow_weights=True)
  with pytest.raises(ValueError, match="`dropout_rate` above 0"):
    flax_layer(STRIDED, dropout_rate=0.5)(x, deterministic=False)
  with pytest.raises(ValueError, match="`precision` must be None"):
    flax_layer(STRIDED, precision="highest")(x)
  q = normal(B, T, N, H)
  with pytest.raises(ValueError, match="`bias` cannot be added"):
    attention_fn(STRIDED)(q, q, q, np.zeros((B, N, T, T), np.float32))
  with pytest.raises(ValueError, match="`input_positions` cannot"):
    attention_fn(STRIDED)(q, q, q, input_positions=np.zeros((B, T)))
  layer = flax_layer(STRIDED, decode=True)
  layer.init_cache((B, T, D))
  with pytest.raises(ValueError, match="masks its cache while decoding"):
    layer(x[:, :1])
  # Dropout that is switched off is no dropout.
  quiet = flax_layer(STRIDED, dropout_rate=0.5, deterministic=True)
  oracles.assert_close(quiet(x), flax_layer(STRIDED)(x), FORWARD)


def test_so_many_weights_that_a_cpu_does_not_keep_them(monkeypatch):
  """All heads on: the kernels, as accelerators take them, change nothing."""
  layer = HeadAttention(
    4, in_features=16, num_kv_heads=2, rope_theta=1e4, rngs=nnx.Rngs(0)
  )
  x = jax.random.normal(jax.random.key(1), (2, 24, 16))

  def loss(layer, x):
    return (layer(x, is_causal=True) ** 2).sum()

  def both():
    state = nnx.grad(loss)(layer, x)
    return layer(x, is_causal=True), jax.tree.leaves(state)

  few, grads = both()
  called = []
  kernels = _attention.patterned_attention

  def noted(**arguments):
    called.append(True)
    return kernels(**arguments)

  monkeypatch.setattr(_attention, "patterned_attention", noted)
  monkeypatch.setattr(_attention, "_MANY_WEIGHTS", 1)
  many, same_grads = both()
  assert called
  np.testing.assert_allclose(many, few, atol=FORWARD)
  for got, want in zip(same_grads, grads, strict=True):
    np.testing.assert_allclose(got, want, atol=GRADIENT)
