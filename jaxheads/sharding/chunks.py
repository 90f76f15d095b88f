"""Which tokens of a sequence each device along `context` holds."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxheads.errors import UserError


class Operands(NamedTuple):
  """What each device has its tokens and heads of."""

  q: Float[Array, "B T N H"]
  k: Float[Array, "B T K H"]
  v: Float[Array, "B T K Hv"]
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: Int[Array, "B T"] | None
  active: Bool[Array, "B T N"] | None


def chunk_places(devices: int, balanced: bool) -> np.ndarray:
  """Which chunks each device holds, [devices, chunks of a device].

  Example:
    >>> chunk_places(3, balanced=True).tolist()
    [[0, 5], [1, 4], [2, 3]]
  """
  own = np.arange(devices)[:, None]
  return np.hstack([own, 2 * devices - 1 - own]) if balanced else own


def balanced_order(length: int, devices: int) -> np.ndarray:
  """Original position of the token that is stored at each place, [length].

  The inverse is `numpy.argsort` of it.

  Args:
    length: Tokens of a sequence.
    devices: Along the axis `context`.
  Raises:
    UserError: `2 * devices` does not divide `length`.

  Example:
    >>> balanced_order(8, 2).tolist()
    [0, 1, 6, 7, 2, 3, 4, 5]
  """
  check_length(length, devices, multiple=2 * devices)
  chunks = chunk_places(devices, balanced=True).reshape(-1, 1)
  tokens = length // (2 * devices)
  return (chunks * tokens + np.arange(tokens)).reshape(-1)


def check_length(length: int, devices: int, *, multiple: int) -> None:
  """`UserError` unless a sequence splits into chunks."""
  if length % multiple or not length:
    nearest = max(round(length / multiple), 1) * multiple
    raise UserError(
      f"`--mesh`: context={devices} needs sequences whose length is a multiple "
      f"of {multiple}, got {length} tokens; the nearest is {nearest}"
    )


def place(devices: int) -> Int[Array, ""]:
  """Inside: this device's number among those of `heads` and `context`."""
  heads, context = (jax.lax.axis_index(axis) for axis in ("heads", "context"))
  return heads * devices + context


def chunk_of(x: Array, slot: int, tokens: int) -> Array:
  """The chunk in a slot of what a device holds."""
  return x[:, slot * tokens : (slot + 1) * tokens]


def in_order(
  x: Float[Array, "B devices slots chunk *rest"],
) -> Float[Array, "B chunks chunk *rest"]:
  """From where chunks are held to their order in the sequence."""
  if x.shape[2] == 1:
    return x[:, :, 0]
  return jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)


def as_stored(
  x: Float[Array, "B chunks chunk *rest"], slots: int
) -> Float[Array, "B devices slots chunk *rest"]:
  """The inverse of `in_order`."""
  if slots == 1:
    return x[:, :, None]
  devices = x.shape[1] // 2
  return jnp.stack([x[:, :devices], x[:, devices:][:, ::-1]], axis=2)
