"""What the kernel asks of a chip's tensor cores."""

from typing import Any, Protocol

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

# The 128-byte swizzle wants rows of 64 entries, in groups of 8.
SWIZZLE_COLUMNS = 64
SWIZZLE_ROWS = 8
# Neighbouring tokens whose ids are 128 bytes: where TMA may write.
SEGMENT_IDS = 32


class Products(Protocol):
  """The two products of a visit, for the queries of one warp group.

  `acc` is the output before its division by the softmax's denominator, in
  whatever way the chip keeps it.

  Attributes:
    layout: Of a tile [queries, keys] in registers.
  """

  layout: plgpu.Layout

  def zeros(self) -> Any:
    """`acc` before the first visit."""

  def logits(self, k_ref: Any, free_ref: Any) -> jax.Array:
    """Queries times keys; tells the barrier when `k_ref` was read."""

  def scale(self, acc: Any, factor: jax.Array) -> Any:
    """`acc` with its rows multiplied."""

  def add(self, acc: Any, weights: jax.Array, v_ref: Any, free_ref: Any) -> Any:
    """`acc` and weights times values; tells the barrier as `logits` does."""

  def store(self, acc: Any, divisor: jax.Array, out_ref: Any) -> None:
    """Writes `acc`, its rows divided."""


def spread(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """One number a row, for all of its columns."""
  return jax.lax.broadcast_in_dim(rows, shape, [0])
