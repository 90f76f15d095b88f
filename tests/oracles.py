"""What the papers say, in NumPy float64: the tests' own second opinion.

Written from the papers and shared with nothing: no helper, default or constant
comes from the library, every choice is an argument. Loops where they are
clearer than an einsum. `jnp_layer` alone is in JAX; it is the plain textbook
layer that rounds in the dtype it is given, for the low-precision rule.

MoH: https://arxiv.org/abs/2410.11842. RoPE: https://arxiv.org/abs/2104.09864.
"""

import jax
import jax.numpy as jnp
import numpy as np


def softmax(logits):
  """Softmax over the last axis; float64."""
  logits = np.asarray(logits, np.float64)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return weights / weights.sum(axis=-1, keepdims=True)


def pick_top(scores, count):
  """The `count` largest of a vector as a bool mask; lowest index wins ties."""
  order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
  mask = np.zeros(len(scores), bool)
  mask[order[:count]] = True
  return mask


def select(scores, count, token_mask):
  """`pick_top` for each token of [B, T, routed]; padding picks nothing."""
  mask = np.zeros(scores.shape, bool)
  for b, t in np.ndindex(scores.shape[:2]):
    if token_mask[b, t]:
      mask[b, t] = pick_top(scores[b, t], count)
  return mask


def two_stage_gates(
  x, w_routed, w_kind, w_shared, *, num_shared, top_k, form, routed_mask
):
  """Gates [B, T, N] of the two-stage router for a given selection, and probs.

  Eq. 5-6 for `form="paper"`; the released code's scaled, renormalised variant
  for `form="scaled"`. `routed_mask` [B, T, routed] may mark no head of a token
  (padding): its gates are then 0. Weights are [D, out]; absent ones are None.
  """
  x = np.asarray(x, np.float64)
  num_routed = routed_mask.shape[-1]
  gates = np.zeros((*x.shape[:2], num_shared + num_routed))
  probs = np.zeros((*x.shape[:2], num_routed))
  for b, t in np.ndindex(x.shape[:2]):
    token = x[b, t]
    alpha_shared = alpha_routed = 1.0
    if top_k > 0 and num_shared > 0:
      alpha_shared, alpha_routed = softmax(token @ w_kind)
      if form == "scaled":
        alpha_shared, alpha_routed = 2 * alpha_shared, 2 * alpha_routed
    shared = np.ones(num_shared)
    if num_shared > 1:
      shared = softmax(token @ w_shared)
      if form == "scaled":
        shared = num_shared * shared
    gates[b, t, :num_shared] = alpha_shared * shared
    if top_k > 0:
      probs[b, t] = softmax(token @ w_routed)
      chosen = np.where(routed_mask[b, t], probs[b, t], 0.0)
      if form == "scaled" and chosen.any():
        chosen = top_k * chosen / chosen.sum()
      gates[b, t, num_shared:] = alpha_routed * chosen
      if not routed_mask[b, t].any():
        gates[b, t] = 0.0
  return gates, probs


def query_norms(q):
  """Euclidean norm of each query head: [B, T, N]."""
  q = np.asarray(q, np.float64)
  norms = np.zeros(q.shape[:3])
  for b, t, n in np.ndindex(norms.shape):
    norms[b, t, n] = np.sqrt(np.dot(q[b, t, n], q[b, t, n]))
  return norms


def query_norm_probs(q, num_shared):
  """softmax(norm / unbiased standard deviation) over the routed heads."""
  norms = query_norms(q)[..., num_shared:]
  probs = np.zeros(norms.shape)
  for b, t in np.ndindex(norms.shape[:2]):
    n = norms[b, t]
    std = np.sqrt(((n - n.mean()) ** 2).sum() / (len(n) - 1))
    probs[b, t] = softmax(n / std)
  return probs


def load_balance(probs, routed_mask, token_mask):
  """routed * sum_i P_i f_i over the valid tokens (the released code's form)."""
  num_routed = probs.shape[-1]
  valid = [bt for bt in np.ndindex(token_mask.shape) if token_mask[bt]]
  if not valid or num_routed == 0:
    return 0.0
  total = 0.0
  for i in range(num_routed):
    mean_prob = sum(float(probs[bt][i]) for bt in valid) / len(valid)
    fraction = sum(bool(routed_mask[bt][i]) for bt in valid) / len(valid)
    total += mean_prob * fraction
  return num_routed * total


def rope(x, positions, theta):
  """Rotates dimension pairs (i, i + H/2) of [B, T, N, H] by position angles."""
  x = np.asarray(x, np.float64)
  half = x.shape[-1] // 2
  out = np.zeros_like(x)
  for b, t in np.ndindex(x.shape[:2]):
    for i in range(half):
      angle = float(positions[b, t]) * theta ** (-2.0 * i / x.shape[-1])
      first, second = x[b, t, :, i], x[b, t, :, half + i]
      out[b, t, :, i] = first * np.cos(angle) - second * np.sin(angle)
      out[b, t, :, half + i] = second * np.cos(angle) + first * np.sin(angle)
  return out


def visible(
  *,
  num_heads,
  q_positions,
  kv_positions,
  causal,
  mask=None,
  q_segments=None,
  kv_segments=None,
):
  """Which key each query may see: bool [B, N, T, S]."""
  q_positions, kv_positions = np.asarray(q_positions), np.asarray(kv_positions)
  batch, q_len = q_positions.shape
  seen = np.ones((batch, num_heads, q_len, kv_positions.shape[1]), bool)
  if mask is not None:
    seen &= np.asarray(mask, bool)
  for b in range(batch):
    if causal:
      seen[b] &= kv_positions[b][None, :] <= q_positions[b][:, None]
    if q_segments is not None:
      seen[b] &= np.equal.outer(q_segments[b], kv_segments[b])
  return seen


