"""What reading the context once more looks at: a reference, not a policy.

It takes twice the prefill, and ranks tokens over all layers and heads
together, so lengths are known to nobody beforehand. Evaluations compare with it
what can be served.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.kvcache.select import largest
from jaxheads.kvcache.window import softmax_over


def reread_scores(
  q: Float[Array, "T N H"],
  k: Float[Array, "T K H"],
  *,
  context: Int[Array, ""],
  length: Int[Array, ""],
  block: int = 64,
) -> Float[Array, "K T"]:
  """The most attention that re-reading a context pays each of its tokens.

  The tokens are the context and, after it, the context again, with whatever
  asks for that in between. The score of a context token is the maximum over
  later queries and the query heads of its KV head; 0 for other tokens.

  Args:
    q, k: Queries and keys of one layer, after RoPE.
    context: Tokens of the context.
    length: Tokens in all; those from there on may hold anything.
    block: Queries that are looked at together.

  Source:
    KVzip, https://arxiv.org/abs/2505.23416. Differs: the whole context is
    re-read at once, and queries see all of it.
  """
  tokens, heads, size = q.shape
  kv_heads = k.shape[1]
  blocks = -(-tokens // block)
  q = jnp.pad(q, ((0, blocks * block - tokens), (0, 0), (0, 0)))
  q = q.reshape(blocks, block, kv_heads, heads // kv_heads, size)
  at = jnp.arange(tokens)

  def most(
    so_far: Float[Array, "K T"], block_q: tuple[Array, Array]
  ) -> tuple[Float[Array, "K T"], None]:
    position, q = block_q
    again = (position >= context) & (position < length)
    seen = (at <= position[:, None]) & again[:, None]
    logits = size**-0.5 * jnp.einsum(
      "qkgh,skh->qkgs",
      q,
      k,
      precision="highest",
      preferred_element_type=jnp.float32,
    )
    weights = softmax_over(seen[:, None, None], logits)
    return jnp.maximum(so_far, weights.max(axis=(0, 2))), None

  positions = jnp.arange(blocks * block).reshape(blocks, block)
  scores, _ = jax.lax.scan(most, jnp.zeros((kv_heads, tokens)), (positions, q))
  return jnp.where(at < context, scores, 0.0)


def keep_best(
  scores: Float[Array, "R K S"],
  *,
  length: Int[Array, ""],
  tokens: Int[Array, ""],
  sinks: int = 4,
) -> Bool[Array, "R K S"]:
  """The best tokens of all layers and heads, after the sinks.

  Args:
    scores: Of each token, finite.
    length: Tokens of the context.
    tokens: How many to keep in all, at most R K `length`; see
      `jaxheads.kvcache.budgets.share`.
    sinks: First tokens that all heads keep, as far as `tokens` goes.
  """
  at = jnp.arange(scores.shape[-1])
  scores = jnp.where(at < sinks, jnp.inf, scores)
  scores = jnp.where(at < length, scores, -jnp.inf)
  best = largest(scores.reshape(-1), tokens[None])
  return best.reshape(scores.shape) & (at < length)
