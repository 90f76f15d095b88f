"""Layers and models on a mesh whose devices share sequences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads import UserError, s2
from jaxheads.models import generate
from jaxheads.nn import HeadAttention
from jaxheads.sharding import MeshShape, chunks, make_mesh
from tests.models.builders import (
  ROUTED,
  forward,
  random_tokens,
  small_config,
  small_model,
)
from tests.oracles import assert_close

STRIDED = s2.strided(
  4, block_size=2, local_blocks=2, vertical_stride=2, num_kv_heads=2
)


def mesh(devices):
  return make_mesh(MeshShape(context=devices), jax.devices()[:devices])


@pytest.fixture  # A call leaves the statistics on its mesh.
def model():
  config = small_config(None, ROUTED, None, contexts=(None, None, STRIDED))
  return small_model(config)


@pytest.mark.parametrize(
  "given",
  [
    pytest.param((), marks=pytest.mark.exhaustive),
    ("positions",),
    pytest.param(("token_mask", "segment_ids"), marks=pytest.mark.exhaustive),
  ],
  ids=str,
)
def test_logits_are_those_of_one_device(model, given):
  tokens = random_tokens(2, 16)
  rng = np.random.default_rng(1)
  inputs = {
    "positions": jnp.arange(16)[None] * 3 + jnp.array([[0], [5]]),
    "token_mask": jnp.asarray(rng.random((2, 16)) < 0.7),
    "segment_ids": jnp.asarray(np.sort(rng.integers(0, 3, (2, 16)))),
  }
  inputs = {name: inputs[name] for name in given}
  alone = np.asarray(forward(model, tokens, **inputs))
  with jax.set_mesh(mesh(2)):
    split = np.asarray(forward(model, tokens, **inputs))
  real = np.asarray(inputs.get("token_mask", np.ones((2, 16), bool)))
  assert_close(split[real], alone[real], 1e-5)


@pytest.mark.exhaustive
def test_decoding_keeps_whole_sequences(model):
  """The cache is not split: any length goes."""
  prompt = random_tokens(1, 5)
  options = dict(max_new_tokens=4, temperature=0.0)
  alone = list(generate(model, prompt, **options))
  with jax.set_mesh(mesh(2)):
    split = list(generate(model, prompt, **options))
  np.testing.assert_array_equal(alone, split)


def test_sequences_that_do_not_split_are_refused(model):
  with jax.set_mesh(mesh(4)):
    with pytest.raises(UserError, match="multiple of 8, got 20.*nearest is 16"):
      forward(model, random_tokens(1, 20))
    # A chunk of 2 is half a shard of 2 blocks of 2.
    with pytest.raises(UserError, match="multiple of 32, got 16"):
      forward(model, random_tokens(1, 16))


def layer(**options):
  return HeadAttention(
    4, 8, num_kv_heads=2, use_bias=False, rngs=nnx.Rngs(0), **options
  )


@pytest.mark.parametrize(
  ("pattern", "length"), [(None, 15), (STRIDED, 16), (STRIDED, 14)]
)
def test_a_layer_alone_has_tokens_in_their_own_order(pattern, length):
  """And gathers those that do not split."""
  attention = layer(pattern=pattern, rope_theta=100.0)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, length, 8)), "f4")
  alone = attention(x, is_causal=True)
  with jax.set_mesh(mesh(2)):
    split = nnx.jit(lambda attention, x: attention(x, is_causal=True))(
      attention, x
    )
  assert_close(split, alone, 1e-5)


def test_balanced_layers_count_positions_in_the_original_order():
  attention = layer(rope_theta=100.0)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 16, 8)), "f4")
  alone = attention(x, is_causal=True)
  order = chunks.balanced_order(16, 2)
  with jax.set_mesh(mesh(2)):
    split = nnx.jit(
      lambda attention, x: attention(x, is_causal=True, balanced=True)
    )(attention, x[:, order])
  assert_close(split, alone[:, order], 1e-5)


@pytest.mark.parametrize(
  "options",
  [
    {"is_causal": False},
    {"mask": np.ones((1, 1, 16, 16), bool)},
    {"sow_weights": True},
  ],
  ids=str,
)
def test_what_needs_whole_sequences_is_refused(options):
  attention = layer()
  options = {"is_causal": True, **options}
  with jax.set_mesh(mesh(2)), pytest.raises(ValueError, match="`balanced`"):
    attention(jnp.zeros((1, 16, 8)), balanced=True, **options)
