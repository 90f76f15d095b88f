"""Load-balance loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels.shapes import check_shape


def load_balance_loss(
  probs: Float[Array, "B T routed"],
  routed_mask: Bool[Array, "B T routed"],
  *,
  token_mask: Bool[Array, "B T"] | None = None,
  num_groups: int = 1,
  axis_name: str | None = None,
) -> Float[Array, ""]:
  """Loss that is small when tokens spread evenly over the routed heads.

  With P_i the mean probability of head i and f_i the fraction of tokens that
  picked it, both over real tokens, the loss is E sum_i P_i f_i for E routed
  heads: top_k when balanced, E when one head takes everything. Its gradient
  reaches the router through P alone.

  Args:
    probs: Router probabilities before selection, float32.
    routed_mask: True where the token picked the head.
    token_mask: True for real tokens; padding counts nowhere.
    num_groups: Statistics are local to this many equal, contiguous groups of
      sequences and the losses are averaged: with one group a device that is
      what data-parallel training with local statistics computes. 1 is global.
    axis_name: Under `shard_map`, average the statistics over this mesh axis;
      without it they are local to the shard.

  Returns:
    Scalar, float32; 0 if nothing is routed or no token is real.

  Raises:
    ValueError: Shapes disagree, or the batch does not divide into
      `num_groups`.

  Source:
    MoH Eq. 7, times the number of routed heads, as in the released code.
  """
  sizes: dict[str, int] = {}
  check_shape("probs", probs, "B T routed", sizes)
  check_shape("routed_mask", routed_mask, "B T routed", sizes)
  check_shape("token_mask", token_mask, "B T", sizes)
  routed = sizes["routed"]
  if num_groups < 1 or sizes["B"] % num_groups:
    raise ValueError(
      f"`num_groups` must divide the batch ({sizes['B']}), got {num_groups}."
    )
  if routed == 0:
    return jnp.zeros((), jnp.float32)
  if token_mask is None:
    token_mask = jnp.ones(probs.shape[:2], bool)
  weight = token_mask.astype(jnp.float32)[..., None]

  def total(values: Array) -> Array:  # [B, T, n] -> [num_groups, n]
    # `where`, not a product: padding may hold NaN.
    values = jnp.where(token_mask[..., None], values.astype(jnp.float32), 0.0)
    values = values.reshape(num_groups, -1, values.shape[-1]).sum(axis=1)
    return values if axis_name is None else jax.lax.psum(values, axis_name)

  count = total(weight)
  scale = 1.0 / jnp.maximum(count, 1.0)
  losses = routed * jnp.sum(
    total(probs) * scale * total(routed_mask) * scale, axis=-1
  )
  # Groups without a real token have no statistics to average.
  return jnp.sum(losses) / jnp.maximum(jnp.sum(count > 0), 1).astype(
    jnp.float32
  )