def _head_weights(q, k, seen, scale):
  """Attention weights [T, S] of one head; rows that see nothing are 0."""
  rows = seen.any(axis=-1)
  weights = np.zeros(seen.shape)
  weights[rows] = softmax(np.where(seen, q @ k.T * scale, -np.inf)[rows])
  return weights


def moh_heads(q, k, v, w_o, gates, seen, scale):
  """sum_i gate_i softmax(q_i k_i^T scale) v_i W_O^i: [B, T, Dout].

  q [B, T, N, H]; k, v [B, S, K, H]; w_o [N, H, Dout]; gates [B, T, N];
  seen [B, N, T, S]. Query head n reads KV head n // (N // K).
  """
  q, k, v, w_o, gates = (
    np.asarray(a, np.float64) for a in (q, k, v, w_o, gates)
  )
  batch, q_len, num_heads, _ = q.shape
  group = num_heads // k.shape[2]
  out = np.zeros((batch, q_len, w_o.shape[-1]))
  for b, n in np.ndindex(batch, num_heads):
    kv = n // group
    weights = _head_weights(q[b, :, n], k[b, :, kv], seen[b, n], scale)
    head = weights @ v[b, :, kv]
    out[b] += (gates[b, :, n, None] * head) @ w_o[n]
  return out


def moh_heads_grads(q, k, v, w_o, gates, seen, scale, dout):
  """Gradients of <moh_heads, dout> by q, k, v, w_o and gates, by hand."""
  q, k, v, w_o, gates, dout = (
    np.asarray(a, np.float64) for a in (q, k, v, w_o, gates, dout)
  )
  group = q.shape[2] // k.shape[2]
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  dw_o, dgates = np.zeros_like(w_o), np.zeros_like(gates)
  for b, n in np.ndindex(q.shape[0], q.shape[2]):
    kv = n // group
    weights = _head_weights(q[b, :, n], k[b, :, kv], seen[b, n], scale)
    head = weights @ v[b, :, kv]
    dgated = dout[b] @ w_o[n].T
    dw_o[n] += (gates[b, :, n, None] * head).T @ dout[b]
    dgates[b, :, n] = (dgated * head).sum(axis=-1)
    dhead = gates[b, :, n, None] * dgated
    dv[b, :, kv] += weights.T @ dhead
    dweights = dhead @ v[b, :, kv].T
    inner = (dweights * weights).sum(axis=-1, keepdims=True)
    dlogits = weights * (dweights - inner) * scale
    dq[b, :, n] = dlogits @ k[b, :, kv]
    dk[b, :, kv] += dlogits.T @ q[b, :, n]
  return dq, dk, dv, dw_o, dgates


def project(x, kernel, bias=None):
  """x [B, T, D] by kernel [D, N, H]: [B, T, N, H]."""
  out = np.einsum(
    "btd,dnh->btnh", np.asarray(x, np.float64), np.asarray(kernel, np.float64)
  )
  return out if bias is None else out + np.asarray(bias, np.float64)


def moh_layer(x, k, v, w_q, w_o, b_q, gates, seen, scale):
  """`moh_heads` with the query projection in front."""
  return moh_heads(project(x, w_q, b_q), k, v, w_o, gates, seen, scale)


def moh_layer_grads(x, k, v, w_q, w_o, b_q, gates, seen, scale, dout):
  """Gradients of <moh_layer, dout>, by name. x counts as query input only."""
  q = project(x, w_q, b_q)
  dq, dk, dv, dw_o, dgates = moh_heads_grads(
    q, k, v, w_o, gates, seen, scale, dout
  )
  return {
    "x": np.einsum("btnh,dnh->btd", dq, np.asarray(w_q, np.float64)),
    "k": dk,
    "v": dv,
    "w_q": np.einsum("btd,btnh->dnh", np.asarray(x, np.float64), dq),
    "w_o": dw_o,
    "b_q": dq.sum(axis=(0, 1)),
    "gates": dgates,
  }


def directional_derivative(fn, value, direction, step=1e-5):
  """Central difference of a float64 scalar function along a direction."""
  value = np.asarray(value, np.float64)
  up, down = fn(value + step * direction), fn(value - step * direction)
  return (up - down) / (2 * step)


def jnp_layer(x, k, v, w_q, w_o, b_q, gates, seen, scale):
  """The textbook layer in JAX, every product rounded to the inputs' dtype.

  Softmax in float32, as any careful implementation has it. Differentiable.
  """
  group = w_q.shape[1] // k.shape[2]
  q = jnp.einsum("btd,dnh->btnh", x, w_q) + b_q[None, None]
  k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
  logits = jnp.einsum("btnh,bsnh->bnts", q, k).astype(jnp.float32) * scale
  weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
  weights = jnp.where(seen, weights, 0.0).astype(v.dtype)
  heads = jnp.einsum("bnts,bsnh->btnh", weights, v)
  heads = heads * gates[..., None].astype(heads.dtype)
  return jnp.einsum("btnh,nhd->btd", heads, w_o)


def assert_close(actual, expected, tolerance, what="", floor=1e-6):
  """Largest difference at most `tolerance` of the reference's magnitude.

  A magnitude below `floor` counts as `floor`: where the exact answer is 0 by
  cancellation, the terms' size is the measure and not their sum's.
  """
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
  assert np.isfinite(actual).all(), f"{what}: not finite"
  magnitude = max(np.abs(expected).max(initial=0.0), floor)
  worst = np.abs(actual - expected).max(initial=0.0)
  assert worst <= tolerance * magnitude, (
    f"{what}: off by {worst:.3g}, {worst / magnitude:.3g} of the reference's "
    f"magnitude {magnitude:.3g}; allowed {tolerance:.3g}"
  )
