"""What routing reports about itself, as NNX variables."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class AuxLoss(nnx.Variable[Any]):
  """Load-balance loss of a layer's last call, float32 scalar.

  0 after a deterministic call. Stacked layers have a leading axis.
  """


class RoutingStats(nnx.Variable[Any]):
  """Fraction of real tokens for which each head was active, float32 [N]."""


def auxiliary_loss(model: nnx.Module) -> Float[Array, ""]:
  """Mean load-balance loss over the routed layers of a model.

  Read it after the forward pass, inside the function that is differentiated.
  Layers in which nothing is routed hold no `AuxLoss` and do not count.

  Args:
    model: Any NNX module that contains `MoHAttention` layers.

  Returns:
    Scalar, float32; 0 if no layer routes. Multiply it by the paper's 0.01
    and add it to the task's loss.

  Source:
    MoH Eq. 8; the mean over layers is the released code's.
  """
  leaves = [
    jnp.ravel(leaf) for leaf in jax.tree.leaves(nnx.state(model, AuxLoss))
  ]
  if not leaves:
    return jnp.zeros((), jnp.float32)
  return jnp.concatenate(leaves).mean()
