"""Head attention by the definition: the oracle of the fast paths."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.head_attention.contexts import HeadContexts, Table
from pallas_kernels.head_attention.operands import Operands, Settings


def visible_blocks(
  pattern: HeadContexts, q_blocks: Int[Array, " T"], kv_blocks: int
) -> Bool[Array, "N T blocks"]:
  """Which blocks of keys every head sees from a block of queries."""
  i, j = q_blocks[:, None], jnp.arange(kv_blocks)[None]
  seen = {
    # Tables are NumPy: a traced position cannot index them.
    rule: jnp.asarray(rule.mask())[i, j]
    if isinstance(rule, Table)
    else rule.keep(i, j)
    for rule in pattern.distinct_rules
  }
  return jnp.stack([seen[rule] for rule in pattern.rules])


def visible(
  pattern: HeadContexts, q_positions: Int[Array, " T"], kv_length: int
) -> Bool[Array, "N T S"]:
  """What every head sees, token by token; takes N x T x S memory."""
  block = pattern.block_size
  blocks = visible_blocks(pattern, q_positions // block, -(-kv_length // block))
  seen = jnp.repeat(blocks, block, axis=-1)[..., :kv_length]
  if pattern.is_causal:
    seen &= jnp.arange(kv_length) <= q_positions[:, None]
  return seen


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Every query against every key, in float32; JAX differentiates it."""
  q, k, v, q_segment_ids, kv_segment_ids, q_offset = operands
  groups = q.shape[2] // k.shape[2]
  if settings.q_offset is not None:
    q_offset = jnp.int32(settings.q_offset)
  wide_q = q.astype(jnp.float32)
  wide_k = jnp.repeat(k, groups, axis=2).astype(jnp.float32)
  wide_v = jnp.repeat(v, groups, axis=2).astype(jnp.float32)
  with jax.default_matmul_precision("highest"):
    logits = settings.scale * jnp.einsum("btnh,bsnh->bnts", wide_q, wide_k)
    if settings.logits_soft_cap is not None:
      cap = settings.logits_soft_cap
      logits = cap * jnp.tanh(logits / cap)
    positions = jnp.arange(q.shape[1]) + q_offset
    mask = visible(settings.pattern, positions, k.shape[1])[None]
    if q_segment_ids is not None and kv_segment_ids is not None:
      same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
      mask = mask & same[:, None]
    logits = jnp.where(mask, logits, -jnp.inf)
    # Finite for rows that see nothing: no inf - inf, also not in gradients.
    peak = jax.lax.stop_gradient(
      jnp.max(logits, axis=-1, keepdims=True, initial=-1e30)
    )
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1.0, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(safe))[..., 0]
    out = jnp.einsum("bnts,bsnh->btnh", weights / safe, wide_v)
  return out.astype(q.dtype), lse


def backward(
  settings: Settings,
  operands: Operands,
  out: Float[Array, "B T N Hv"],
  lse: Float[Array, "B N T"],
  d_out: Float[Array, "B T N Hv"],
  d_lse: Float[Array, "B N T"],
) -> tuple[
  Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]
]:
  """Gradients by JAX; `out` and `lse` may be those of more keys than here.

  With o and l of the keys here, a share w = exp(l - lse) of the softmax is
  theirs: they get w d_out for o, and w (d_out . (o - out) + d_lse) for l.
  """

  def of_arrays(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    return forward(settings, operands._replace(q=q, k=k, v=v))

  (own_out, own_lse), pullback = jax.vjp(of_arrays, *operands[:3])
  none = own_lse == -jnp.inf
  share = jnp.exp(jnp.where(none, -jnp.inf, own_lse - lse))
  wide = [x.astype(jnp.float32) for x in (out, own_out, d_out)]
  all_out, own_out, d_out = wide
  d_share = jnp.einsum(
    "btnh,btnh->bnt",
    d_out,
    own_out - all_out,
    precision=jax.lax.Precision.HIGHEST,
  )
  d_own_out = d_out * share.swapaxes(1, 2)[..., None]
  d_own_lse = jnp.where(none, 0.0, share * (d_share + d_lse))
  return pullback((d_own_out.astype(out.dtype), d_own_lse))
