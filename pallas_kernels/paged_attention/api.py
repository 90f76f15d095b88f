"""Public door of paged attention."""

from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch, platform
from pallas_kernels.paged_attention import reference
from pallas_kernels.paged_attention.operands import (
  Implementation,
  Operands,
  Settings,
  as_floats,
)
from pallas_kernels.paged_attention.table import PageTable
from pallas_kernels.shapes import check_shape

# From best to the one that covers everything.
_ORDER = ("mosaic_tpu", "triton", "xla")
_NAMED = (*_ORDER, "reference")
_OPERATION = "paged_attention"

# What pages may hold besides floats as wide as the queries.
QUANTISED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def paged_attention(
  q: Float[Array, "R Q H"],
  k_pages: Float[Array, "P page H"],
  v_pages: Float[Array, "P page H"],
  table: PageTable,
  *,
  k_scales: Float[Array, " P"] | None = None,
  v_scales: Float[Array, " P"] | None = None,
  seen: Int[Array, "R Q"] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "R Q H"]:
  """Attention of a few queries a row over the cached tokens of their row.

  Row r, one KV head of one sequence, gives for each of its queries

    softmax(scale q k^T) v  over the first `seen` tokens of the row

  Its queries are those of the query heads that share the KV head, of one
  token or of several new ones. A row of length 0 reads nothing and gives 0:
  so routing skips the keys and values of heads that nobody chose. Time and
  memory traffic follow the pages that are listed, not the longest row.
  Not differentiable.

  Args:
    q: Queries (after RoPE).
    k_pages, v_pages: The pool: keys (after RoPE) and values. Arrays of uint16
      are bfloat16 by their bits and arrays of uint8 float8_e4m3fn: XLA's CPU
      compiler updates those in place.
    table: Which pages hold the tokens of each row. Page numbers outside the
      pool and rows beyond the table are read as some page of it, never out of
      bounds.
    k_scales, v_scales: What the numbers of each page are multiplied with, for
      quantised pages: int8, float8_e4m3fn or float8_e5m2.
    seen: How many tokens of its row each query sees, for several new tokens
      that are in the cache already; `None` is all.
    scale: Multiplies the logits; `None` means H ** -0.5.
    implementation: "reference", "xla", "mosaic_tpu" (TPU), "triton" (GPU) or
      `None` for the best one.

  Returns:
    In q's dtype; softmax and sums are float32. Queries that see no token
    give 0.

  Raises:
    ValueError: Shapes or dtypes disagree, or no such implementation.
    NotImplementedError: The named implementation does not cover these inputs.

  Source:
    Pages of one KV head: Task-KV, https://arxiv.org/abs/2501.15113, asks for
    budgets that differ by head, which pages of all heads cannot free.
  """
  sizes: dict[str, int] = {}
  check_shape("q", q, "R Q H", sizes)
  check_shape("k_pages", k_pages, "P page H", sizes)
  check_shape("v_pages", v_pages, "P page H", sizes)
  check_shape("k_scales", k_scales, "P", sizes)
  check_shape("v_scales", v_scales, "P", sizes)
  check_shape("table.starts", table.starts, "R", sizes)
  check_shape("table.lengths", table.lengths, "R", sizes)
  check_shape("seen", seen, "R Q", sizes)
  for name, array in (
    ("table.pages", table.pages),
    ("table.starts", table.starts),
    ("table.lengths", table.lengths),
    ("seen", seen),
  ):
    if array is not None and not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"`{name}` must be integers, got {array.dtype}.")
  if k_pages.dtype != v_pages.dtype:
    raise ValueError(
      f"`v_pages` must have k_pages's dtype {k_pages.dtype}, got "
      f"{v_pages.dtype}."
    )
  stored = (k_pages, v_pages)
  k_pages, v_pages = map(as_floats, stored)
  _check_scales(k_pages.dtype, k_scales, v_scales)
  if 0 in (q.size, k_pages.size, table.pages.size):  # Nothing is seen.
    return jnp.zeros_like(q)
  lengths = jnp.broadcast_to(table.lengths[:, None], q.shape[:2])
  seen = lengths if seen is None else jnp.minimum(seen, lengths)
  settings = Settings(
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    interpret=platform.interpret(),
  )
  operands = Operands(q, k_pages, v_pages, table, seen, k_scales, v_scales)
  name = _dispatch.choose(
    _OPERATION,
    implementation,
    settings,
    operands,
    order=_ORDER,
    named=_NAMED,
  )
  if name == "xla":
    operands = operands._replace(k_pages=stored[0], v_pages=stored[1])
  if name == "reference":
    return reference.attention(settings, operands)
  module = cast(Implementation, _dispatch.load(_OPERATION, name))
  return module.attention(settings, operands)


def _check_scales(
  dtype: Any, k_scales: Array | None, v_scales: Array | None
) -> None:
  is_quantised = dtype in QUANTISED
  is_float = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
  if not is_quantised and not is_float:
    names = ", ".join(jnp.dtype(each).name for each in QUANTISED)
    raise ValueError(
      f"`k_pages` must hold floats or one of {names}, got {dtype}."
    )
  for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
    if (scales is not None) != is_quantised:
      raise ValueError(
        f"`{name}` must be given for quantised pages, and only for them; "
        f"`k_pages` holds {dtype}."
      )
    if scales is not None and not jnp.issubdtype(scales.dtype, jnp.floating):
      raise ValueError(f"`{name}` must be floats, got {scales.dtype}.")
