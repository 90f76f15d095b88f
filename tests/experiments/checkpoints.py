"""Checkpoints of models that nobody has trained."""

import jax
from flax import nnx

from jaxheads.models import DecoderLM
from jaxheads.training import Checkpointer, RunFolder, TrainState


def save_checkpoints(run: RunFolder, model: DecoderLM, *, steps) -> None:
  """Saves `model` as each of the run's `steps`; the first one is the best."""
  _, params, rest = nnx.split(model, nnx.Param, ...)
  checkpointer = Checkpointer(run.checkpoints, keep=len(steps))
  for step in steps:
    state = TrainState(
      step=jax.numpy.asarray(step),
      params=nnx.to_pure_dict(params),
      rest=nnx.to_pure_dict(rest),
      opt_state={"count": jax.numpy.asarray(step)},
    )
    checkpointer.save(
      step,
      state,
      record={"model": model.config.to_dict()},
      validation_loss=float(step),
    )
  checkpointer.close()
