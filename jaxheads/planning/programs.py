"""The programs of a model as they are, on arrays that are only described.

What a plan compiles is what training and generation run: the same functions,
given shapes and places instead of arrays.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.models.generate import step as next_token
from jaxheads.sharding import shardings, spec
from jaxheads.training import OptimizerOptions, optimizer
from jaxheads.training.step import abstract_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Planned:
  """A function that is jitted, and what it is called with.

  Attributes:
    function: What `jax.jit` gave.
    arguments: Pytrees of `jax.ShapeDtypeStruct`, each with a sharding.
    keywords: More of them, and static ones.
    parts: The same arrays by what they are: "parameters", "cache", ...
  """

  function: Any
  arguments: tuple[Any, ...]
  keywords: Mapping[str, Any]
  parts: Mapping[str, Any]


def train_step(
  config: ModelConfig,
  mesh: Mesh,
  *,
  batch_size: int,
  seq_len: int,
  options: OptimizerOptions,
) -> Planned:
  """A step of training: gradients, and the optimizer's update."""
  # Of how many steps it is one changes nothing but a constant.
  steps = options.warmup_steps + 1
  transform = optimizer.build(options, steps)
  graphdef, state = abstract_state(
    lambda rngs: DecoderLM(config, rngs=rngs), transform, mesh=mesh
  )
  step = make_train_step(
    graphdef,
    transform,
    aux_weight=options.aux_weight,
    accumulate=options.accumulate,
    schedule=optimizer.schedule(options, steps),
    like=state,
  )
  tokens = _tokens(mesh, batch_size, seq_len)
  batch = {
    "tokens": tokens,
    "targets": tokens,
    "mask": jax.ShapeDtypeStruct(tokens.shape, bool, sharding=tokens.sharding),
  }
  parts = {
    "parameters": state.params,
    "optimizer state": state.opt_state,
    "batch": batch,
    "other state": (state.step, state.rest),
  }
  return Planned(step, (state, batch), {}, parts)


def prefill(
  config: ModelConfig, mesh: Mesh, *, batch_size: int, seq_len: int
) -> Planned:
  """Reading of prompts of `seq_len` tokens into an empty cache."""
  return _generation(config, mesh, batch_size, seq_len, seq_len)


def decode(
  config: ModelConfig, mesh: Mesh, *, batch_size: int, seq_len: int
) -> Planned:
  """One more token of sequences in a cache of `seq_len` tokens."""
  return _generation(config, mesh, batch_size, seq_len, 1)


def _generation(
  config: ModelConfig,
  mesh: Mesh,
  batch_size: int,
  cache_len: int,
  new_tokens: int,
) -> Planned:
  def build() -> DecoderLM:
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    model.init_cache(batch_size, cache_len)
    return model

  parts: Any = nnx.split(nnx.eval_shape(build), nnx.Cache, ...)
  graphdef, cache, rest = parts
  layout = spec(None, "batch", "kv_heads", None, None)
  whole = NamedSharding(mesh, spec())

  def place_cache(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    # Only counters have fewer axes.
    where = NamedSharding(mesh, layout) if len(leaf.shape) == 5 else whole
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  def place(leaf: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  def scalar(dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), dtype, sharding=whole)

  cache = jax.tree.map(place_cache, cache)
  variables = jax.tree.map(place, rest, shardings(rest, mesh))
  tokens = _tokens(mesh, batch_size, new_tokens)
  key = jax.eval_shape(lambda: jax.random.key(0))
  keywords = {
    "temperature": scalar(jnp.float32),
    "top_p": scalar(jnp.float32),
    "nucleus": False,
  }
  return Planned(
    next_token,
    (graphdef, variables, cache, tokens, place(key, whole)),
    keywords,
    {"parameters": variables, "cache": cache, "batch": tokens},
  )


def _tokens(mesh: Mesh, batch_size: int, length: int) -> jax.ShapeDtypeStruct:
  """As `jaxheads.training.devices.put_batch` places them."""
  return jax.ShapeDtypeStruct(
    (batch_size, length),
    jnp.int32,
    sharding=NamedSharding(mesh, spec("batch")),
  )
