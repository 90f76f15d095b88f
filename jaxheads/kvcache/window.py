"""What the last queries of a prompt tell about its tokens; all in float32."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.kvcache.policy import LayerWindow
from jaxheads.kvcache.select import middle

GroupReduce = Literal["mean", "max"]
PoolScope = Literal["middle", "all"]
Space = Literal["value", "wo"]

# Finite, so that a row without any visible key stays free of NaN.
_HIDDEN = -1e30


def prompt_tokens(window: LayerWindow) -> Bool[Array, " S"]:
  """Which of the S tokens are the prompt's."""
  return jnp.arange(window.k.shape[0]) < window.length


def softmax_over(
  seen: Bool[Array, "*#batch S"], logits: Float[Array, "*batch S"]
) -> Float[Array, "*batch S"]:
  """Softmax over what is seen, 0 elsewhere; all 0 if nothing is."""
  logits = jnp.where(seen, logits, _HIDDEN)
  peak = logits.max(axis=-1, keepdims=True)
  weights = jnp.where(seen, jnp.exp(logits - peak), 0.0)
  total = weights.sum(axis=-1, keepdims=True)
  return weights / jnp.where(total == 0, 1.0, total)


def window_attention(window: LayerWindow) -> Float[Array, "N S"]:
  """Attention that each query head pays each token, the mean of the last rows.

  softmax(q k^T / sqrt(H)), causal, averaged over the rows that are in the
  prompt: sums to 1 over its tokens, and is 0 after them.

  Source:
    Task-KV, https://arxiv.org/abs/2501.15113, Eq. 12-13.
  """
  rows, heads, size = window.q.shape
  tokens, kv_heads, _ = window.k.shape
  q = window.q.reshape(rows, kv_heads, heads // kv_heads, size)
  logits = size**-0.5 * jnp.einsum(
    "lkgh,skh->lkgs",
    q,
    window.k,
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  position = window.length - rows + jnp.arange(rows)
  seen = (jnp.arange(tokens) <= position[:, None])[:, None, None]
  weights = softmax_over(seen, logits)
  counted = jnp.clip(window.length, 1, rows).astype(jnp.float32)
  return (weights.sum(axis=0) / counted).reshape(heads, tokens)


def over_group(
  attention: Float[Array, "N S"], kv_heads: int, reduce: GroupReduce
) -> Float[Array, "K S"]:
  """One value a KV head: the mean or maximum of its query heads'."""
  grouped = attention.reshape(kv_heads, -1, attention.shape[-1])
  return grouped.mean(axis=1) if reduce == "mean" else grouped.max(axis=1)


def average_pool(x: Float[Array, "*K S"], kernel: int) -> Float[Array, "*K S"]:
  """Moving average, as long as x; zeros beyond its ends count.

  Args:
    x: What to smooth, 0 wherever nothing may enter.
    kernel: Tokens of the average, odd.
  """
  # The same additions for any S, so padding changes no bit.
  length, reach = x.shape[-1], kernel // 2
  padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(reach, reach)])
  shifted = [padded[..., i : i + length] for i in range(kernel)]
  return sum(shifted[1:], shifted[0]) / kernel


def pooled_attention(
  attention: Float[Array, "K S"],
  length: Int[Array, ""],
  parts: dict[str, Any],
  *,
  kernel: int,
  scope: PoolScope = "middle",
) -> Float[Array, "K S"]:
  """Attention smoothed over neighbours: what ranks middle tokens.

  Args:
    attention: Of each KV head; 0 from `length` on.
    length: Tokens of the prompt.
    parts: What is kept anyway, see `jaxheads.kvcache.select.keep_parts`.
    kernel: Tokens of the moving average, odd.
    scope: Smooth the "middle" alone, so that what sinks and recent tokens get
      does not leak into it, or "all" tokens.
  """
  if scope == "middle":
    between = middle(attention.shape[-1], length, parts)
    attention = jnp.where(between, attention, 0.0)
  return average_pool(attention, kernel)


def semantic_vectors(
  window: LayerWindow,
  attention: Float[Array, "N S"],
  *,
  top: int,
  space: Space = "value",
  reduce: GroupReduce = "mean",
  renorm: bool = False,
) -> Float[Array, "K size"]:
  """What each KV head says: values under the attention to its top tokens.

  With C the window attention of a KV head and I its `top` largest tokens (the
  lowest index among equals):

    "value":  sum over i in I of C[i] v[i], of size H
    "wo":     sum over the query heads n, and i in I, of C_n[i] v[i] W_O[n], of
              size D

  Rotating a head's values, and its part of W_O back, changes "value" and not
  "wo".

  Args:
    window: One layer of one prompt.
    attention: Its `window_attention`, C_n.
    top: Tokens t that enter; all, if the prompt has fewer.
    space: See above.
    reduce: How the query heads of a KV head make C.
    renorm: Divide by the sum of the weights that enter.

  Source:
    Task-KV, https://arxiv.org/abs/2501.15113, Eq. 13-15. "wo" is ours: the
    vector whose loss the paper bounds.
  """
  tokens, kv_heads, size = window.v.shape
  by_group = over_group(attention, kv_heads, reduce)
  _, at = jax.lax.top_k(by_group, min(top, tokens))
  # Zero weights would not hide NaN of tokens that are not there.
  v = jnp.where(prompt_tokens(window)[:, None, None], window.v, 0)
  v = v.swapaxes(0, 1).astype(jnp.float32)
  v = jnp.take_along_axis(v, at[..., None], axis=1)  # [K, t, H]
  weights = by_group[:, None] if space == "value" else attention
  weights = weights.reshape(kv_heads, -1, tokens)
  weights = jnp.take_along_axis(weights, at[:, None], axis=-1)
  if renorm:
    weights = weights / weights.sum(axis=-1, keepdims=True)
  said = jnp.einsum("kgt,kth->kgh", weights, v, precision="highest")
  if space == "value":
    return said[:, 0]
  w_o = window.w_o.reshape(kv_heads, -1, size, window.w_o.shape[-1])
  return jnp.einsum(
    "kgh,kghd->kd", said, w_o.astype(jnp.float32), precision="highest"
  )
