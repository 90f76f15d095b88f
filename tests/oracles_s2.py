"""Sharded sparse attention in NumPy float64: the tests' own second opinion.

Written from the paper's formulas and the released code's index rules; no
helper, default or constant comes from the library, every choice is an
argument. Loops where they are clearer than broadcasting.

`jnp_dense` alone is in JAX: plain dense attention in the dtype it is given, for
the low-precision rule.

S2-Attention: https://arxiv.org/abs/2407.17678. In the formulas h is a query
head, g the head whose pattern it has, i a block of queries, j one of keys, L
the window in blocks (the diagonal one among them), V the vertical stride, s
the step and o the offset from head to head:

  keep(h, i, j) <=> j <= i and (i - j < L or (j + g(h) s + o) mod V == 0)
"""

import jax
import jax.numpy as jnp
import numpy as np


def pattern_head(head, num_heads, *, num_kv_heads, per_query_head):
  """g(h): the head itself, or its KV head when these share a pattern."""
  if num_kv_heads is None or per_query_head:
    return head
  return head // (num_heads // num_kv_heads)


def strided_blocks(
  num_heads,
  rows,
  columns,
  *,
  local,
  stride,
  num_kv_heads=None,
  offset=0,
  step=None,
  sign=-1,
  dense_heads=0,
  per_query_head=False,
):
  """Block mask of the local-stride pattern, bool [N, rows, columns].

  `sign=-1` is the formula above (the released code); `sign=+1` is the mirror
  image that the paper's figure draws: (j - g s - o) mod V == 0.
  `dense_heads` counts pattern heads, from the last one backwards.
  """
  step = max(1, stride // num_heads) if step is None else step
  shared = num_kv_heads is not None and not per_query_head
  num_patterns = num_kv_heads if shared else num_heads
  mask = np.zeros((num_heads, rows, columns), bool)
  for h, i, j in np.ndindex(mask.shape):
    g = pattern_head(
      h, num_heads, num_kv_heads=num_kv_heads, per_query_head=per_query_head
    )
    if g >= num_patterns - dense_heads:
      mask[h, i, j] = j <= i
      continue
    remote = (j - sign * (g * step + offset)) % stride == 0
    mask[h, i, j] = j <= i and (i - j < local or remote)
  return mask


def window_blocks(num_heads, rows, columns, *, local, sinks=0):
  """The last `local` blocks and the first `sinks` ones."""
  mask = np.zeros((num_heads, rows, columns), bool)
  for h, i, j in np.ndindex(mask.shape):
    mask[h, i, j] = j <= i and (i - j < local or j < sinks)
  return mask


def context_range_blocks(
  rows, columns, *, near, near_stride, far_stride, near_residues, far_residues
):
  """The last `near` blocks by one stride, older ones by another.

  One residue a head for each of the two; bool [N, rows, columns].
  """
  mask = np.zeros((len(near_residues), rows, columns), bool)
  for h, i, j in np.ndindex(mask.shape):
    if j > i:
      continue
    if i - j < near:
      mask[h, i, j] = j % near_stride == near_residues[h]
    else:
      mask[h, i, j] = j % far_stride == far_residues[h]
  return mask


def row_blocks(row, *, local, stride, residue):
  """The blocks that row `row` keeps, by the paper's closed form, ascending."""
  lo = max(0, row - local + 1)
  n_local = row - lo + 1
  n_vertical = max(0, -((residue - lo) // stride))
  return [
    residue + t * stride if t < n_vertical else lo + (t - n_vertical)
    for t in range(n_vertical + n_local)
  ]


def column_rows(column, rows, *, local, stride, residue):
  """First and last row that keep a column, by the paper's closed form."""
  if column % stride == residue:
    return column, rows - 1
  return column, min(rows - 1, column + local - 1)


def retained_blocks(mask, row):
  """Blocks that row `row` or a later one reads, bool [columns].

  mask: bool [heads, rows, columns] of all query heads of one KV head. Only
  the past counts: blocks after `row` are not in the cache yet.
  """
  needed = mask[:, row:, :].any(axis=(0, 1))
  needed[row + 1 :] = False
  return needed


def kv_efficient(mask):
  """Whether a block that a row does not keep never comes back.

  mask: bool [heads, rows, columns]. Blocks below the diagonal count.
  """
  heads, rows, columns = mask.shape
  for h in range(heads):
    for i in range(1, rows):
      for j in range(min(i, columns)):
        if mask[h, i, j] and not mask[h, i - 1, j]:
          return False
  return True


def union_complete(mask):
  """Whether the heads together see every block of the past."""
  rows, columns = mask.shape[1:]
  return all(
    mask[:, i, j].any() for i in range(rows) for j in range(min(i + 1, columns))
  )


def token_mask(blocks, block_size, *, q_length, kv_length, q_offset, is_causal):
  """What every head sees, token by token: bool [N, T, S]."""
  positions = q_offset + np.arange(q_length)
  keys = np.arange(kv_length)
  mask = blocks[:, positions // block_size][:, :, keys // block_size]
  if is_causal:
    mask = mask & (keys[None] <= positions[:, None])
  return mask


def with_segments(mask, q_segments, kv_segments):
  """`mask` [N, T, S] for each sequence of a batch: bool [B, N, T, S]."""
  batch = len(q_segments)
  seen = np.zeros((batch, *mask.shape), bool)
  for b in range(batch):
    same = np.equal.outer(np.asarray(q_segments[b]), np.asarray(kv_segments[b]))
    seen[b] = mask & same
  return seen


def _head(q, k, seen, *, scale, soft_cap, sink):
  """Weights [T, S], log-sum-exp [T] and capped logits' slopes [T, S].

  Weights of a row sum to 1 less the sink's share; a row that sees nothing
  has zero weights, and -inf (or the sink) as its log-sum-exp.
  """
  logits = scale * (q @ k.T)
  slope = np.ones_like(logits)
  if soft_cap is not None:
    bounded = np.tanh(logits / soft_cap)
    logits, slope = soft_cap * bounded, 1 - bounded**2
  weights = np.zeros(seen.shape)
  lse = np.full(len(q), -np.inf)
  for t in range(len(q)):
    mine = list(logits[t, seen[t]])
    everything = mine if sink is None else [*mine, sink]
    if not everything or max(everything) == -np.inf:
      continue
    peak = max(everything)
    lse[t] = peak + np.log(np.sum(np.exp(np.array(everything) - peak)))
    weights[t, seen[t]] = np.exp(np.array(mine) - lse[t])
  return weights, lse, slope


def _wide(*arrays):
  return tuple(np.asarray(array, np.float64) for array in arrays)


def _sink(sinks, head):
  return None if sinks is None else float(np.asarray(sinks, np.float64)[head])


def attention(q, k, v, seen, *, scale, soft_cap=None, sinks=None):
  """Masked softmax attention: out [B, T, N, Hv] and log-sum-exp [B, T, N].

  q [B, T, N, H]; k [B, S, K, H]; v [B, S, K, Hv]; seen [B or 1, N, T, S];
  sinks [N] or None. Query head n reads KV head n // (N // K).
  """
  q, k, v = _wide(q, k, v)
  batch, q_length, num_heads, _ = q.shape
  group = num_heads // k.shape[2]
  seen = np.broadcast_to(seen, (batch, *seen.shape[1:]))
  out = np.zeros((batch, q_length, num_heads, v.shape[-1]))
  lse = np.zeros((batch, q_length, num_heads))
  for b, n in np.ndindex(batch, num_heads):
    kv = n // group
    weights, lse[b, :, n], _ = _head(
      q[b, :, n],
      k[b, :, kv],
      seen[b, n],
      scale=scale,
      soft_cap=soft_cap,
      sink=_sink(sinks, n),
    )
    out[b, :, n] = _weighted(weights, v[b, :, kv])
  return out, lse


def _weighted(weights, values):
  """weights @ values, keys of no weight left out (they may be infinite)."""
  used = weights.any(axis=0)
  return weights[:, used] @ values[used]


def attention_grads(
  q, k, v, seen, d_out, d_lse, *, scale, soft_cap=None, sinks=None
):
  """Gradients of <out, d_out> + <lse, d_lse> by hand: dq, dk, dv, d_sinks.

  d_lse [B, T, N] counts only where the log-sum-exp is finite. Shapes as in
  `attention`; d_sinks is [N], zero without sinks.
  """
  q, k, v, d_out, d_lse = _wide(q, k, v, d_out, d_lse)
  batch, _, num_heads, _ = q.shape
  group = num_heads // k.shape[2]
  seen = np.broadcast_to(seen, (batch, *seen.shape[1:]))
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  d_sinks = np.zeros(num_heads)
  for b, n in np.ndindex(batch, num_heads):
    kv, sink = n // group, _sink(sinks, n)
    weights, lse, slope = _head(
      q[b, :, n],
      k[b, :, kv],
      seen[b, n],
      scale=scale,
      soft_cap=soft_cap,
      sink=sink,
    )
    out = _weighted(weights, v[b, :, kv])
    d_row = np.where(np.isfinite(lse), d_lse[b, :, n], 0.0)
    d_row = d_row - (d_out[b, :, n] * out).sum(axis=-1)
    d_weights = d_out[b, :, n] @ v[b, :, kv].T
    d_logits = weights * (d_weights + d_row[:, None]) * slope * scale
    dq[b, :, n] = _weighted(d_logits, k[b, :, kv])
    dk[b, :, kv] += d_logits.T @ q[b, :, n]
    dv[b, :, kv] += weights.T @ d_out[b, :, n]
    if sink is not None and sink > -np.inf:
      d_sinks[n] += (np.exp(sink - lse) * d_row).sum()
  return dq, dk, dv, d_sinks


def jnp_dense(q, k, v, seen, *, scale):
  """Masked dense attention, products of the inputs' dtype summed in float32.

  Softmax in float32, weights rounded before they meet the values: what a
  careful dense implementation does. Differentiable.
  """
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
  logits = scale * jnp.einsum(
    "btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32
  )
  logits = jnp.where(seen, logits, -1e30)
  weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0.0)
  return jnp.einsum("bnts,bsnh->btnh", weights.astype(v.dtype), v)
