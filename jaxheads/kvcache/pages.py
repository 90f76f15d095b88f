"""The pool on the device: pages of keys and values of one head each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import platform


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """Keys and values of all layers, sequences and heads.

  A page belongs to one KV head: to drop a head's tokens frees its memory. Page
  0 belongs to nobody: what has no place is written there, and never read.

  Attributes:
    k: Keys after RoPE; uint16 is bfloat16 by its bits.
    v: Values, likewise.
    dtype: Of keys and values.
  """

  k: Float[Array, "P page H"]
  v: Float[Array, "P page H"]
  dtype: Any = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def empty(
    cls, num_pages: int, page_size: int, head_dim: int, dtype: Any
  ) -> "Pages":
    """Pages of zeros, page 0 included."""
    dtype = jnp.dtype(dtype)
    kept_as = dtype
    if platform.current() == "cpu" and dtype == jnp.bfloat16:
      # XLA's CPU compiler updates no bfloat16 array in place: it makes a
      # float32 copy of the whole of it.
      kept_as = jnp.dtype(jnp.uint16)
    shape = (num_pages, page_size, head_dim)
    return cls(jnp.zeros(shape, kept_as), jnp.zeros(shape, kept_as), dtype)

  @property
  def num_pages(self) -> int:
    """P, page 0 included."""
    return self.k.shape[0]

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.k.shape[1]

  @property
  def nbytes(self) -> int:
    """Memory that the pool takes."""
    return self.k.nbytes + self.v.nbytes

  def gather(
    self, numbers: Int[Array, "*rows m"]
  ) -> tuple[Float[Array, "*rows S H"], Float[Array, "*rows S H"]]:
    """The tokens of some pages, in order; S = m x page size."""
    shape = (
      *numbers.shape[:-1],
      numbers.shape[-1] * self.page_size,
      self.k.shape[-1],
    )
    k, v = (
      _as_dtype(x.at[numbers].get(mode="clip"), self.dtype).reshape(shape)
      for x in (self.k, self.v)
    )
    return k, v

  def write(
    self,
    numbers: Int[Array, "*rows m"],
    k: Float[Array, "*rows S H"],
    v: Float[Array, "*rows S H"],
  ) -> "Pages":
    """Overwrites whole pages, S = m x page size; number 0 for nowhere."""
    shape = (-1, *self.k.shape[1:])
    return self._put((numbers.reshape(-1),), k.reshape(shape), v.reshape(shape))

  def append(
    self,
    numbers: Int[Array, " rows"],
    offsets: Int[Array, " rows"],
    k: Float[Array, "rows H"],
    v: Float[Array, "rows H"],
  ) -> "Pages":
    """Writes one token a row into its page; number 0 for nowhere."""
    return self._put((numbers, offsets), k, v)

  def _put(self, at: tuple[Array, ...], *new: Array) -> "Pages":
    k, v = (
      pool.at[at].set(_as_dtype(x.astype(self.dtype), pool.dtype), mode="drop")
      for pool, x in zip((self.k, self.v), new, strict=True)
    )
    return dataclasses.replace(self, k=k, v=v)


def _as_dtype(x: Array, dtype: Any) -> Array:
  """The same bits."""
  if x.dtype == dtype:
    return x
  return jax.lax.bitcast_convert_type(x, dtype)
