"""AdamW with warm-up, cosine decay and clipping; decay on matrices only."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxheads.training.config import OptimizerOptions

# Last names of parameters that weight decay leaves alone. By name, because
# layers stacked for a scan give vectors one axis more.
_VECTORS = frozenset({"bias", "scale"})


def schedule(options: OptimizerOptions, steps: int) -> optax.Schedule:
  """Learning rate of step 0, 1, ..., `steps` - 1.

  It rises linearly over the warm-up (never longer than the run) and falls as a
  cosine to `final_fraction` of its peak.
  """
  warmup = min(options.warmup_steps, steps - 1)
  return _standard_promotion(
    optax.warmup_cosine_decay_schedule(
      init_value=options.learning_rate / (warmup + 1),
      peak_value=options.learning_rate,
      warmup_steps=warmup,
      decay_steps=steps,
      end_value=options.learning_rate * options.final_fraction,
    )
  )


def decay_mask(params: Any) -> Any:
  """True for the matrices of a (nested) dict of parameters.

  A matrix is anything with two axes or more that is not called "bias" or
  "scale"; routers and embeddings are matrices.
  """

  def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    name = getattr(path[-1], "key", None)
    return leaf.ndim >= 2 and name not in _VECTORS

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def build(
  options: OptimizerOptions, steps: int
) -> optax.GradientTransformation:
  """The optimizer of a run of `steps` steps."""
  clip = (
    optax.clip_by_global_norm(options.clip_norm)
    if options.clip_norm
    else optax.identity()
  )
  inner = optax.chain(
    clip,
    optax.adamw(
      schedule(options, steps),
      b1=options.b1,
      b2=options.b2,
      weight_decay=options.weight_decay,
      mask=decay_mask,
    ),
  )
  return optax.GradientTransformation(
    inner.init, _standard_promotion(inner.update)
  )


def _standard_promotion(function: Callable[..., Any]) -> Callable[..., Any]:
  """Optax mixes whole numbers and floats, which strict promotion refuses."""

  @functools.wraps(function)
  def wrapped(*args: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
      return function(*args)

  return wrapped
