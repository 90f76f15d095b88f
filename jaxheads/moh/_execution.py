"""Attention over routed heads, computed densely or for active pairs only."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.moh._dense import attention_mask, dense_attention
from jaxheads.moh._routing import Routing, check_routing
from jaxheads.rope import apply_rope, check_positions, rope_angles, rotate
from jaxheads.sharding import per_device, spec
from jaxheads.sharding.partition import (
  heads_index,
  local_patterns,
  sum_over_heads,
)
from pallas_kernels import platform
from pallas_kernels.head_attention import HeadContexts
from pallas_kernels.head_attention.reference import visible
from pallas_kernels.notices import tell_once
from pallas_kernels.packing import Packing, gather_rows, pack
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.operands import check_context
from pallas_kernels.routed_attention.tiling import default_tiling
from pallas_kernels.routed_projection import project_in, project_out
from pallas_kernels.shapes import check_shape

Execution = Literal["dense", "dispatch"]
Implementation = Literal[
  "reference", "xla", "mosaic_tpu", "triton", "mosaic_gpu"
]

# Query length from which dispatch of half the heads is no slower, on a CPU,
# than computing every head densely: `experiments/bench_moh.py --lengths 256`.
CPU_DISPATCH_LENGTH = 256
# The same where heads have contexts: `experiments/bench_moh.py --stride 16`.
CPU_SHARDED_DISPATCH_LENGTH = 2048


class ExecutionChoice(NamedTuple):
  """How routed attention is computed, and why."""

  execution: Execution
  why: str


class _Tokens(NamedTuple):
  """Arrays with a batch axis."""

  x: Float[Array, "B T D"]
  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K H"]
  q: Float[Array, "B T N H"] | None
  routing: Routing | None
  q_positions: Int[Array, "B T"]
  mask: Bool[Array, "#B #N #T S"] | None
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: Int[Array, "B S"] | None


class _Weights(NamedTuple):
  """Arrays that all sequences share."""

  w_q: Float[Array, "D N H"] | None
  b_q: Float[Array, "N H"] | None
  w_o: Float[Array, "N H Dout"]
  q_offset: Int[Array, ""]


_TOKEN_SPECS = _Tokens(
  x=spec("batch", None, None),
  k=spec("batch", None, "kv_heads", None),
  v=spec("batch", None, "kv_heads", None),
  q=spec("batch", None, "heads", None),
  routing=Routing(
    mask=spec("batch", None, "heads"),
    gates=spec("batch", None, "heads"),
    probs=spec("batch", None, None),
  ),
  q_positions=spec("batch", None),
  mask=spec("batch", "heads", None, None),
  q_segment_ids=spec("batch", None),
  kv_segment_ids=spec("batch", None),
)
_WEIGHT_SPECS = _Weights(
  w_q=spec(None, "heads", None),
  b_q=spec("heads", None),
  w_o=spec("heads", None, None),
  q_offset=spec(),
)


class _Options(NamedTuple):
  """Static settings."""

  num_active: int
  rope_theta: float | None
  pattern: HeadContexts | None
  is_causal: bool
  scale: float
  implementation: Implementation | None


def moh_attention(
  x: Float[Array, "B T D"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  w_o: Float[Array, "N H Dout"],
  routing: Routing | None,
  num_active: int,
  w_q: Float[Array, "D N H"] | None = None,
  b_q: Float[Array, "N H"] | None = None,
  q: Float[Array, "B T N H"] | None = None,
  rope_theta: float | None = None,
  q_positions: Int[Array, "B T"] | None = None,
  pattern: HeadContexts | None = None,
  is_causal: bool = False,
  q_offset: Int[Array, ""] | int = 0,
  mask: Bool[Array, "#B #N #T S"] | None = None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
  scale: float | None = None,
  weights_fn: Callable[[Array], Array] | None = None,
  execution: Execution | None = None,
  implementation: Implementation | None = None,
) -> Float[Array, "B T Dout"]:
  """Sum over heads of gate x attention x output projection, without bias.

  out_t = sum_i gates_ti softmax(q_ti k_i^T scale) v_i w_o_i

  Queries are sparse, keys and values dense: an active query sees every
  visible key of its head, also those of tokens that did not pick the head.
  Head `n` reads KV head `n // (N // K)`.

  Args:
    x: Layer input; projected to queries by `w_q` unless `q` is given.
    k, v: Keys (after RoPE) and values of all tokens.
    w_o: Output projection.
    routing: Active heads and gates; `None` means all heads, ungated.
    num_active: Most active heads of any token (static).
    w_q, b_q: Query projection and its bias; RoPE follows if `rope_theta`.
    q: Finished queries (projected, normalised, rotated), instead of `w_q`.
    rope_theta: Base of RoPE; `None` for no RoPE. Not used with `q`.
    q_positions: Positions for RoPE, in any order; `None` means 0 .. T - 1.
    pattern: What each head sees, see `jaxheads.s2`; a routed head then has a
      sharded context. `None` is all keys.
    is_causal: Query t sees keys s <= t + `q_offset`; a causal `pattern` says
      so by itself.
    q_offset: Index, among the keys, of the first query.
    mask: True where a query may attend; broadcastable.
    q_segment_ids, kv_segment_ids: Queries see keys of their own segment;
      both or neither. Any numbers, in any order.
    scale: Multiplies the logits; `None` means H ** -0.5.
    weights_fn: Applied to the attention weights [B, N, T, S] (dropout, say);
      needs `execution="dense"`.
    execution: "dense" computes all heads and multiplies by the gates;
      "dispatch" computes queries, attention and output projection for the
      active pairs only. `None` takes the faster one for the backend and
      length, see `explain_execution`. Both are exact.
    implementation: Kernel of the dispatch: "reference", "xla", "mosaic_tpu"
      (TPU), "triton", "mosaic_gpu" (GPU); `None` takes the best available.

  Returns:
    Output in x's dtype. A query that sees no key contributes 0.

  Raises:
    TypeError: `routing.mask` is not bool.
    ValueError: Shapes disagree or arguments exclude each other. Outside of jit
      also values that are not allowed: more than `num_active` heads of a token,
      gates that are not finite, negative, or not 0 where a head is off,
      positions or an offset out of range. Under jit they are trusted, see
      `jaxheads.checks`.

  Source:
    MoH Eq. 2 and 5; specification of the dispatch: queries sparse, keys dense,
    causal by original position.
  """
  check_shape("x", x, "B T D", {})
  if q_positions is None:
    q_positions = jnp.broadcast_to(jnp.arange(x.shape[1])[None], x.shape[:2])
  tokens = _Tokens(
    x, k, v, q, routing, q_positions, mask, q_segment_ids, kv_segment_ids
  )
  weights = _Weights(w_q, b_q, w_o, jnp.asarray(q_offset, jnp.int32))
  tokens, weights = jax.tree.map(jnp.asarray, (tokens, weights))
  sizes = _check(tokens, weights, num_active, execution, implementation)
  check_context(
    pattern,
    q_offset,
    heads=sizes["N"],
    length=sizes["T"],
    kv_length=sizes["S"],
  )
  if routing is not None:
    check_routing(routing, num_active)
  if rope_theta is not None:
    check_positions("q_positions", q_positions)
  if 0 in (sizes["B"], sizes["T"], sizes["S"]):  # Nothing to compute.
    return jnp.zeros((sizes["B"], sizes["T"], sizes["Dout"]), x.dtype)
  options = _Options(
    num_active=sizes["N"] if routing is None else num_active,
    rope_theta=rope_theta,
    pattern=pattern and pattern.with_causality(is_causal),
    is_causal=is_causal,
    scale=sizes["H"] ** -0.5 if scale is None else scale,
    implementation=implementation,
  )
  if weights_fn is not None and execution == "dispatch":
    raise ValueError(
      "`weights_fn` sees the weights of all heads: it needs "
      "`execution='dense'`, got 'dispatch'."
    )
  execution = choose_execution(
    "moh_attention",
    (sizes["B"], sizes["T"], sizes["S"]),
    execution=execution,
    has_pattern=pattern is not None,
    all_heads_for=None if weights_fn is None else "`weights_fn`",
  )
  if execution == "dense":
    return _dense(tokens, weights, options, weights_fn)
  return per_device(
    functools.partial(_dispatch, options, sizes["N"]),
    (tokens, weights),
    (_TOKEN_SPECS, _WEIGHT_SPECS),
    spec("batch", None, None),
    batch_size=x.shape[0],
    num_kv_heads=sizes["K"],
  )


def explain_execution(
  length: int,
  *,
  execution: Execution | None = None,
  has_pattern: bool = False,
  all_heads_for: str | None = None,
) -> ExecutionChoice:
  """Which execution routed attention takes here, and why.

  Args:
    length: Queries of a sequence.
    execution: What was asked for; `None` is the faster one.
    has_pattern: Whether heads have contexts.
    all_heads_for: What needs every head computed; `None` is nothing.

  Example:
    >>> explain_execution(4096).why  # on a CPU
    'from 256 queries on it is the faster one on a CPU'
  """
  if all_heads_for is not None:
    return ExecutionChoice("dense", f"{all_heads_for} needs all heads")
  if execution is not None:
    return ExecutionChoice(execution, "it was asked for")
  if platform.current() != "cpu":
    return ExecutionChoice(
      "dense", "which one is faster was measured on CPUs only"
    )
  least = CPU_SHARDED_DISPATCH_LENGTH if has_pattern else CPU_DISPATCH_LENGTH
  if length < least:
    return ExecutionChoice(
      "dense", f"below {least} queries it is the faster one on a CPU"
    )
  return ExecutionChoice(
    "dispatch", f"from {least} queries on it is the faster one on a CPU"
  )


def choose_execution(
  who: str,
  sizes: tuple[int, int, int],
  *,
  execution: Execution | None,
  **needs: Any,
) -> Execution:
  """The execution to take; logged unless it is the one asked for.

  Args:
    who: Chooses, for the log.
    sizes: B, T and S.
    execution: What was asked for.
    **needs: See `explain_execution`.
  """
  batch, length, kv_length = sizes
  choice = explain_execution(length, execution=execution, **needs)
  if choice.execution != execution:
    tell_once(
      f"{who} on {platform.current()}, {batch} x {length} queries and "
      f"{kv_length} keys: execution {choice.execution!r}, because "
      f"{choice.why}. "
      + (
        "`execution=` takes the other one."
        if execution is None
        else f"{execution!r} was asked for."
      )
    )
  return choice.execution


def _dense(
  tokens: _Tokens,
  weights: _Weights,
  options: _Options,
  weights_fn: Callable[[Array], Array] | None,
) -> Float[Array, "B T Dout"]:
  """Every head for every token, then the gates."""
  x, k, v, q, routing, q_positions, mask, q_segment_ids, kv_segment_ids = tokens
  if q is None:
    q = jnp.einsum("btd,dnh->btnh", x, weights.w_q)
    q = q if weights.b_q is None else q + weights.b_q[None, None]
    if options.rope_theta is not None:
      q = apply_rope(q, q_positions, theta=options.rope_theta)
  if options.pattern is not None:
    positions = jnp.arange(x.shape[1]) + weights.q_offset
    of_pattern = visible(options.pattern, positions, k.shape[1])[None]
    mask = of_pattern if mask is None else of_pattern & mask
  seen = attention_mask(
    x.shape[1],
    k.shape[1],
    is_causal=options.is_causal,
    q_offset=weights.q_offset,
    mask=mask,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
  )
  out = dense_attention(
    q, k, v, mask=seen, scale=options.scale, weights_fn=weights_fn
  )
  gates = None if routing is None else routing.gates
  return combine_heads(out, gates, weights.w_o).astype(x.dtype)


def _dispatch(
  options: _Options, num_heads: int, operands: tuple[_Tokens, _Weights]
) -> Float[Array, "B T Dout"]:
  """Only the active (token, head) pairs, packed; of one device's heads."""
  tokens, weights = operands
  x, k, v, q, routing, q_positions, mask, q_segment_ids, kv_segment_ids = tokens
  heads, head_dim = weights.w_o.shape[:2]
  if routing is None:
    active = jnp.ones((*x.shape[:2], heads), bool)
  else:
    active = routing.mask
  tiling = default_tiling(
    x.shape[1], k.shape[1], options.num_active / num_heads
  )
  # A token may have all of its heads on one device.
  packing = pack(
    active,
    num_active=min(options.num_active, heads),
    block_rows=tiling.block_q,
  )
  by_definition = options.implementation == "reference"
  projection = "reference" if by_definition else None
  if q is None:
    assert weights.w_q is not None
    rows = project_in(x, weights.w_q, packing, implementation=projection)
    if weights.b_q is not None:
      rows = _add_per_head(rows, weights.b_q, packing)
    if options.rope_theta is not None:
      cos, sin = rope_angles(q_positions, head_dim, theta=options.rope_theta)
      rows = rotate(rows, _per_row(cos, packing), _per_row(sin, packing))
  else:
    rows = gather_rows(q, packing)
  patterns: Any = options.pattern
  which = None
  if options.pattern is not None and heads < num_heads:
    patterns = local_patterns(options.pattern, heads)
    which = heads_index()
  rows = routed_attention(
    rows,
    k,
    v,
    packing,
    pattern=patterns,
    which=which,
    scale=options.scale,
    is_causal=options.is_causal,
    q_offset=weights.q_offset,
    mask=mask,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
    tiling=tiling,
    implementation=options.implementation,
  )
  if routing is not None:
    rows = _gate(rows, gather_rows(routing.gates, packing))
  out = project_out(rows, weights.w_o, packing, implementation=projection)
  return out if heads == num_heads else sum_over_heads(out)


