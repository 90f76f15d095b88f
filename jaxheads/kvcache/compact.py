"""From keep sets to rows: the kept tokens of each head, side by side."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Packed(NamedTuple):
  """One layer of one prompt, as row slots hold it.

  The head that keeps most has slot 0; among heads that keep as many, the
  lowest comes first.

  Attributes:
    k, v: Kept keys and values, oldest first; 0 from a slot's length on.
    positions: Of the kept tokens in the prompt; S from a slot's length on.
    lengths: Kept tokens.
    slot_of_head: Which slot each head has.
    head_of_slot: Its inverse.
  """

  k: Float[Array, "K size H"]
  v: Float[Array, "K size H"]
  positions: Int[Array, "K size"]
  lengths: Int[Array, " K"]
  slot_of_head: Int[Array, " K"]
  head_of_slot: Int[Array, " K"]


def compact(
  keep: Bool[Array, "K S"],
  k: Float[Array, "S K H"],
  v: Float[Array, "S K H"],
  *,
  size: int | None = None,
) -> Packed:
  """The kept tokens of each head, in the order of row slots.

  Args:
    keep: Which tokens each head keeps.
    k, v: Keys and values by position; what is not kept may hold anything.
    size: Room of each slot; tokens that find none are dropped, and count in
      `lengths` all the same. `None` is S.
  """
  heads, tokens = keep.shape
  size = tokens if size is None else size
  lengths = keep.sum(axis=-1, dtype=jnp.int32)
  head_of_slot = jnp.argsort(-lengths, stable=True).astype(jnp.int32)
  slot_of_head = jnp.argsort(head_of_slot).astype(jnp.int32)
  # Out of range where nothing is kept: dropped.
  to = jnp.where(keep, jnp.cumsum(keep, axis=-1, dtype=jnp.int32) - 1, size)
  at = jnp.arange(tokens, dtype=jnp.int32)
  positions = jnp.full((heads, size), tokens, jnp.int32)
  positions = positions.at[slot_of_head[:, None], to].set(at[None], mode="drop")

  def gather(x: Float[Array, "S K H"]) -> Float[Array, "K size H"]:
    # Positions from a slot's length on are out of range, and give 0.
    return x.at[positions, head_of_slot[:, None]].get(mode="fill", fill_value=0)

  return Packed(
    gather(k),
    gather(v),
    positions,
    lengths[head_of_slot],
    slot_of_head,
    head_of_slot,
  )
