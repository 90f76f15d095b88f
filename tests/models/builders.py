"""Small models that the tests of this folder share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.moh import MoHConfig

VOCAB = 13

ROUTED = MoHConfig(num_heads=4, num_shared=1, top_k=2)
BY_NORM = MoHConfig(num_heads=4, num_shared=2, top_k=1, router="query_norm")
ALL_ROUTED = MoHConfig(num_heads=4, num_shared=1, top_k=3)  # K = E.
ALL_SHARED = MoHConfig(num_heads=4, num_shared=4, top_k=0)  # K = 0.
NO_SHARED = MoHConfig(num_heads=4, num_shared=0, top_k=2)
# Every kind of layer, with one run of two equal ones.
MIXED = (None, ROUTED, ROUTED, ALL_ROUTED, ALL_SHARED, NO_SHARED, BY_NORM)


def small_config(*plans: MoHConfig | None, **fields) -> ModelConfig:
  """A model of 4 heads of size 4 over 2 KV heads, one layer for each plan."""
  return ModelConfig(
    **{
      "vocab_size": VOCAB,
      "num_layers": len(plans),
      "embed_dim": 8,
      "mlp_dim": 12,
      "num_heads": 4,
      "num_kv_heads": 2,
      "head_dim": 4,
      "max_seq_len": 32,
      "head_plans": plans,
      **fields,
    }
  )


def small_model(config: ModelConfig, seed: int = 0) -> DecoderLM:
  """A model whose parameters are so large that every part of it matters.

  Drawn by NumPy: compiling JAX's random numbers for every shape takes longer
  than most tests.
  """
  random = np.random.default_rng(seed)
  graphdef, params, rest = nnx.split(
    nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))),
    nnx.Param,
    ...,
  )

  def draw(path, leaf):
    mean = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
    values = mean + 0.3 * random.normal(size=leaf.shape)
    return jnp.asarray(values, leaf.dtype)

  params = jax.tree_util.tree_map_with_path(draw, params)
  rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
  return nnx.merge(graphdef, params, rest)


@nnx.jit(static_argnames=("decode", "deterministic"))
def forward(model: DecoderLM, tokens: jax.Array, **arguments) -> jax.Array:
  """The model's call, compiled as a whole."""
  return model(tokens, **arguments)


def random_tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
  tokens = np.random.default_rng(seed).integers(0, VOCAB, (batch, length))
  return jnp.asarray(tokens, jnp.int32)
