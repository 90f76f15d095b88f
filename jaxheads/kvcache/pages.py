"""The pool on the device: pages of keys and values of one head each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import platform

# What pages may hold instead of floats, with a scale a page; and the largest
# number of each.
QUANTISED = {"int8": 127.0, "float8_e4m3fn": 448.0}
# XLA's CPU compiler updates no short floats in place: it makes a float32 copy
# of the whole array. There they are kept as integers of the same bits.
_BITS = {"bfloat16": jnp.uint16, "float8_e4m3fn": jnp.uint8}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pool:
  """Pages of keys, or of values.

  Attributes:
    stored: The pages, as `pallas_kernels.paged_attention` takes them.
    scales: What the numbers of each page are multiplied with; `None` if pages
      are not quantised.
    dtype: What `stored` holds, perhaps by its bits.
  """

  stored: Array  # [P, page, H]
  scales: Float[Array, " P"] | None
  dtype: Any = dataclasses.field(metadata=dict(static=True))

  @classmethod
  def empty(cls, shape: tuple[int, int, int], dtype: Any) -> "Pool":
    """Pages of zeros.

    Args:
      shape: P, page and H.
      dtype: Floats, or one of `QUANTISED`.
    """
    dtype = jnp.dtype(dtype)
    kept_as = dtype
    if platform.current() == "cpu":
      kept_as = jnp.dtype(_BITS.get(dtype.name, dtype))
    scales = None
    if dtype.name in QUANTISED:
      scales = jnp.ones(shape[:1], jnp.float32)
    return cls(jnp.zeros(shape, kept_as), scales, dtype)

  @property
  def nbytes(self) -> int:
    """Memory that the pool takes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))

  def take(self, numbers: Int[Array, " m"]) -> Float[Array, "m page H"]:
    """Some pages, as floats."""
    pages = _as_dtype(self.stored.at[numbers].get(mode="clip"), self.dtype)
    if self.scales is None:
      return pages
    scales = self.scales.at[numbers].get(mode="clip")
    return pages.astype(jnp.float32) * scales[:, None, None]

  def put(
    self, numbers: Int[Array, " m"], new: Float[Array, "m page H"]
  ) -> "Pool":
    """Overwrites whole pages; number 0 for nowhere."""
    scales = self.scales
    if scales is not None:
      needed = _scales(new, self.dtype)
      new = _quantise(new, needed, self.dtype)
      scales = scales.at[numbers].set(needed, mode="drop")
    stored = self._set((numbers,), new)
    return dataclasses.replace(self, stored=stored, scales=scales)

  def put_token(
    self,
    numbers: Int[Array, " rows"],
    offsets: Int[Array, " rows"],
    is_new: Int[Array, " rows"],
    new: Float[Array, "rows H"],
  ) -> "Pool":
    """Writes one token a row into its page; number 0 for nowhere.

    A quantised page keeps its scale while the token fits in it, and so all
    that it holds; else it is rounded once more, to a larger scale.

    Args:
      numbers: Page of each row; no two rows share one, except page 0.
      offsets: Where in its page the token goes.
      is_new: 1 where the page holds nothing yet, whatever is in it.
      new: The tokens.
    """
    if self.scales is None:
      return dataclasses.replace(
        self, stored=self._set((numbers, offsets), new)
      )
    new = new.astype(jnp.float32)
    pages = jnp.where(is_new[:, None, None] > 0, 0.0, self.take(numbers))
    at = jnp.arange(pages.shape[1]) == offsets[:, None]
    pages = jnp.where(at[..., None], new[:, None], pages)
    held = jnp.where(is_new > 0, 0.0, self.scales.at[numbers].get(mode="clip"))
    scales = jnp.maximum(held, _scales(new[:, None], self.dtype))
    return dataclasses.replace(
      self,
      stored=self._set((numbers,), _quantise(pages, scales, self.dtype)),
      scales=self.scales.at[numbers].set(scales, mode="drop"),
    )

  def _set(self, at: tuple[Array, ...], new: Array) -> Array:
    new = _as_dtype(new.astype(self.dtype), self.stored.dtype)
    return self.stored.at[at].set(new, mode="drop")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
  """Keys and values of all layers, sequences and heads.

  A page belongs to one KV head: to drop a head's tokens frees its memory. Page
  0 belongs to nobody: what has no place is written there, and never read.

  Attributes:
    k: Keys after RoPE.
    v: Values.
  """

  k: Pool
  v: Pool

  @classmethod
  def empty(
    cls, num_pages: int, page_size: int, head_dim: int, dtype: Any
  ) -> "Pages":
    """Pages of zeros, page 0 included; see `Pool.empty`."""
    shape = (num_pages, page_size, head_dim)
    return cls(Pool.empty(shape, dtype), Pool.empty(shape, dtype))

  @property
  def page_size(self) -> int:
    """Tokens of a page."""
    return self.k.stored.shape[1]

  @property
  def nbytes(self) -> int:
    """Memory that the pool takes."""
    return self.k.nbytes + self.v.nbytes

  def gather(
    self, numbers: Int[Array, "K m"]
  ) -> tuple[Float[Array, "K S H"], Float[Array, "K S H"]]:
    """The tokens of some pages, in order; S = m x page size."""
    rows = numbers.shape[0]
    k, v = (
      pool.take(numbers.reshape(-1)).reshape(rows, -1, pool.stored.shape[-1])
      for pool in (self.k, self.v)
    )
    return k, v

  def write(
    self,
    numbers: Int[Array, "K m"],
    k: Float[Array, "K S H"],
    v: Float[Array, "K S H"],
  ) -> "Pages":
    """Overwrites whole pages, S = m x page size; number 0 for nowhere."""
    shape = (numbers.size, *self.k.stored.shape[1:])
    numbers = numbers.reshape(-1)
    return Pages(
      self.k.put(numbers, k.reshape(shape)),
      self.v.put(numbers, v.reshape(shape)),
    )

  def append(
    self,
    numbers: Int[Array, " rows"],
    offsets: Int[Array, " rows"],
    is_new: Int[Array, " rows"],
    k: Float[Array, "rows H"],
    v: Float[Array, "rows H"],
  ) -> "Pages":
    """Writes one token a row; see `Pool.put_token`."""
    at = (numbers, offsets, is_new)
    return Pages(self.k.put_token(*at, k), self.v.put_token(*at, v))


def _as_dtype(x: Array, dtype: Any) -> Array:
  """The same bits."""
  if x.dtype == dtype:
    return x
  return jax.lax.bitcast_convert_type(x, dtype)


def _scales(pages: Float[Array, "m page H"], dtype: Any) -> Float[Array, " m"]:
  """The scale with which each page's largest number just fits."""
  most = jnp.abs(pages.astype(jnp.float32)).max(axis=(1, 2))
  return jnp.where(most > 0, most / QUANTISED[dtype.name], 1e-30)


def _quantise(
  pages: Float[Array, "m page H"], scales: Float[Array, " m"], dtype: Any
) -> Array:
  most = QUANTISED[dtype.name]
  x = pages.astype(jnp.float32) / scales[:, None, None]
  if jnp.issubdtype(dtype, jnp.integer):
    x = jnp.round(x)
  return jnp.clip(x, -most, most).astype(dtype)