def combine_heads(
  out: Float[Array, "B T N H"],
  gates: Float[Array, "B T N"] | None,
  w_o: Float[Array, "N H Dout"],
) -> Float[Array, "B T Dout"]:
  """Sum over heads of gate x output x projection; `None` is gates of 1."""
  if gates is not None:
    out = _gate(out, gates)
  return jnp.einsum("btnh,nhd->btd", out, w_o)


def _gate(
  out: Float[Array, "*batch H"], gates: Float[Array, "*batch"]
) -> Float[Array, "*batch H"]:
  """Multiplies in float32, the gates' dtype; returns out's dtype."""
  return (out.astype(jnp.float32) * gates[..., None]).astype(out.dtype)


def _add_per_head(
  rows: Float[Array, "rows H"], bias: Float[Array, "N H"], packing: Packing
) -> Float[Array, "rows H"]:
  blocks = rows.reshape(-1, packing.block_rows, rows.shape[-1])
  return (blocks + bias[packing.block_head][:, None]).reshape(rows.shape)


def _per_row(
  table: Float[Array, "B T half"], packing: Packing
) -> Float[Array, "rows half"]:
  flat = table.reshape(-1, table.shape[-1])
  return flat.at[packing.row_token].get(mode="clip")


def _check(
  tokens: _Tokens,
  weights: _Weights,
  num_active: int,
  execution: str | None,
  implementation: str | None,
) -> dict[str, int]:
  """Sizes of the named axes; refuses what does not fit."""
  sizes: dict[str, int] = {}
  arrays = tokens._asdict() | weights._asdict()
  for name, axes in {
    "x": "B T D",
    "k": "B S K H",
    "v": "B S K H",
    "w_q": "D N H",
    "w_o": "N H Dout",
    "b_q": "N H",
    "q": "B T N H",
    "q_positions": "B T",
    "mask": "#B #N #T S",
    "q_segment_ids": "B T",
    "kv_segment_ids": "B S",
  }.items():
    check_shape(name, arrays[name], axes, sizes)
  if tokens.routing is not None:
    check_shape("routing.mask", tokens.routing.mask, "B T N", sizes)
    check_shape("routing.gates", tokens.routing.gates, "B T N", sizes)
  if (weights.w_q is None) == (tokens.q is None):
    raise ValueError("Give exactly one of `w_q` and `q`.")
  if (tokens.q_segment_ids is None) != (tokens.kv_segment_ids is None):
    raise ValueError(
      "Give both `q_segment_ids` and `kv_segment_ids`, or neither."
    )
  if sizes["N"] % sizes["K"]:
    raise ValueError(
      f"`k` must have a number of heads that divides the {sizes['N']} query "
      f"heads, got {sizes['K']}."
    )
  if not 0 <= num_active <= sizes["N"]:
    raise ValueError(
      f"`num_active` must be in [0, {sizes['N']}], the number of heads, "
      f"got {num_active}."
    )
  for name, value, choices in (
    ("execution", execution, get_args(Execution)),
    ("implementation", implementation, get_args(Implementation)),
  ):
    if value is not None and value not in choices:
      raise ValueError(f"`{name}` must be None or in {choices}, got {value!r}.")
  return sizes
