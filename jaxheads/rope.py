"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.value_checks import check_values

# Angles are made of float32 positions, which are exact up to here.
FARTHEST_POSITION = 2**24


def apply_rope(
  x: Float[Array, "*batch N H"],
  positions: Int[Array, "*batch"],
  *,
  theta: float = 10_000.0,
) -> Float[Array, "*batch N H"]:
  """Rotates each head's features by angles proportional to the position.

  Pairs feature i with feature i + H / 2 (the "rotate half" convention of
  GPT-NeoX and LLaMA checkpoints). Inner products of two rotated vectors depend
  on the difference of their positions alone; norms do not change.

  Args:
    x: Queries or keys; computed in float32, returned in x's dtype.
    positions: Absolute position of each token.
    theta: Base of the geometric series of wavelengths.

  Raises:
    ValueError: The head size is odd, the shapes do not fit, or a position is
      out of range (outside of jit; under it see `jaxheads.checks`).

  Source:
    RoFormer, https://arxiv.org/abs/2104.09864, Eq. 34.
  """
  if x.ndim < 3 or x.shape[-1] % 2:
    raise ValueError(
      "`x` must be [*batch, N, H] with an even head size H, "
      f"got {list(x.shape)}."
    )
  if positions.shape != x.shape[:-2]:
    raise ValueError(
      f"`positions` must have shape {list(x.shape[:-2])} to fit `x`, "
      f"got {list(positions.shape)}."
    )
  check_positions("positions", positions)
  cos, sin = rope_angles(positions, x.shape[-1], theta=theta)
  return rotate(x, cos[..., None, :], sin[..., None, :])


def check_positions(name: str, positions: Int[Array, "*batch"]) -> None:
  """Refuses positions that are too far for RoPE.

  Any order is allowed, and negative ones, which padding on the left may have.

  Raises:
    ValueError: One is out of range; see `check_values`.
  """
  most = FARTHEST_POSITION
  check_values(
    name,
    (positions,),
    lambda positions: ((-most <= positions) & (positions <= most), positions),
    f"be in [{-most}, {most}]",
  )


def rope_angles(
  positions: Int[Array, "*batch"], head_dim: int, *, theta: float = 10_000.0
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
  """Cosine and sine of every rotation, float32; see `apply_rope`.

  Raises:
    ValueError: The head size is odd.
  """
  if head_dim % 2:
    raise ValueError(f"`head_dim` must be even for RoPE, got {head_dim}.")
  half = head_dim // 2
  frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angles = jnp.einsum("...,f->...f", positions.astype(jnp.float32), frequencies)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: Float[Array, "*batch H"],
  cos: Float[Array, "*#batch half"],
  sin: Float[Array, "*#batch half"],
) -> Float[Array, "*batch H"]:
  """Rotates the halves of x; float32 inside, x's dtype outside."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
  return out.astype(x.dtype)
