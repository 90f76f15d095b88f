"""Cross-entropy, without the logits of a whole batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxheads.sharding import axis_size, constrain

# Logits of so many bytes are computed at once on one device. Each part reads
# the output layer and adds to its gradient: from a thousand tokens on, products
# take longer than that, on all TPUs since v5e.
_MOST_LOGITS_BYTES = 2**30


def token_nats(
  logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """Cross-entropy of each target in nats, float32."""
  logits = logits.astype(jnp.float32)
  # Not a gather, for which devices would exchange logits that are split.
  words = jnp.arange(logits.shape[-1], dtype=targets.dtype)
  is_target = words == targets[..., None]
  target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
  return jax.nn.logsumexp(logits, axis=-1) - target_logits


def nats_in_parts(
  score: Callable[[Array, Array], Array],
  x: Float[Array, "B T D"],
  table: Float[Array, "D V"],
  targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
  """Cross-entropy of each target in nats, part of the tokens by part.

  Logits are computed once more in the backward pass.

  Args:
    score: From x and the table to logits.
    x: Output of the last layer.
    table: Output layer.
    targets: What did follow.
  """

  def nats(x: Array, targets: Array) -> Array:
    logits = constrain(score(x, table), "batch", "length", "vocab")
    return token_nats(logits, targets)

  batch, length = targets.shape
  devices = axis_size("context")
  devices = devices if length % devices == 0 else 1
  parts = _count(batch, length // devices, table.shape[1])
  if parts == 1:
    return nats(x, targets)
  # Gathered once, not for every part.
  table = _gather(table)

  def cut(y: Array) -> Array:
    """To [parts, B, T / parts, ...]; every device has its tokens of each."""
    y = y.reshape(batch, devices, parts, -1, *y.shape[2:])
    return jnp.moveaxis(y, 2, 0).reshape(parts, batch, -1, *y.shape[4:])

  step = jax.checkpoint(lambda _, part: (None, nats(*part)))
  _, out = jax.lax.scan(step, None, (cut(x), cut(targets)))
  out = out.reshape(parts, batch, devices, -1)
  return jnp.moveaxis(out, 0, 2).reshape(batch, length)


@jax.custom_vjp
def _gather(table: Float[Array, "D V"]) -> Float[Array, "D V"]:
  """All features of a device's words."""
  return constrain(table, None, "vocab")


def _gather_backward(_: None, grads: Array) -> tuple[Array]:
  # Whole first, or devices would add up every part instead of the sum. Then the
  # barrier: without it the optimizer takes a device's part of the sum, at the
  # end of the step, and until then the sum stays whole on all of them.
  grads = constrain(grads, None, "vocab")
  return (jax.lax.optimization_barrier(constrain(grads, "embed", "vocab")),)


_gather.defvjp(lambda table: (_gather(table), None), _gather_backward)


def _count(batch: int, length: int, words: int) -> int:
  """Into how many parts the tokens of a device are cut."""
  rows = -(-batch // axis_size("data", "fsdp"))
  total = rows * length * -(-words // axis_size("heads")) * 4
  wanted = min(max(1, -(-total // _MOST_LOGITS_BYTES)), length)
  return next(n for n in range(wanted, length + 1) if length % n == 0)
