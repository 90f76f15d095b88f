"""Public door of head attention."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _dispatch, platform
from pallas_kernels.head_attention import reference
from pallas_kernels.head_attention.contexts import HeadContexts
from pallas_kernels.head_attention.operands import (
  Implementation,
  Operands,
  Settings,
)
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.shapes import check_shape

# From best to the one that covers everything. Not here, because its numbers
# were never shown right on a GPU: mosaic_gpu, which must be asked for by name.
_ORDER = ("mosaic_tpu", "triton", "xla")
_NAMED = (*_ORDER, "mosaic_gpu", "reference")
_OPERATION = "head_attention"


def head_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K Hv"],
  *,
  pattern: HeadContexts,
  scale: float | None = None,
  logits_soft_cap: float | None = None,
  q_offset: Int[Array, ""] | int | None = None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  sinks: Float[Array, " N"] | None = None,
  return_lse: bool = False,
  tiling: Tiling | None = None,
  implementation: str | None = None,
) -> Any:
  """Attention in which head n sees what `pattern.rules[n]` lets it see.

  out_tn = softmax over the visible s of (scale q_tn k_sm) times v_sm,
  with KV head m = n // (N / K)

  Equals masked dense attention; what a head does not see costs nothing, in
  time or memory. Differentiable in `q`, `k`, `v` and `sinks`, also through
  the log-sum-exp.

  Args:
    q: Queries (after RoPE).
    k, v: Keys (after RoPE) and values. The sizes of their heads may differ.
    pattern: What each of the N heads sees; static. Blocks are counted from
      the first key. See `jaxheads.s2` for ready ones.
    scale: Multiplies the logits; `None` means H ** -0.5.
    logits_soft_cap: Positive c; logits become c tanh(logits / c).
    q_offset: Position of the first query among the keys. `None` means S - T:
      the queries are the last ones.
    q_segment_ids, kv_segment_ids: Queries see keys of their own segment; both
      or neither. The pattern still counts blocks from the first key.
    sinks: A logit per head that takes weight and gives nothing: the softmax's
      denominator also holds exp(sink).
    return_lse: Also return the log-sum-exp of the logits, sinks included.
    tiling: Tile sizes; `None` takes tuned ones.
    implementation: "reference", "xla", "mosaic_tpu" (TPU), "triton" (GPU),
      "mosaic_gpu" (Hopper and Blackwell; not yet run on one) or `None`
      for the best one.

  Returns:
    Output [B, T, N, Hv] in q's dtype, softmax and sums in float32. With
    `return_lse` a pair: the output, and the float32 log-sum-exp [B, T, N]. A
    query that sees nothing gives 0 and -inf.

  Raises:
    ValueError: Shapes disagree with each other or with the pattern.
    TypeError: q, k and v are not of one floating dtype.
    NotImplementedError: The named implementation does not cover these inputs.

  Source:
    S2-Attention, https://arxiv.org/abs/2407.17678.
  """
  sizes: dict[str, int] = {}
  check_operands(q, k, v, q_segment_ids, kv_segment_ids, sizes)
  check_shape("sinks", sinks, "N", sizes)
  check_heads(pattern, q)
  if logits_soft_cap is not None and not logits_soft_cap > 0:
    raise ValueError(
      f"`logits_soft_cap` must be positive, got {logits_soft_cap}."
    )
  if q_offset is None:
    q_offset = k.shape[1] - q.shape[1]
  static = None if isinstance(q_offset, jax.Array) else int(q_offset)
  if static is not None and static < 0:
    raise ValueError(
      f"`q_offset` must not be negative, got {static}; with more queries "
      "than keys, pass `q_offset=0`."
    )
  pattern.check_lengths((static or 0) + q.shape[1], k.shape[1])
  settings = Settings(
    pattern=pattern,
    scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
    logits_soft_cap=logits_soft_cap,
    q_offset=static,
    tiling=tiling,
    interpret=platform.interpret(),
  )
  operands = Operands(
    q, k, v, q_segment_ids, kv_segment_ids, jnp.asarray(q_offset, jnp.int32)
  )
  name = choose(implementation, settings, operands)
  if name == "reference":
    out, lse = reference.forward(settings, operands)
  else:
    out, lse = _attend(name, settings, operands)
  if sinks is not None:
    out, lse = _with_sinks(out, lse, sinks)
  if return_lse:
    return out, lse.swapaxes(1, 2)
  return out


def choose(name: str | None, settings: Settings, operands: Operands) -> str:
  """Name of the implementation to run; looks at shapes and dtypes only."""
  return _dispatch.choose(
    _OPERATION, name, settings, operands, order=_ORDER, named=_NAMED
  )


def module(name: str) -> Implementation:
  """The implementation of that name."""
  return cast(Implementation, _dispatch.load(_OPERATION, name))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
  name: str, settings: Settings, operands: Operands
) -> tuple[Array, Array]:
  return module(name).forward(settings, operands)


def _attend_fwd(
  name: str, settings: Settings, operands: Operands
) -> tuple[tuple[Array, Array], tuple[Operands, Array, Array]]:
  out, lse = module(name).forward(settings, operands)
  return (out, lse), (operands, out, lse)


def _attend_bwd(
  name: str,
  settings: Settings,
  residuals: tuple[Operands, Array, Array],
  cotangents: tuple[Array, Array],
) -> tuple[Operands]:
  operands, out, lse = residuals
  d_out, d_lse = cotangents
  dq, dk, dv = module(name).backward(settings, operands, out, lse, d_out, d_lse)
  # Integers have no gradients.
  return (Operands(dq, dk, dv, None, None, None),)  # type: ignore[arg-type]


_attend.defvjp(_attend_fwd, _attend_bwd)


def _with_sinks(
  out: Float[Array, "B T N Hv"],
  lse: Float[Array, "B N T"],
  sinks: Float[Array, " N"],
) -> tuple[Array, Array]:
  """The same softmax with one more logit, whose value is zero."""
  sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None], lse.shape)
  # Neither a key nor a sink: -inf - -inf would be NaN, here and in gradients.
  nothing = (lse == -jnp.inf) & (sink == -jnp.inf)
  safe_lse = jnp.where(nothing, 0.0, lse)
  total = jnp.logaddexp(safe_lse, jnp.where(nothing, 0.0, sink))
  share = jnp.exp(safe_lse - total).swapaxes(1, 2)[..., None]
  total = jnp.where(nothing, -jnp.inf, total)
  return (out.astype(jnp.float32) * share).astype(out.dtype), total


def check_operands(
  q: Array,
  k: Array,
  v: Array,
  q_segment_ids: Array | None,
  kv_segment_ids: Array | None,
  sizes: dict[str, int],
) -> None:
  """Raises where arrays disagree; `sizes` learns the sizes of their axes."""
  check_shape("q", q, "B T N H", sizes)
  check_shape("k", k, "B S K H", sizes)
  check_shape("v", v, "B S K Hv", sizes)
  check_shape("q_segment_ids", q_segment_ids, "B T", sizes)
  check_shape("kv_segment_ids", kv_segment_ids, "B S", sizes)
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError(
      "`q_segment_ids` and `kv_segment_ids` must be given together."
    )
  heads, kv_heads = q.shape[2], k.shape[2]
  if heads % kv_heads:
    raise ValueError(
      f"`k` must have a number of heads that divides q's {heads}, got "
      f"{kv_heads}."
    )
  for name, array in (("q", q), ("k", k), ("v", v)):
    if not jnp.issubdtype(array.dtype, jnp.floating) or array.dtype != q.dtype:
      raise TypeError(
        "`q`, `k` and `v` must have one floating dtype, got "
        f"{q.dtype}, {k.dtype} and {v.dtype} (`{name}`)."
      )


def check_heads(pattern: HeadContexts, q: Array) -> None:
  """Raises unless the pattern has a rule for each head of `q`."""
  heads = q.shape[2]
  if pattern.num_heads != heads:
    raise ValueError(
      f"`pattern` is for {pattern.num_heads} query heads, `q` has {heads}. "
      "Make the pattern for this number of heads."
    )
