"""Cross-entropy, without the logits of a whole batch."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxheads.sharding.rules import fitting, free_axes, spec
from pallas_kernels.value_checks import checks_under_jit

# Logits of so many bytes are computed at once on one device. Each part reads
# the output layer and adds to its gradient: from a thousand tokens on, products
# take longer than that, on all TPUs since v5e.
_MOST_LOGITS_BYTES = 2**30


def token_nats(
  logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
  """Cross-entropy of each target in nats, float32."""
  return _nats(logits, targets, words_split=False)


def nats_in_parts(
  x: Float[Array, "B T D"],
  table: Float[Array, "D V"],
  targets: Int[Array, "B T"],
) -> Float[Array, "B T"]:
  """Cross-entropy of each target in nats, part of the tokens by part.

  Logits are computed once more in the backward pass. Over a mesh, each device
  adds up its own gradient of the table, and they are summed once.

  Args:
    x: Output of the last layer, normalised.
    table: Output layer.
    targets: What did follow.
  """
  # JAX's checkify does not run through a shard_map that a mesh context has.
  axes = {} if checks_under_jit() else free_axes()
  specs = [
    fitting(array.shape, where, axes)
    for array, where in (
      (x, spec("batch", "length", None)),
      (table, spec("embed", "vocab")),
      (targets, spec("batch", "length")),
    )
  ]
  features, words = specs[1]

  def run(x: Array, table: Array, targets: Array) -> Array:
    if features:
      table = jax.lax.all_gather(table, features, axis=0, tiled=True)
    return _in_parts(x, table, targets, words_split=bool(words))

  if not axes:
    return run(x, table, targets)
  sharded = jax.shard_map(
    run,
    in_specs=tuple(specs),
    out_specs=specs[2],
    axis_names=set(axes),
    check_vma=False,
  )
  return sharded(x, table, targets)


def _in_parts(
  x: Float[Array, "b t D"],
  table: Float[Array, "D v"],
  targets: Int[Array, "b t"],
  *,
  words_split: bool,
) -> Float[Array, "b t"]:
  """Of the tokens and words that a device has."""

  def nats(x: Array, targets: Array) -> Array:
    logits = jnp.einsum(
      "btd,dv->btv",
      x,
      table.astype(x.dtype),
      preferred_element_type=jnp.float32,
    )
    return _nats(logits, targets, words_split=words_split)

  batch, length = targets.shape
  wanted = -(-batch * length * table.shape[1] * 4 // _MOST_LOGITS_BYTES)
  wanted = min(max(1, wanted), max(1, length))
  parts = next(n for n in range(wanted, length + 2) if length % n == 0)
  if parts == 1:
    return nats(x, targets)

  def cut(y: Array) -> Array:
    return jnp.moveaxis(
      y.reshape(batch, parts, length // parts, *y.shape[2:]), 1, 0
    )

  step = jax.checkpoint(lambda _, part: (None, nats(*part)))
  _, out = jax.lax.scan(step, None, (cut(x), cut(targets)))
  return jnp.moveaxis(out, 0, 1).reshape(batch, length)


def _nats(
  logits: Float[Array, "b t v"],
  targets: Int[Array, "b t"],
  *,
  words_split: bool,
) -> Float[Array, "b t"]:
  """Of logits of all words, or of those of this device along `heads`."""
  logits = logits.astype(jnp.float32)
  most = jax.lax.stop_gradient(logits.max(axis=-1))
  first: Any = 0
  if words_split:
    most = jax.lax.pmax(most, "heads")
    first = jax.lax.axis_index("heads") * logits.shape[-1]
  most = jnp.where(jnp.isfinite(most), most, 0.0)
  # Not a gather, for which devices would exchange logits that are split.
  words = first + jnp.arange(logits.shape[-1], dtype=targets.dtype)
  right = jnp.where(words == targets[..., None], logits, 0.0).sum(axis=-1)
  total = jnp.exp(logits - most[..., None]).sum(axis=-1)
  if words_split:
    right, total = jax.lax.psum((right, total), "heads")
  return jnp.log(total) + most - right
