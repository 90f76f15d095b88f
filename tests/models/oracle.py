"""The decoder once more: NumPy, float64, loops, from the papers' formulas.

Shares no code with the library. Covers `plan=None` and the two-stage router
in the scaled form.
"""

import numpy as np


def decoder_logits(weights, tokens, *, plans, num_kv_heads, eps, theta):
  """Logits [T, V] of one sequence.

  `weights` has "embedding", "norm", "unembedding" and "layers": one dict for
  each layer.
  """
  x = weights["embedding"][tokens]
  for layer, plan in zip(weights["layers"], plans, strict=True):
    h = _rms_norm(x, layer["attention_norm"], eps)
    x = x + _attention(h, layer, plan, num_kv_heads, theta)
    h = _rms_norm(x, layer["mlp_norm"], eps)
    gate = h @ layer["gate"]
    x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
  return _rms_norm(x, weights["norm"], eps) @ weights["unembedding"]


def _rms_norm(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def _rotate(x, theta):
  """RoPE over [T, H]: feature i turns with feature i + H / 2."""
  length, size = x.shape
  out = np.empty_like(x)
  for t in range(length):
    for i in range(size // 2):
      angle = t * theta ** (-2 * i / size)
      a, b = x[t, i], x[t, i + size // 2]
      out[t, i] = a * np.cos(angle) - b * np.sin(angle)
      out[t, i + size // 2] = b * np.cos(angle) + a * np.sin(angle)
  return out


def _attention(x, layer, plan, num_kv_heads, theta):
  length = len(x)
  num_heads = layer["query"].shape[1]
  out = np.zeros_like(x)
  gates = _gates(x, layer, plan, num_heads)
  for head in range(num_heads):
    kv_head = head // (num_heads // num_kv_heads)
    q = _rotate(x @ layer["query"][:, head], theta)
    k = _rotate(x @ layer["key"][:, kv_head], theta)
    v = x @ layer["value"][:, kv_head]
    for t in range(length):
      weights = _softmax(k[: t + 1] @ q[t] / np.sqrt(len(q[t])))
      out[t] += gates[t, head] * (weights @ v[: t + 1]) @ layer["out"][head]
  return out


def _gates(x, layer, plan, num_heads):
  gates = np.ones((len(x), num_heads))
  if plan is None:
    return gates
  shared, routed = plan.num_shared, num_heads - plan.num_shared
  for t, token in enumerate(x):
    kind = np.ones(2)
    if shared and plan.top_k:
      kind = 2 * _softmax(token @ layer["router_kind"])
    if shared > 1:
      weights = shared * _softmax(token @ layer["router_shared"])
      gates[t, :shared] = weights
    gates[t, :shared] *= kind[0]
    if plan.top_k:
      p = _softmax(token @ layer["router_routed"])
      chosen = np.argsort(-p, kind="stable")[: plan.top_k]
      gates[t, shared:] = 0
      gates[t, shared + chosen] = plan.top_k * p[chosen] / p[chosen].sum()
      gates[t, shared:] *= kind[1]
    else:
      assert routed == 0
  return gates


def _softmax(x):
  x = np.exp(x - x.max())
  return x / x.sum()
