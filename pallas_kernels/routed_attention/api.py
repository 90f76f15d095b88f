"""Public door of routed attention."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _dispatch
from pallas_kernels.packing import Packing
from pallas_kernels.routed_attention import reference, xla
from pallas_kernels.routed_attention.tiling import Tiling, default_tiling
from pallas_kernels.shapes import check_shape

_IMPLEMENTATIONS = {
  "reference": reference.routed_attention,
  "xla": xla.routed_attention,
}


def routed_attention(
  q: Float[Array, "rows H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  packing: Packing,
  *,
  scale: float | None = None,
  is_causal: bool = False,
  q_offset: Int[Array, ""] | int = 0,
  mask: Bool[Array, "#B #N #T S"] | None = None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  tiling: Tiling | None = None,
  implementation: str | None = None,
) -> Float[Array, "rows H"]:
  """Attention of packed queries over the dense keys of their head.

  Row r, a query of token t of sequence b through head n, gives

    softmax(scale q_r k_b^T) v_b  over the visible keys of KV head n // (N / K)

  Keys of tokens that did not pick head n are visible like any other.
  Differentiable in `q`, `k` and `v`; KV heads without queries get zero
  gradients.

  Args:
    q: Packed queries (after RoPE), in the order of `packing`.
    k, v: Keys (after RoPE) and values of all tokens.
    packing: Which row is which (token, head); see `pallas_kernels.packing`.
    scale: Multiplies the logits; `None` means H ** -0.5.
    is_causal: Token t sees keys s <= t + `q_offset`. Key tiles after the
      last visible one of a block are not computed.
    q_offset: Index, among the keys, of the first query token.
    mask: True where a query may attend.
    q_segment_ids, kv_segment_ids: Queries see keys of their own segment.
    tiling: Tile sizes; `tiling.block_q` must equal `packing.block_rows`.
      `None` chooses.
    implementation: "reference", "xla" or `None` for the best.

  Returns:
    Rows in q's dtype; softmax and sums are float32. Rows without a visible
    key, and unused rows, are 0.

  Raises:
    ValueError: Shapes disagree, N is not a multiple of K, or no such
      implementation.
  """
  batch, length, heads = packing.row_of.shape
  sizes = {"B": batch, "T": length, "N": heads, "rows": packing.num_rows}
  check_shape("k", k, "B S K H", sizes)
  check_shape("v", v, "B S K H", sizes)
  check_shape("q", q, "rows H", sizes)
  check_shape("mask", mask, "#B #N #T S", sizes)
  check_shape("q_segment_ids", q_segment_ids, "B T", sizes)
  check_shape("kv_segment_ids", kv_segment_ids, "B S", sizes)
  if heads % k.shape[2]:
    raise ValueError(
      f"`k` must have a number of heads that divides {heads}, got {k.shape[2]}."
    )
  if tiling is None:
    tiling = dataclasses.replace(
      default_tiling(length, k.shape[1]), block_q=packing.block_rows
    )
  if tiling.block_q != packing.block_rows:
    raise ValueError(
      f"`tiling.block_q` must equal `packing.block_rows` "
      f"({packing.block_rows}), got {tiling.block_q}."
    )
  options: dict[str, Any] = {
    "scale": k.shape[-1] ** -0.5 if scale is None else scale,
    "is_causal": is_causal,
    "q_offset": jnp.asarray(q_offset, jnp.int32),
    "mask": mask,
    "q_segment_ids": q_segment_ids,
    "kv_segment_ids": kv_segment_ids,
    "tiling": tiling,
  }
  run = _dispatch.select(_IMPLEMENTATIONS, implementation, default="xla")
  return run(q, k, v, packing, **options)
