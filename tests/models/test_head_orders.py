"""A decoder whose heads are stored in another order answers the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import s2
from jaxheads.models import DecoderLM, reordered
from jaxheads.moh import MoHConfig
from tests.models.builders import (
  forward,
  random_tokens,
  small_config,
  small_model,
)

FORWARD = dict(rtol=1e-5, atol=1e-5)
ROUTED = MoHConfig(num_heads=6, num_shared=2, top_k=2)
SHARDED = s2.strided(
  6, block_size=2, local_blocks=1, vertical_stride=3, num_kv_heads=3
)
ROUND = (2, 3, 4, 5, 0, 1)  # Whole groups; not its own inverse.
SWAP = (4, 5, 2, 3, 0, 1)
OWN = small_config(
  ROUTED,
  ROUTED,
  None,
  num_heads=6,
  num_kv_heads=3,
  contexts=(None, None, SHARDED),
)
ALIKE = dataclasses.replace(OWN, head_orders=(ROUND,) * 3)
# Layers that were alike no longer are, and go to stacks of their own.
PARTED = dataclasses.replace(OWN, head_orders=(None, SWAP, ROUND))


def test_layers_are_alike_if_their_orders_are():
  assert [run.num_layers for run in OWN.runs] == [2, 1]
  assert [run.num_layers for run in ALIKE.runs] == [2, 1]
  assert [run.num_layers for run in PARTED.runs] == [1] * 3
  assert ALIKE.stored_contexts[2].rules == tuple(
    SHARDED.rules[head] for head in ROUND
  )
  assert OWN.stored_contexts == OWN.contexts


@pytest.mark.exhaustive
@pytest.mark.parametrize("config", [ALIKE, PARTED], ids=["alike", "parted"])
def test_a_reordered_model_is_the_same_function(config):
  own = small_model(OWN)
  stored = reordered(own, config)
  assert stored.config == config
  tokens = random_tokens(2, 11)
  np.testing.assert_allclose(
    forward(stored, tokens), forward(own, tokens), **FORWARD
  )
  np.testing.assert_array_equal(
    nnx.jit(lambda m: m.head_activity(tokens))(stored),
    nnx.jit(lambda m: m.head_activity(tokens))(own),
  )
  query = np.asarray(own.stacks[0].attention.query.kernel[...])
  moved = np.asarray(stored.stacks[0].attention.query.kernel[...])
  order = config.head_orders[0] or range(6)
  np.testing.assert_array_equal(moved[0], query[0][:, list(order)])
  for a, b in zip(
    jax.tree.leaves(nnx.state(reordered(stored, OWN))),
    jax.tree.leaves(nnx.state(own)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def test_from_one_order_to_another_without_the_own_one_between():
  own = small_model(OWN)
  there = reordered(reordered(own, PARTED), ALIKE)
  for a, b in zip(
    jax.tree.leaves(nnx.state(there)),
    jax.tree.leaves(nnx.state(reordered(own, ALIKE))),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_a_seed_makes_the_same_function_in_any_order():
  own, stored = (DecoderLM(c, rngs=nnx.Rngs(3)) for c in (OWN, ALIKE))
  for a, b in zip(
    jax.tree.leaves(nnx.state(reordered(own, ALIKE))),
    jax.tree.leaves(nnx.state(stored)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_decoding_with_a_cache():
  own = small_model(OWN)
  tokens = random_tokens(2, 9)
  answers = []
  for model in (own, reordered(own, ALIKE)):
    model.init_cache(2, 16)
    prompt = forward(model, tokens[:, :8], decode=True)
    answers.append(
      jnp.concatenate(
        [prompt, forward(model, tokens[:, 8:], decode=True)], axis=1
      )
    )
  np.testing.assert_allclose(answers[1], answers[0], **FORWARD)
