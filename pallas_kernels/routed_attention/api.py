"""Public door of routed attention."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _dispatch, platform
from pallas_kernels.head_attention.contexts import HeadContexts
from pallas_kernels.packing import Packing, check_packing
from pallas_kernels.routed_attention import reference
from pallas_kernels.routed_attention.operands import (
  Implementation,
  Operands,
  Settings,
  check_context,
)
from pallas_kernels.routed_attention.tiling import Tiling, default_tiling
from pallas_kernels.shapes import check_shape

# From best to the one that covers everything.
_ORDER = ("mosaic_tpu", "triton", "xla")
_NAMED = (*_ORDER, "mosaic_gpu", "reference")
_OPERATION = "routed_attention"


def routed_attention(
  q: Float[Array, "rows H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  packing: Packing,
  *,
  pattern: HeadContexts | tuple[HeadContexts, ...] | None = None,
  which: Int[Array, ""] | None = None,
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
    pattern: What each of the N heads sees, as in `head_attention`; static.
      What a head does not see costs nothing. `None` is all keys.
    which: Number of the pattern to take, if `pattern` holds several: devices
      of a mesh run one program and have other heads each.
    scale: Multiplies the logits; `None` means H ** -0.5.
    is_causal: Token t sees keys s <= t + `q_offset`. Key tiles after the
      last visible one of a block are not computed. With a `pattern`, the
      pattern says so.
    q_offset: Index, among the keys, of the first query token. A query before
      the first key sees nothing.
    mask: True where a query may attend.
    q_segment_ids, kv_segment_ids: Queries see keys of their own segment.
    tiling: Tile sizes; `tiling.block_q` must equal `packing.block_rows`. On
      GPUs, the most that a tile may have. `None` chooses.
    implementation: "reference", "xla", "mosaic_tpu" (TPU), "triton" (GPU),
      "mosaic_gpu" (Hopper and Blackwell; unmeasured, its numbers not yet shown
      on a GPU, so by name only) or `None` for the best one.

  Returns:
    Rows in q's dtype; softmax and sums are float32. Rows without a visible
    key, and unused rows, are 0.

  Raises:
    ValueError: Shapes disagree, N is not a multiple of K, the pattern is for
      other heads, no such implementation, `packing` is not as `pack` makes it
      or `q_offset` is beyond the pattern. Under jit values are trusted, see
      `value_checks`, and wrong ones never read out of bounds.
    NotImplementedError: The named implementation does not cover these inputs.
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
  patterns = pattern if isinstance(pattern, tuple) else (pattern,)
  if (which is None) != (len(patterns) == 1):
    raise ValueError(
      "`which` must be given if `pattern` holds several, and only then; got "
      f"{len(patterns)}."
    )
  for one in patterns:
    check_context(
      one, q_offset, heads=heads, length=length, kv_length=k.shape[1]
    )
  check_packing(packing)
  variants = tuple(
    Settings(
      pattern=one and one.with_causality(is_causal),
      is_causal=is_causal,
      scale=k.shape[-1] ** -0.5 if scale is None else float(scale),
      tiling=tiling,
      interpret=platform.interpret(),
    )
    for one in patterns
  )
  operands = Operands(
    q,
    k,
    v,
    packing,
    jnp.asarray(q_offset, jnp.int32),
    mask,
    q_segment_ids,
    kv_segment_ids,
  )
  names = tuple(
    _dispatch.choose(
      _OPERATION,
      implementation,
      settings,
      operands,
      order=_ORDER,
      named=_NAMED,
    )
    for settings in variants
  )
  if names[0] == "reference":
    return _switch(
      which,
      [functools.partial(reference.attention, one) for one in variants],
      operands,
    )
  return _attend(tuple(zip(names, variants, strict=True)), operands, which)


_Variants = tuple[tuple[str, Settings], ...]


def _module(name: str) -> Implementation:
  return cast(Implementation, _dispatch.load(_OPERATION, name))


def _switch(
  which: Int[Array, ""] | None,
  branches: Sequence[Callable[..., Any]],
  *args: Any,
) -> Any:
  return (
    branches[0](*args)
    if which is None
    else jax.lax.switch(which, branches, *args)
  )


# Around the switch, whose own derivative would keep what each branch keeps.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
  variants: _Variants, operands: Operands, which: Int[Array, ""] | None
) -> Float[Array, "rows H"]:
  return _attend_fwd(variants, operands, which)[0]


def _attend_fwd(
  variants: _Variants, operands: Operands, which: Int[Array, ""] | None
) -> tuple[Array, tuple[Operands, Any, Array, Array]]:
  branches = [
    functools.partial(_module(name).forward, settings)
    for name, settings in variants
  ]
  out, lse = _switch(which, branches, operands)
  return out, (operands, which, out, lse)


def _attend_bwd(
  variants: _Variants,
  residuals: tuple[Operands, Any, Array, Array],
  d_out: Array,
) -> tuple[Operands, None]:
  operands, which, out, lse = residuals
  branches = [
    functools.partial(_module(name).backward, settings)
    for name, settings in variants
  ]
  dq, dk, dv = _switch(which, branches, operands, out, lse, d_out)
  nothing: Any = None  # Integers have no gradients.
  return Operands(dq, dk, dv, *[nothing] * 5), None


_attend.defvjp(_attend_fwd, _attend_bwd)
