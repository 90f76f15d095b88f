"""What an implementation of paged attention is given."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.paged_attention.table import PageTable


class Operands(NamedTuple):
  """The arrays."""

  q: Float[Array, "R Q H"]
  k_pages: Float[Array, "P page H"]
  v_pages: Float[Array, "P page H"]
  table: PageTable
  # How many tokens of its row each query sees; no more than there are.
  seen: Int[Array, "R Q"]
  # What the numbers of a page are multiplied with, if they are quantised.
  k_scales: Float[Array, " P"] | None = None
  v_scales: Float[Array, " P"] | None = None

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.k_pages.shape[1]

  @property
  def dtype(self) -> Any:
    """Of products: what holds queries and the numbers of pages exactly."""
    if self.k_scales is not None:
      return self.q.dtype
    return jnp.promote_types(self.q.dtype, self.k_pages.dtype)


@dataclasses.dataclass(frozen=True)
class Settings:
  """The static part; hashable.

  Attributes:
    scale: Multiplies the logits.
    interpret: For `pallas_call`.
  """

  scale: float
  interpret: Any = False


class Implementation(Protocol):
  """A module with these two functions."""

  def refusal(self, settings: Settings, operands: Operands) -> str | None:
    """Why these inputs are not covered, with the way out; None if they are."""

  def attention(
    self, settings: Settings, operands: Operands
  ) -> Float[Array, "R Q H"]:
    """Output in q's dtype; queries that see nothing give 0."""


# Floats by their bits: XLA's CPU compiler updates no short floats in place.
_BITS = {"uint8": jnp.float8_e4m3fn, "uint16": jnp.bfloat16}


def as_floats(pages: Array) -> Float[Array, "*pages"]:
  """Pages as numbers: uint8 and uint16 are short floats by their bits."""
  dtype = _BITS.get(pages.dtype.name)
  if dtype is None:
    return pages
  return jax.lax.bitcast_convert_type(pages, dtype)
