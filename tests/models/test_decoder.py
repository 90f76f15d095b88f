"""The decoder against an oracle, and what must hold for any model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import DecoderLM
from jaxheads.moh import MoHConfig
from jaxheads.nn import AuxLoss, RoutingStats, auxiliary_loss
from tests.models.builders import (
  ALL_ROUTED,
  ALL_SHARED,
  BY_NORM,
  MIXED,
  NO_SHARED,
  ROUTED,
  VOCAB,
  forward,
  random_tokens,
  small_config,
  small_model,
)
from tests.models.oracle import decoder_logits

FORWARD = dict(rtol=1e-5, atol=1e-5)
GRADIENTS = dict(rtol=2e-5, atol=2e-5)


def layer_blocks(model):
  """Every layer as a block of its own, cut out of the stacks."""
  for stack, run in zip(model.stacks, model.config.runs, strict=True):
    graphdef, state = nnx.split(stack)
    for index in range(run.num_layers):
      # NumPy cuts without compiling a program for every shape.
      yield nnx.merge(
        graphdef, jax.tree.map(lambda x, i=index: np.asarray(x)[i], state)
      )


def oracle_weights(model):
  def numpy(variable):
    return np.asarray(variable[...], np.float64)

  layers = []
  for block in layer_blocks(model):
    attention = block.attention
    layer = {
      "attention_norm": numpy(block.attention_norm.scale),
      "mlp_norm": numpy(block.mlp_norm.scale),
      **{
        name: numpy(getattr(attention, name).kernel)
        for name in ("query", "key", "value", "out")
      },
      **{
        name: numpy(getattr(block.mlp, name).kernel)
        for name in ("gate", "up", "down")
      },
    }
    for name in ("router_routed", "router_kind", "router_shared"):
      if getattr(attention, name, None) is not None:
        layer[name] = numpy(getattr(attention, name))
    layers.append(layer)
  embedding = numpy(model.embedding.embedding)
  unembedding = model.unembedding
  return {
    "embedding": embedding,
    "norm": numpy(model.norm.scale),
    "unembedding": (embedding.T if unembedding is None else numpy(unembedding)),
    "layers": layers,
  }


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"tie_embeddings": True, "num_kv_heads": 1, "norm_eps": 0.1},
    {"num_kv_heads": 4, "rope_theta": 100.0},
  ],
  ids=["defaults", "tied-one-kv-head", "all-kv-heads"],
)
def test_equals_the_oracle(fields):
  plans = (None, ROUTED, ROUTED, ALL_ROUTED, ALL_SHARED, NO_SHARED)
  config = small_config(*plans, **fields)
  model = small_model(config)
  tokens = random_tokens(2, 9)
  logits = forward(model, tokens)
  for row in range(2):
    expected = decoder_logits(
      oracle_weights(model),
      np.asarray(tokens[row]),
      plans=plans,
      num_kv_heads=config.num_kv_heads,
      eps=config.norm_eps,
      theta=config.rope_theta,
    )
    # Logits of this size are sums of about a hundred terms.
    np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=1e-4)


def test_scanned_equals_layer_by_layer():
  model = small_model(small_config(*MIXED))
  tokens = random_tokens(2, 9)

  @nnx.jit
  def layer_by_layer(model, blocks):
    x = model.embedding(tokens)
    for block in blocks:
      x = block(x)
    return model.norm(x) @ model.unembedding[...]

  expected = layer_by_layer(model, list(layer_blocks(model)))
  np.testing.assert_allclose(forward(model, tokens), expected, **FORWARD)


@pytest.mark.slow
def test_initial_parameters():
  """Truncated normals of 1 / 8, smaller where a layer adds to the residual.

  A normal cut at two standard deviations keeps 0.88 of its own.
  """
  config = small_config(
    ROUTED, ROUTED, embed_dim=64, mlp_dim=128, head_dim=16, vocab_size=500
  )
  model = DecoderLM(config, rngs=nnx.Rngs(0))
  block = model.stacks[0]
  attention, mlp = block.attention, block.mlp
  plain = [attention.query.kernel, mlp.gate.kernel, mlp.up.kernel]
  plain += [model.embedding.embedding, model.unembedding]
  for param in plain:
    assert np.std(param[...]) == pytest.approx(0.125 * 0.88, rel=0.05)
  for param in (attention.out.kernel, mlp.down.kernel):
    assert np.std(param[...]) == pytest.approx(0.0625 * 0.88, rel=0.05)
  # Layers of one run do not start alike.
  for leaf in jax.tree.leaves(nnx.state((attention, mlp), nnx.Param)):
    assert leaf.shape[0] == 2
    assert not np.allclose(leaf[0], leaf[1])


@pytest.mark.slow
def test_is_causal():
  """Logits at t depend on every token up to t and on none after."""
  model = small_model(small_config(*MIXED))
  tokens = random_tokens(1, 6)
  graphdef, state = nnx.split(model)
  arrays = nnx.to_pure_dict(state)

  def logit_sum(embedded, t):
    """Logits at t as a function of the embedded tokens."""
    model = nnx.merge(graphdef, arrays)
    model.embedding = nnx.static(lambda _: embedded)
    return model(tokens)[0, t].sum()

  gradient = jax.vmap(jax.grad(logit_sum), in_axes=(None, 0))
  gradients = jax.jit(gradient)(model.embedding(tokens), jnp.arange(6))
  size = np.abs(gradients).max(axis=(1, 3))  # [output t, input s]
  after = np.triu(np.ones((6, 6), bool), k=1)
  np.testing.assert_array_equal(size[after], 0.0)
  assert (size[~after] > 1e-4).all()


@pytest.mark.slow
def test_gradients_and_loss_do_not_depend_on_remat():
  tokens = random_tokens(2, 8)

  def loss_and_gradients(remat):
    model = small_model(small_config(ROUTED, ROUTED, BY_NORM, remat=remat))

    def loss(model):
      logits = model(tokens, deterministic=False)
      log_probs = jax.nn.log_softmax(logits)
      picked = jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)
      return -picked.mean() + 0.5 * auxiliary_loss(model)

    graphdef, state = nnx.split(model)
    jaxpr = jax.make_jaxpr(lambda state: loss(nnx.merge(graphdef, state)))
    value, gradients = nnx.jit(nnx.value_and_grad(loss))(model)
    return value, gradients, "prevent_cse" in str(jaxpr(state))

  value, gradients, is_remat = loss_and_gradients(False)
  value_r, gradients_r, is_remat_r = loss_and_gradients(True)
  assert (is_remat, is_remat_r) == (False, True)
  np.testing.assert_allclose(value, value_r, **FORWARD)
  for a, b in zip(
    jax.tree.leaves(gradients), jax.tree.leaves(gradients_r), strict=True
  ):
    assert np.abs(a).max() > 0
    np.testing.assert_allclose(a, b, **GRADIENTS)


def test_program_does_not_grow_with_depth():
  def program_lines(num_layers):
    config = small_config(*(ROUTED,) * num_layers, remat=True)
    graphdef, state = nnx.split(
      nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
    )

    def loss(state, tokens):
      model = nnx.merge(graphdef, state)
      return model(tokens, deterministic=False).sum() + auxiliary_loss(model)

    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    lowered = jax.jit(jax.grad(loss, allow_int=True)).lower(state, tokens)
    return len(lowered.as_text().splitlines())

  assert program_lines(2) == program_lines(8)


def test_layer_state_is_written_back():
  config = small_config(*MIXED, remat=True)
  model = small_model(config)
  tokens = random_tokens(2, 9)
  forward(model, tokens, deterministic=False)
  blocks = list(layer_blocks(model))
  for block, plan in zip(blocks, config.head_plans, strict=True):
    losses = jax.tree.leaves(nnx.state(block, AuxLoss))
    loads = jax.tree.leaves(nnx.state(block, RoutingStats))
    # Layers without a choice have nothing to report.
    assert len(losses) == (plan is not None and plan.routes)
    assert all(loss > 0 for loss in losses)
    assert len(loads) == (plan is not None)
    for load in loads:
      np.testing.assert_allclose(load.sum(), plan.num_active, **FORWARD)
  # Different layers of one run keep statistics of their own.
  loads = nnx.state(model.stacks[1], RoutingStats)
  first, second = jax.tree.leaves(loads)[0]
  assert not np.allclose(first, second)
  forward(model, tokens)
  assert float(auxiliary_loss(model)) == 0.0


def test_neutral_routers_with_all_heads_equal_the_dense_model():
  config = small_config(ALL_ROUTED, ALL_ROUTED, ALL_SHARED)
  model = small_model(config)
  for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    if "router" in str(path):
      param[...] = jnp.zeros_like(param[...])
  dense = small_model(config.dense(), seed=7)
  # The dense model joins what were two runs: copy layer by layer.
  blocks = [nnx.state(block, nnx.Param) for block in layer_blocks(model)]
  kept = [
    {
      path: value[...]
      for path, value in nnx.to_flat_state(block)
      if "router" not in str(path)
    }
    for block in blocks
  ]
  for path, param in nnx.to_flat_state(nnx.state(dense.stacks[0], nnx.Param)):
    param[...] = jnp.stack([block[path] for block in kept])
  for name in ("embedding", "norm", "unembedding"):
    setattr(dense, name, getattr(model, name))
  tokens = random_tokens(2, 9)
  np.testing.assert_allclose(
    forward(model, tokens), forward(dense, tokens), **FORWARD
  )


def test_neutral_means_zeroed_routers():
  """The test above can fail: with routers that speak, the models differ."""
  model = small_model(small_config(ALL_ROUTED))
  tokens = random_tokens(2, 9)
  before = forward(model, tokens)
  router = model.stacks[0].attention.router_routed
  router[...] = jnp.zeros_like(router[...])
  assert np.abs(before - forward(model, tokens)).max() > 1e-2


def test_decoding_equals_the_full_forward():
  model = small_model(small_config(*MIXED))
  tokens = random_tokens(2, 9)
  expected = forward(model, tokens)
  model.init_cache(2, 16)
  # A prompt, single tokens, a chunk; twice, because the cache can be emptied.
  for start, stop in ((0, 4), (4, 5), (5, 9)):
    logits = forward(model, tokens[:, start:stop], decode=True)
    np.testing.assert_allclose(logits, expected[:, start:stop], **FORWARD)
  model.init_cache(2, 16)
  logits = forward(model, tokens[:, :4], decode=True)
  np.testing.assert_allclose(logits, expected[:, :4], **FORWARD)


def test_decoding_with_a_head_that_was_never_chosen_before():
  """Keys and values of a head exist for tokens that did not choose it."""
  plan = MoHConfig(num_heads=4, num_shared=1, top_k=1, gates="paper")
  model = small_model(small_config(plan))
  router = model.stacks[0].attention.router_routed
  # Token 0 has the router's attention on head 1, token 1 on head 3.
  model.stacks[0].attention_norm.scale[...] = jnp.ones((1, 8))
  table = 0.1 * np.random.default_rng(0).normal(size=(VOCAB, 8))
  table[0, 0] = table[1, 1] = 3.0
  model.embedding.embedding[...] = jnp.asarray(table, jnp.float32)
  weights = np.zeros((1, 8, 3))
  weights[0, 0, 0] = weights[0, 1, 2] = 10.0
  router[...] = jnp.asarray(weights, jnp.float32)

  prompt = jnp.zeros((1, 6), jnp.int32)
  tokens = jnp.concatenate([prompt, jnp.ones((1, 2), jnp.int32)], axis=1)
  activity = model.head_activity(tokens)[0, 0]
  np.testing.assert_array_equal(activity[:6, 1:], [[True, False, False]] * 6)
  np.testing.assert_array_equal(activity[6:, 1:], [[False, False, True]] * 2)

  expected = forward(model, tokens)
  model.init_cache(1, 8)
  forward(model, prompt, decode=True)
  for t in (6, 7):
    logits = forward(model, tokens[:, t : t + 1], decode=True)
    np.testing.assert_allclose(logits[:, 0], expected[:, t], **FORWARD)


def test_padding_left_and_right_agree_with_no_padding():
  model = small_model(small_config(*MIXED))
  tokens = random_tokens(1, 5)
  expected = forward(model, tokens, deterministic=False)
  losses = [auxiliary_loss(model)]
  rubbish = random_tokens(1, 3, seed=9)
  count = jnp.arange(5, dtype=jnp.int32)[None]
  none = jnp.zeros((1, 3), jnp.int32)
  real, padding = jnp.ones((1, 5), bool), jnp.zeros((1, 3), bool)
  for order, part in (
    (slice(None), slice(0, 5)),
    (slice(None, None, -1), slice(3, 8)),
  ):

    def join(*pieces, order=order):
      return jnp.concatenate(pieces[order], axis=1)

    logits = forward(
      model,
      join(tokens, rubbish),
      positions=join(count, none),
      token_mask=join(real, padding),
      deterministic=False,
    )
    np.testing.assert_allclose(logits[:, part], expected, **FORWARD)
    losses.append(auxiliary_loss(model))
  np.testing.assert_allclose(losses[1:], losses[0], **FORWARD)


def test_packed_documents_do_not_see_each_other():
  model = small_model(small_config(*MIXED))
  a, b = random_tokens(1, 4, seed=1), random_tokens(1, 4, seed=2)
  packed = forward(
    model,
    jnp.concatenate([a, b], axis=1),
    segment_ids=jnp.asarray([[0] * 4 + [1] * 4], jnp.int32),
    positions=jnp.asarray([[*range(4), *range(4)]], jnp.int32),
  )
  np.testing.assert_allclose(packed[:, :4], forward(model, a), **FORWARD)
  np.testing.assert_allclose(packed[:, 4:], forward(model, b), **FORWARD)


def test_head_activity():
  config = small_config(*MIXED)
  model = small_model(config)
  activity = model.head_activity(random_tokens(2, 9))
  assert activity.shape == (7, 2, 9, 4)
  assert activity.dtype == jnp.bool_
  for layer, plan in enumerate(config.head_plans):
    active = 4 if plan is None else plan.num_active
    shared = 4 if plan is None else plan.num_shared
    assert (activity[layer].sum(axis=-1) == active).all()
    assert activity[layer][..., :shared].all()
  # What the layers report about themselves.
  forward(model, random_tokens(2, 9))
  for layer, block in enumerate(layer_blocks(model)):
    for load in jax.tree.leaves(nnx.state(block, RoutingStats)):
      np.testing.assert_allclose(
        activity[layer].mean(axis=(0, 1)), load, **FORWARD
      )


@pytest.mark.parametrize("tie", [False, True])
def test_bfloat16_keeps_float32_parameters_and_logits(tie):
  config = small_config(
    None, ROUTED, BY_NORM, dtype="bfloat16", tie_embeddings=tie
  )
  model = small_model(config)
  tokens = random_tokens(2, 9)
  logits = forward(model, tokens)
  assert logits.dtype == jnp.float32
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.float32)}
  # Compute in bfloat16 has 8 bits: near the float32 model, and not equal.
  full = forward(
    small_model(dataclasses.replace(config, dtype="float32")), tokens
  )
  error = float(jnp.sqrt(jnp.mean((logits - full) ** 2)))
  assert 1e-4 < error / float(jnp.std(full)) < 0.2
  model.init_cache(2, 16)
  cache = jax.tree.leaves(nnx.state(model, nnx.Cache))
  assert jnp.dtype(jnp.bfloat16) in {leaf.dtype for leaf in cache}


def test_bfloat16_parameters():
  config = small_config(ROUTED, dtype="bfloat16", param_dtype="bfloat16")
  model = small_model(config)
  params = jax.tree.leaves(nnx.state(model, nnx.Param))
  assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.bfloat16)}
  assert forward(model, random_tokens(1, 4)).dtype == jnp.float32


def test_bad_calls_name_the_argument():
  model = small_model(small_config(ROUTED))
  tokens = random_tokens(1, 4)
  with pytest.raises(ValueError, match=r"`tokens` must be 1 to 32 .* got 33"):
    model(random_tokens(1, 33))
  with pytest.raises(ValueError, match=r"`tokens` must be 1 to 32 .* got 0"):
    model(tokens[:, :0])
  with pytest.raises(ValueError, match=r"`max_len` must be 1 to 32 .* got 40"):
    model.init_cache(1, 40)
  with pytest.raises(ValueError, match=r"`tokens` must have shape \[B, T\]"):
    model(tokens[0])
  with pytest.raises(TypeError, match="`tokens` must be integers, got float32"):
    model(tokens.astype(jnp.float32))
  with pytest.raises(ValueError, match="`positions` must have the shape"):
    model(tokens, positions=jnp.arange(4, dtype=jnp.int32))
  with pytest.raises(TypeError, match="`token_mask` must be bool, got int32"):
    model(tokens, token_mask=tokens)
  with pytest.raises(ValueError, match="must be None when `decode`"):
    model(tokens, token_mask=tokens > 0, decode=True)
