"""The language-model loss."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.models import token_nats


def loss_fn(
  logits: Float[Array, "B T V"],
  targets: Int[Array, "B T"],
  token_mask: Bool[Array, "B T"],
) -> Float[Array, ""]:
  """Mean cross-entropy over the valid tokens, in nats.

  Args:
    logits: Scores of the next token; any float dtype, summed in float32.
    targets: The tokens that did follow, in [0, V).
    token_mask: True where the target counts.

  Returns:
    Float32 scalar; 0 where no token counts.
  """
  nats = jnp.where(token_mask, token_nats(logits, targets), 0.0)
  return jnp.sum(nats) / jnp.maximum(jnp.sum(token_mask, dtype=jnp.float32), 1)
