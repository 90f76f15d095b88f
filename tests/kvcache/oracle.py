"""Cache budgets as the papers have them, in NumPy float64.

Loops over heads and tokens, written from the specification and the papers, and
sharing nothing with the library. Arrays are of one layer of one prompt without
padding: `q` [rows, N, H], the last rows before its end; `k` and `v`
[tokens, K, H].
"""

import math
from fractions import Fraction

import numpy as np


def softmax(logits):
  weights = np.exp(logits - logits.max())
  return weights / weights.sum()


def window_attention(q, k, rows):
  """C of each query head, [N, tokens]: the mean of its last `rows` rows."""
  tokens, K, H = k.shape
  N = q.shape[1]
  rows = min(rows, tokens)
  C = np.zeros((N, tokens))
  for n in range(N):
    for i in range(rows):
      position = tokens - rows + i
      query = q[len(q) - rows + i, n]
      logits = k[: position + 1, n // (N // K)] @ query / math.sqrt(H)
      C[n, : position + 1] += softmax(logits) / rows
  return C


def by_group(C, K, reduce="mean"):
  G = len(C) // K
  combine = {"mean": np.mean, "max": np.max}[reduce]
  return np.stack([combine(C[g * G : (g + 1) * G], axis=0) for g in range(K)])


def largest(scores, count):
  """Indices of the `count` largest; the lowest index wins ties."""
  order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
  return order[:count]


def semantic_vectors(
  q, k, v, w_o, rows, top, space="value", reduce="mean", renorm=False
):
  tokens, K, _ = k.shape
  C = window_attention(q, k, rows)
  group = by_group(C, K, reduce)
  G = len(C) // K
  vectors = []
  for g in range(K):
    chosen = largest(group[g], min(top, tokens))
    if space == "value":
      weight = sum(group[g][i] for i in chosen) if renorm else 1.0
      vectors.append(sum(group[g][i] * v[i, g] for i in chosen) / weight)
      continue
    total = 0.0
    for n in range(g * G, (g + 1) * G):
      weight = sum(C[n][i] for i in chosen) if renorm else 1.0
      said = sum(C[n][i] * v[i, g] for i in chosen) / weight
      total = total + said @ w_o[n]
    vectors.append(total)
  return np.stack(vectors)


def average_pool(x, kernel):
  """Zeros beyond the ends count."""
  reach = kernel // 2
  out = np.zeros(len(x))
  for i in range(len(x)):
    for j in range(i - reach, i + reach + 1):
      if 0 <= j < len(x):
        out[i] += x[j] / kernel
  return out


def decimal(number):
  return Fraction(str(number))


def head_count(r, R, n, beta, m):
  """K_r: f(r) = n beta - r (n beta - m) / (R - 1), rounded half up."""
  f = n * decimal(beta)
  if R > 1:
    f -= r * (n * decimal(beta) - m) / (R - 1)
  return min(max(math.floor(f + Fraction(1, 2)), 0), n)


def layer_budget(N, rho, n, K_r, s1, s2, L):
  """(full heads, s1, k, s2) of a layer; full heads n if nothing is evicted."""
  B = decimal(rho) * n * N
  everything = (n, None, None, None)
  if s1 + s2 >= N or rho >= 1:
    return everything
  for K in range(K_r, -1, -1):
    if n == K:
      continue  # Nothing is left to compress: the budget is exceeded.
    C = math.floor((B - N * K) / (n - K))
    if C >= N:
      return everything
    k = C - s1 - s2
    if k >= 0:
      return K, s1, k, s2
    shorter = max(L, C - s1)
    if s1 + shorter <= C:
      return K, s1, 0, shorter
  C = max(C, 1)
  sinks = max(1, min(s1, C - L)) if s1 else 0
  return 0, sinks, 0, C - sinks


def kept(scores, s1, k, s2):
  """Sinks, the k best of the middle, recent tokens; bool [tokens]."""
  N = len(scores)
  keep = np.zeros(N, bool)
  keep[:s1] = keep[N - s2 :] = True
  for i in largest(scores[s1 : N - s2], k):
    keep[s1 + i] = True
  return keep


def middle_scores(C, s1, s2, kernel, scope="middle"):
  """Smoothed attention of one head."""
  x = C.copy()
  if scope == "middle":
    x[:s1] = x[len(x) - s2 :] = 0
  return average_pool(x, kernel)


def full_heads(order_scores, distances, K_r, center):
  """Which heads are full: the best by score and the nearest of the others."""
  nearest = K_r >= {"included": 2, "extra": 1, "off": math.inf}[center]
  full = largest(order_scores, K_r - nearest)
  if nearest:
    others = [g for g in range(len(distances)) if g not in full]
    full.append(min(others, key=lambda g: (distances[g], g)))
  return full


def task_kv(
  q, k, v, w_o, r, R, rho, *, L, s1, s2, top, beta, m, kernel,
  scope="middle", center="included", ranking="farthest", space="value",
  renorm=False, reduce="mean",
):  # fmt: skip
  """Keep sets [K, tokens] of Task-KV."""
  N, n, _ = k.shape
  K_r = head_count(r, R, n, beta, m)
  if center == "extra":
    K_r = min(K_r + 1, n)
  K_r, s1, middle, s2 = layer_budget(N, rho, n, K_r, s1, s2, L)
  if K_r == n:
    return np.ones((n, N), bool)
  vectors = semantic_vectors(q, k, v, w_o, L, top, space, reduce, renorm)
  center_of = sum(vectors) / n
  distances = [np.linalg.norm(vector - center_of) for vector in vectors]
  scores = {
    "farthest": distances,
    "nearest": [-d for d in distances],
    "vnorm": [np.linalg.norm(vector) for vector in vectors],
  }[ranking]
  full = full_heads(scores, distances, K_r, center)
  C = by_group(window_attention(q, k, L), n, reduce)
  keep = np.ones((n, N), bool)
  for g in range(n):
    if g not in full:
      pooled = middle_scores(C[g], s1, s2, kernel, scope)
      keep[g] = kept(pooled, s1, middle, s2)
  return keep


def adaptive(scores, s1, k, s2, own):
  """AdaKV: each head's `own` best of the middle, then the layer's best."""
  n, N = scores.shape
  keep = np.stack([kept(score, s1, own, s2) for score in scores])
  rest = [
    (-scores[g, i], g, i)
    for g in range(n)
    for i in range(s1, N - s2)
    if not keep[g, i]
  ]
  for _, g, i in sorted(rest)[: n * (k - own)]:
    keep[g, i] = True
  return keep


def rotation(position, H, theta):
  """The matrix that RoPE multiplies a column by at a position."""
  R = np.zeros((H, H))
  for f in range(H // 2):
    angle = position * theta ** (-2 * f / H)
    R[f, f] = R[f + H // 2, f + H // 2] = math.cos(angle)
    R[f, f + H // 2] = -math.sin(angle)
    R[f + H // 2, f] = math.sin(angle)
  return R


def expected_attention(q, k, v, rows, future, theta, s1, s2):
  """Scores [K, tokens] of the tokens in between; 0 for the others."""
  N, n, H = k.shape
  heads = q.shape[1]
  G = heads // n
  at = [p for p in range(max(0, N - rows), N) if p >= s1]
  ahead = np.mean([rotation(N + f, H, theta) for f in range(future)], axis=0)
  scores = np.zeros((n, N))
  for head in range(heads):
    straight = np.stack(
      [rotation(p, H, theta).T @ q[len(q) - N + p, head] for p in at]
    )
    mu = ahead @ straight.mean(axis=0)
    sigma = ahead @ np.cov(straight.T, bias=True) @ ahead.T
    keys = k[s1 : N - s2, head // G]
    quadratic = np.einsum("sh,hi,si->s", keys, sigma, keys)
    logits = keys @ mu / math.sqrt(H) + quadratic / (2 * H)
    size = np.linalg.norm(v[s1 : N - s2, head // G], axis=-1)
    scores[head // G, s1 : N - s2] += softmax(logits) * size / G
  return scores


def reread_scores(q, k, context):
  """The most attention from tokens after the context, [K, tokens]."""
  T, N, H = q.shape
  K = k.shape[1]
  scores = np.zeros((K, T))
  for t in range(context, T):
    for n in range(N):
      g = n // (N // K)
      weights = softmax(k[: t + 1, g] @ q[t, n] / math.sqrt(H))
      scores[g, :context] = np.maximum(scores[g, :context], weights[:context])
  return scores
