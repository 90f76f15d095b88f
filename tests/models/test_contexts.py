"""Layers that see a part of the context: the config, and the model."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import s2
from jaxheads.models import ModelConfig, generate, token_nats
from jaxheads.moh import MoHConfig
from jaxheads.nn import auxiliary_loss
from tests import oracles
from tests.models.builders import (
  BY_NORM,
  ROUTED,
  forward,
  random_tokens,
  small_config,
  small_model,
)

STRIDED = s2.strided(
  4, block_size=4, local_blocks=1, vertical_stride=2, num_kv_heads=2
)
WINDOW = s2.sliding_window(4, block_size=4, local_blocks=1)
SEEN = np.tril(np.random.default_rng(0).random((8, 8)) < 0.5)
TABLE = s2.from_block_mask(
  SEEN | np.eye(8, dtype=bool), block_size=4, num_heads=4
)


def hybrid(plans=(None,) * 3, contexts=(STRIDED, None, STRIDED), **fields):
  """By the definition, which compiles fast."""
  fields = {"implementation": "reference"} | fields
  return small_config(*plans, contexts=contexts, **fields)


def test_no_contexts_means_none_in_every_layer():
  assert small_config(None, ROUTED).contexts == (None, None)
  assert small_config(None, contexts=[None]) == small_config(None)


@pytest.mark.parametrize(
  "config",
  [
    hybrid(),
    hybrid((ROUTED, None, ROUTED), (None, WINDOW, TABLE)),
    small_config(ROUTED, None),
  ],
  ids=["hybrid", "routed and table", "neither"],
)
def test_survives_json(config):
  fields = json.loads(json.dumps(config.to_dict()))
  again = ModelConfig.from_dict(fields)
  assert again == config
  assert hash(again) == hash(config)


def test_what_was_written_before_contexts_existed_means_none():
  config = small_config(ROUTED, None)
  fields = config.to_dict()
  del fields["contexts"]
  assert ModelConfig.from_dict(fields) == config


def test_runs_join_layers_of_equal_plan_and_context():
  config = hybrid(
    (None, None, ROUTED, ROUTED, None),
    (STRIDED, STRIDED, STRIDED, None, None),
  )
  assert config.runs == (
    (None, STRIDED, None, 2),
    (ROUTED, STRIDED, None, 1),
    (ROUTED, None, None, 1),
    (None, None, None, 1),
  )


def test_flops_count_visible_pairs():
  length = 19
  config = hybrid((None, ROUTED), (STRIDED, WINDOW))
  saved = 0.0
  for pattern, active in ((STRIDED, 4), (WINDOW, 3)):
    seen = pattern.to_dense(length).sum() / (4 * length)  # Keys a query.
    saved += 4 * active * 4 * ((length + 1) / 2 - seen)
  without = dataclasses.replace(config, contexts=())
  expected = without.flops_per_token(length) - saved
  assert config.flops_per_token(length) == pytest.approx(expected, rel=1e-12)
  densities = [
    p.to_dense(length).mean((1, 2)).mean() for p in (STRIDED, WINDOW)
  ]
  triangle = (length + 1) / 2 / length
  assert config.visible_fraction(length) == pytest.approx(
    np.mean(densities) / triangle
  )
  assert without.visible_fraction(length) == 1.0


def test_dense_sees_everything_with_as_many_parameters():
  config = hybrid()
  dense = config.dense()
  assert dense.contexts == dense.head_plans == (None,) * 3
  assert dense.num_params == config.num_params
  assert len(dense.runs) == 1


@pytest.mark.parametrize(
  ("contexts", "error", "message"),
  [
    ((STRIDED,), ValueError, "`contexts` must hold.* 2 layers.*got 1"),
    ((STRIDED, 3), TypeError, "`contexts.1.` must be a Pattern or None"),
    (
      (s2.dense(5), None),
      ValueError,
      "`contexts.0..num_heads` must equal `num_heads` .4., got 5",
    ),
    (
      (s2.dense(4, num_kv_heads=4), None),
      ValueError,
      "`contexts.0..num_kv_heads` must equal `num_kv_heads` .2.",
    ),
    (
      (dataclasses.replace(TABLE, is_causal=False), None),
      ValueError,
      "`contexts.0.` must be causal",
    ),
    (
      (s2.from_block_mask(SEEN, block_size=2, num_heads=4), None),
      ValueError,
      "`contexts.0.` must reach `max_seq_len` .32.",
    ),
  ],
)  # fmt: skip
def test_contexts_that_do_not_fit_are_refused(contexts, error, message):
  with pytest.raises(error, match=message):
    small_config(None, None, contexts=contexts)


def test_a_context_that_hides_nothing_changes_nothing():
  config = hybrid((None, ROUTED), (s2.dense(4, block_size=4), s2.dense(4)))
  plain = small_model(dataclasses.replace(config, contexts=()))
  model = nnx.merge(nnx.graphdef(small_model(config)), nnx.state(plain))
  tokens = random_tokens(2, 13)
  np.testing.assert_allclose(
    forward(model, tokens), forward(plain, tokens), rtol=1e-5, atol=1e-5
  )


def test_logits_depend_on_what_the_layers_let_through():
  """One window layer: a block. A dense one behind it: everything before."""
  tokens = random_tokens(1, 12)

  def influences(contexts):
    model = small_model(hybrid((None,) * len(contexts), contexts))
    graphdef, state = nnx.split(model)
    arrays = nnx.to_pure_dict(state)

    def last_logits(embedded):
      model = nnx.merge(graphdef, arrays)
      model.embedding = nnx.static(lambda _: embedded)
      return model(tokens)[0, 9].sum()

    gradient = jax.jit(jax.grad(last_logits))(model.embedding(tokens))
    return np.flatnonzero(np.abs(gradient).max(axis=(0, 2)))

  np.testing.assert_array_equal(influences((WINDOW,)), [8, 9])
  np.testing.assert_array_equal(influences((WINDOW, None)), range(10))


GROUPS = MoHConfig(
  num_heads=4, num_shared=0, top_k=2, group_size=2, gates="paper"
)
# A hybrid model whose layers differ in both ways, and every other kind of
# routed layer with a context, before a plain one. Deeper models add up more
# rounding than there is room for.
MODELS = {
  "hybrid": ((ROUTED, None, ROUTED), (None, STRIDED, STRIDED)),
  "table": ((ROUTED, None), (TABLE, None)),
  "window, by norm": ((BY_NORM, None), (WINDOW, None)),
  "groups": ((GROUPS, None), (STRIDED, None)),
}


@nnx.jit
def loss_and_gradients(model, tokens):
  def loss(model):
    logits = model(tokens[:, :-1], deterministic=False)
    nats = token_nats(logits, tokens[:, 1:]).mean()
    return nats + 0.1 * auxiliary_loss(model)

  return nnx.value_and_grad(loss)(model)


@pytest.mark.parametrize(
  ("name", "implementation"),
  [pytest.param("hybrid", "xla", marks=pytest.mark.slow)]
  + [
    pytest.param(name, implementation, marks=pytest.mark.exhaustive)
    for name in MODELS
    for implementation in ("xla", "reference")
    if (name, implementation) != ("hybrid", "xla")
  ],
)
def test_dispatch_gives_the_dense_loss_and_gradients(name, implementation):
  dense = hybrid(*MODELS[name], execution="dense")
  dispatched = dataclasses.replace(
    dense, execution="dispatch", implementation=implementation
  )
  tokens = random_tokens(2, 30)
  (expected, wanted), (got, gradients) = (
    loss_and_gradients(small_model(config), tokens)
    for config in (dense, dispatched)
  )
  np.testing.assert_allclose(got, expected, rtol=1e-5)
  leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(wanted))
  for (path, one), other in zip(
    leaves, jax.tree.leaves(nnx.to_pure_dict(gradients)), strict=True
  ):
    assert np.abs(one).max() > 0, path
    oracles.assert_close(other, one, 2e-5, jax.tree_util.keystr(path))


def test_decoding_in_chunks_equals_one_call():
  model = small_model(hybrid((None, ROUTED), (STRIDED, WINDOW)))
  tokens = random_tokens(2, 17)
  expected = forward(model, tokens)
  model.init_cache(2, 20)
  outs, start = [], 0
  for count in (8, 1, 8):
    part = tokens[:, start : start + count]
    outs.append(forward(model, part, decode=True))
    start += count
  np.testing.assert_allclose(
    jnp.concatenate(outs, axis=1), expected, rtol=1e-5, atol=1e-5
  )


def test_generate_continues_as_the_whole_model_would():
  model = small_model(hybrid((None, None), (STRIDED, None)))
  prompt = random_tokens(1, 7)
  tokens = list(
    np.concatenate(
      list(generate(model, prompt, max_new_tokens=6, temperature=0))
    )
  )
  text = np.concatenate([np.asarray(prompt[0]), tokens])
  logits = forward(model, jnp.asarray(text[None, :-1], jnp.int32))
  np.testing.assert_array_equal(np.argmax(logits[0, 6:], axis=-1), tokens)
