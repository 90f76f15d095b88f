"""Attention over routed heads, computed densely or for active pairs only."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.moh._routing import Routing
from jaxheads.rope import apply_rope, rope_angles, rotate
from pallas_kernels.packing import Packing, gather_rows, pack
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import default_tiling
from pallas_kernels.routed_projection import project_in, project_out
from pallas_kernels.shapes import check_shape

Execution = Literal["dense", "dispatch"]
Implementation = Literal["reference", "xla"]

# Shortest query length at which dispatch beats computing every head densely
# on a CPU, by `experiments/bench_moh.py`.
CPU_DISPATCH_LENGTH = 512


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
    q_positions: Positions for RoPE; `None` means 0 .. T - 1.
    is_causal: Query t sees keys s <= t + `q_offset`.
    q_offset: Index, among the keys, of the first query.
    mask: True where a query may attend; broadcastable.
    q_segment_ids, kv_segment_ids: Queries see keys of their own segment;
      both or neither.
    scale: Multiplies the logits; `None` means H ** -0.5.
    weights_fn: Applied to the attention weights [B, N, T, S] (dropout, say);
      needs `execution="dense"`.
    execution: "dense" computes all heads and multiplies by the gates;
      "dispatch" computes queries, attention and output projection for the
      active pairs only. `None` takes the faster one for the backend and
      length. Both are exact.
    implementation: Kernel of the dispatch; `None` takes the best available.

  Returns:
    Output in x's dtype. A query that sees no key contributes 0.

  Raises:
    ValueError: Shapes disagree or arguments exclude each other.

  Source:
    MoH Eq. 2 and 5; specification of the dispatch: queries sparse, keys dense,
    causal by original position.
  """
  arrays = {
    "x": x,
    "k": k,
    "v": v,
    "w_o": w_o,
    "w_q": w_q,
    "b_q": b_q,
    "q": q,
    "q_positions": q_positions,
    "mask": mask,
    "q_segment_ids": q_segment_ids,
    "kv_segment_ids": kv_segment_ids,
  }
  sizes = _check(arrays, routing, num_active, execution, implementation)
  batch, length, heads, head_dim = (sizes[axis] for axis in "BTNH")
  scale = head_dim**-0.5 if scale is None else scale
  if routing is None:
    num_active = heads
  if execution is None:
    execution = choose_execution(length, weights_fn)
  if execution == "dispatch" and weights_fn is not None:
    raise ValueError(
      "`weights_fn` sees the weights of all heads: it needs "
      "`execution='dense'`, got 'dispatch'."
    )
  if q_positions is None:
    q_positions = jnp.broadcast_to(jnp.arange(length), (batch, length))

  if execution == "dense":
    if q is None:
      q = jnp.einsum("btd,dnh->btnh", x, w_q)
      q = q if b_q is None else q + b_q
      if rope_theta is not None:
        q = apply_rope(q, q_positions, theta=rope_theta)
    visible = attention_mask(
      length,
      k.shape[1],
      is_causal=is_causal,
      q_offset=q_offset,
      mask=mask,
      q_segment_ids=q_segment_ids,
      kv_segment_ids=kv_segment_ids,
    )
    out = dense_attention(
      q, k, v, mask=visible, scale=scale, weights_fn=weights_fn
    )
    if routing is not None:
      out = _gate(out, routing.gates)
    return jnp.einsum("btnh,nhd->btd", out, w_o).astype(x.dtype)

  if routing is None:
    active = jnp.ones((batch, length, heads), bool)
  else:
    active = routing.mask
  tiling = default_tiling(length, k.shape[1], num_active / heads)
  packing = pack(active, num_active=num_active, block_rows=tiling.block_q)
  if q is None:
    assert w_q is not None
    rows = project_in(x, w_q, packing, implementation=implementation)
    if b_q is not None:
      rows = _add_per_head(rows, b_q, packing)
    if rope_theta is not None:
      cos, sin = rope_angles(q_positions, head_dim, theta=rope_theta)
      rows = rotate(rows, _per_row(cos, packing), _per_row(sin, packing))
  else:
    rows = gather_rows(q, packing)
  rows = routed_attention(
    rows,
    k,
    v,
    packing,
    scale=scale,
    is_causal=is_causal,
    q_offset=q_offset,
    mask=mask,
    q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids,
    tiling=tiling,
    implementation=implementation,
  )
  if routing is not None:
    rows = _gate(rows, gather_rows(routing.gates, packing))
  return project_out(rows, w_o, packing, implementation=implementation)


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


def choose_execution(
  length: int, weights_fn: Callable[[Array], Array] | None = None
) -> Execution:
  """The faster exact execution for this backend and query length."""
  if weights_fn is not None or jax.default_backend() != "cpu":
    return "dense"
  return "dispatch" if length >= CPU_DISPATCH_LENGTH else "dense"


def attention_mask(
  q_length: int,
  kv_length: int,
  *,
  is_causal: bool = False,
  q_offset: Int[Array, ""] | int = 0,
  mask: Bool[Array, "#B #N #T S"] | None = None,
  q_segment_ids: Int[Array, "B T"] | None = None,
  kv_segment_ids: Int[Array, "B S"] | None = None,
) -> Bool[Array, "#B #N T S"] | None:
  """Which keys each query sees, as one dense mask; `None` means all."""
  visible = []
  if is_causal:
    q_index = jnp.arange(q_length)[:, None] + q_offset
    visible.append((q_index >= jnp.arange(kv_length)[None])[None, None])
  if mask is not None:
    visible.append(mask)
  if q_segment_ids is not None and kv_segment_ids is not None:
    same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
    visible.append(same[:, None])
  if not visible:
    return None
  result = visible[0]
  for other in visible[1:]:
    result = result & other
  return result


def dense_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  mask: Bool[Array, "#B #N #T S"] | None = None,
  scale: float,
  weights_fn: Callable[[Array], Array] | None = None,
) -> Float[Array, "B T N H"]:
  """Attention of all heads through the whole weight matrix.

  Logits and softmax are float32. A query that sees no key gives 0.
  """
  batch, length, heads, head_dim = q.shape
  kv_length, kv_heads = k.shape[1:3]
  grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
  logits = scale * jnp.einsum(
    "btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32
  )
  logits = logits.reshape(batch, heads, length, kv_length)
  if mask is None:
    weights = jax.nn.softmax(logits)
  else:
    # Finite, so that a row without keys has no NaN; such a row is zeroed.
    logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits)
    weights = jnp.where(mask.any(-1, keepdims=True), weights, 0.0)
  if weights_fn is not None:
    weights = weights_fn(weights)
  weights = weights.reshape(batch, kv_heads, -1, length, kv_length)
  out = jnp.einsum(
    "bkgts,bskh->btkgh",
    weights.astype(v.dtype),
    v,
    preferred_element_type=jnp.float32,
  )
  return out.reshape(q.shape).astype(q.dtype)


def _check(
  arrays: Mapping[str, Array | None],
  routing: Routing | None,
  num_active: int,
  execution: str | None,
  implementation: str | None,
) -> dict[str, int]:
  """Sizes of the named axes; refuses what does not fit."""
  sizes: dict[str, int] = {}
  for name, spec in {
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
    check_shape(name, arrays[name], spec, sizes)
  if routing is not None:
    check_shape("routing.mask", routing.mask, "B T N", sizes)
    check_shape("routing.gates", routing.gates, "B T N", sizes)
  if (arrays["w_q"] is None) == (arrays["q"] is None):
    raise ValueError("Give exactly one of `w_q` and `q`.")
  if (arrays["q_segment_ids"] is None) != (arrays["kv_segment_ids"] is None):
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
