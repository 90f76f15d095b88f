"""One training step and one validation step, as pure compiled functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from jaxheads.nn import auxiliary_loss
from jaxheads.sharding import shardings

Batch = dict[str, Any]  # tokens, targets int32 [B, T]; mask bool [B, T]
Metrics = dict[str, Array]  # float32 scalars


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything a step changes.

  Attributes:
    step: Steps done, int32.
    params: Nested dict of parameters.
    rest: Nested dict of the model's other variables: statistics, random
      streams.
    opt_state: The optimizer's.
  """

  step: Array
  params: Any
  rest: Any
  opt_state: Any


def init_state(
  build_model: Callable[[nnx.Rngs], nnx.Module],
  optimizer: optax.GradientTransformation,
  *,
  seed: int,
  mesh: Mesh,
) -> tuple[nnx.GraphDef[Any], TrainState]:
  """A fresh model, split, and its state, placed on `mesh` by the table."""
  graphdef, init = _initialiser(build_model, optimizer, seed)
  placed = shardings(jax.eval_shape(init), mesh)
  return graphdef, jax.jit(init, out_shardings=placed)()


def abstract_state(
  build_model: Callable[[nnx.Rngs], nnx.Module],
  optimizer: optax.GradientTransformation,
  *,
  mesh: Mesh,
) -> tuple[nnx.GraphDef[Any], TrainState]:
  """As `init_state`, with shapes and places instead of arrays."""
  graphdef, init = _initialiser(build_model, optimizer, 0)
  shapes = jax.eval_shape(init)

  def place(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

  return graphdef, jax.tree.map(place, shapes, shardings(shapes, mesh))


def _initialiser(
  build_model: Callable[[nnx.Rngs], nnx.Module],
  optimizer: optax.GradientTransformation,
  seed: int,
) -> tuple[nnx.GraphDef[Any], Callable[[], TrainState]]:
  """Graph of the model, and what makes the first state."""
  shapes = nnx.eval_shape(lambda: build_model(nnx.Rngs(seed)))

  def init() -> TrainState:
    parts: Any = nnx.split(build_model(nnx.Rngs(seed)), nnx.Param, ...)
    _, params, rest = parts
    params = nnx.to_pure_dict(params)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      rest=nnx.to_pure_dict(rest),
      opt_state=optimizer.init(params),
    )

  return nnx.graphdef(shapes), init


def make_train_step(
  graphdef: nnx.GraphDef[Any],
  optimizer: optax.GradientTransformation,
  *,
  aux_weight: float,
  accumulate: int = 1,
  schedule: optax.Schedule | None = None,
  like: TrainState,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """The compiled step: (state, batch) to (new state, metrics).

  The loss is mean nats + aux_weight * auxiliary loss. With `accumulate` parts
  it is the same mean over all tokens of the batch, whatever the parts hold;
  only the balance statistics are those of each part, averaged.

  The state given in is donated: do not use it again. New states are placed as
  `like` is, of which nothing else is looked at.
  """

  def objective(
    params: Any, rest: Any, batch: Batch, num_tokens: Array
  ) -> tuple[Array, tuple[Array, Array, Any]]:
    model = nnx.merge(graphdef, params, rest)
    nats = model.token_nats(
      batch["tokens"], batch["targets"], deterministic=False
    )
    nats = jnp.sum(jnp.where(batch["mask"], nats, 0.0)) / num_tokens
    aux = auxiliary_loss(model) / accumulate
    rest = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
    return nats + aux_weight * aux, (nats, aux, rest)

  gradient = jax.grad(objective, has_aux=True)
  placed: Any = jax.tree.map(lambda x: x.sharding, like)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    num_tokens = jnp.sum(batch["mask"], dtype=jnp.float32)
    num_tokens = jnp.maximum(num_tokens, 1.0)
    if accumulate == 1:
      grads, (nats, aux, rest) = gradient(
        state.params, state.rest, batch, num_tokens
      )
    else:

      def part(carry: Any, part_batch: Batch) -> tuple[Any, None]:
        total, rest = carry
        grads, (nats, aux, rest) = gradient(
          state.params, rest, part_batch, num_tokens
        )
        return (jax.tree.map(jnp.add, total, (grads, nats, aux)), rest), None

      zero = jnp.zeros((), jnp.float32)
      zeros = (jax.tree.map(jnp.zeros_like, state.params), zero, zero)
      ((grads, nats, aux), rest), _ = jax.lax.scan(
        part, (zeros, state.rest), jax.tree.map(_split_rows, batch)
      )
    # Each device adds up its own part of them.
    grads = jax.lax.with_sharding_constraint(grads, placed.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    metrics = {
      "loss": nats,
      "aux_loss": aux,
      "grad_norm": optax.tree.norm(grads),
    }
    if schedule is not None:
      metrics["learning_rate"] = schedule(state.step)
    return TrainState(
      step=state.step + 1,
      params=optax.apply_updates(state.params, updates),
      rest=rest,
      opt_state=opt_state,
    ), metrics

  def _split_rows(rows: Array) -> Array:
    # Row i goes to part i % accumulate, so that a device's rows stay on it.
    rows = rows.reshape(-1, accumulate, *rows.shape[1:])
    return jnp.swapaxes(rows, 0, 1)

  return jax.jit(
    step, donate_argnums=0, out_shardings=(placed, like.step.sharding)
  )


def make_eval_step(
  graphdef: nnx.GraphDef[Any],
) -> Callable[[Any, Any, Batch], tuple[Array, Array]]:
  """The compiled (params, rest, batch) to (sum of nats, number of tokens)."""

  @jax.jit
  def step(params: Any, rest: Any, batch: Batch) -> tuple[Array, Array]:
    model = nnx.merge(graphdef, params, rest)
    nats = model.token_nats(batch["tokens"], batch["targets"])
    nats = jnp.where(batch["mask"], nats, 0.0)
    return jnp.sum(nats), jnp.sum(batch["mask"], dtype=jnp.float32)

  return step
