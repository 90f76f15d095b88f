"""A few steps of a small model on any mesh, and what came of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads import s2
from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.moh import MoHConfig
from jaxheads.nn import auxiliary_loss
from jaxheads.sharding import MeshShape, make_mesh
from jaxheads.training import OptimizerOptions, devices, optimizer
from jaxheads.training.step import init_state, make_eval_step, make_train_step

BATCH, LENGTH, VOCAB, STEPS = 8, 64, 24, 3
ROUTED = MoHConfig(num_heads=8, num_shared=2, top_k=3)
# On 8 devices along `context` a chunk is 4 tokens: one shard, and shorter than
# the window.
SHARDED = s2.strided(
  8, block_size=2, local_blocks=4, vertical_stride=2, num_kv_heads=4
)
# Eight devices along `heads` have one each.
EIGHT = s2.strided(
  8, block_size=2, local_blocks=4, vertical_stride=2, num_kv_heads=8
)


def config(**changes) -> ModelConfig:
  """Every kind of layer: dense, routed, sharded, both; grouped queries."""
  fields = dict(
    vocab_size=VOCAB,
    num_layers=4,
    embed_dim=16,
    mlp_dim=24,
    num_heads=8,
    num_kv_heads=4,
    head_dim=4,
    max_seq_len=LENGTH,
    head_plans=(None, ROUTED, None, ROUTED),
    contexts=(None, None, SHARDED, SHARDED),
    remat=True,
  )
  return ModelConfig(**{**fields, **changes})


def batch(step: int = 0) -> dict[str, np.ndarray]:
  """Random tokens; the last row is empty, as in a batch that is not full."""
  rng = np.random.default_rng(step)
  window = rng.integers(0, VOCAB, (BATCH, LENGTH + 1), np.int32)
  mask = np.ones((BATCH, LENGTH), bool)
  mask[-1] = False
  return {"tokens": window[:, :-1], "targets": window[:, 1:], "mask": mask}


def mesh_of(**axes: int):
  shape = MeshShape(**axes)
  return make_mesh(shape, jax.devices()[: shape.size])


@functools.cache
def trained(
  model_config: ModelConfig, *, accumulate: int = 1, **axes: int
) -> tuple[list[dict], dict, float]:
  """Metrics of each step, last parameters and their validation loss."""
  mesh = mesh_of(**axes)
  transform = optimizer.build(OptimizerOptions(warmup_steps=0), 100)
  with jax.set_mesh(mesh):
    graphdef, state = init_state(
      lambda rngs: DecoderLM(model_config, rngs=rngs),
      transform,
      seed=0,
      mesh=mesh,
    )
    step = make_train_step(
      graphdef, transform, aux_weight=0.1, accumulate=accumulate, like=state
    )
    history = []
    for number in range(STEPS):
      state, metrics = step(state, devices.put_batch(mesh, batch(number)))
      history.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    nats, count = make_eval_step(graphdef)(
      state.params, state.rest, devices.put_batch(mesh, batch(STEPS))
    )
  return history, jax.device_get(state.params), float(nats / count)


@functools.cache
def gradients(model_config: ModelConfig, **axes: int) -> dict:
  """Of the loss of one batch, all parameters."""
  mesh = mesh_of(**axes)
  with jax.set_mesh(mesh):
    graphdef, state = init_state(
      lambda rngs: DecoderLM(model_config, rngs=rngs),
      optimizer.build(OptimizerOptions(), 10),
      seed=1,
      mesh=mesh,
    )

    @jax.jit
    def gradient(params, rest, placed):
      def loss(params):
        model = nnx.merge(graphdef, params, rest)
        nats = model.token_nats(
          placed["tokens"], placed["targets"], deterministic=False
        )
        return jnp.mean(nats) + 0.1 * auxiliary_loss(model)

      return jax.grad(loss)(params)

    return jax.device_get(
      gradient(state.params, state.rest, devices.put_batch(mesh, batch()))
    )
