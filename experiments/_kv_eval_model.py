"""A decoder whose cache is kept in part: the dense cache, under a mask.

What a paged cache with the same keep set answers, is answered here without
one: a prompt is read once, and any number of keep sets are tried on it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxheads.kvcache import CacheShape, LayerWindow, Policy
from jaxheads.models import DecoderLM
from jaxheads.rope import apply_rope

# Finite, so that a head that sees nothing gives zeros and not NaN.
_HIDDEN = -1e30


class Cached(NamedTuple):
  """What R layers hold of tokens; queries and keys after RoPE."""

  q: Float[Array, "R B S N H"]
  k: Float[Array, "R B S K H"]
  v: Float[Array, "R B S K H"]


class Reader:
  """Compiled functions of a model; each once per shape.

  Args:
    model: Every head on and seeing all earlier tokens.
  """

  def __init__(self, model: DecoderLM) -> None:
    config = model.config
    if any(config.head_plans) or any(config.contexts):
      raise ValueError("`model` must be dense: no routed or sharded heads.")
    self.shape = CacheShape(config.num_layers, config.num_kv_heads)
    self._graphdef, self._state = nnx.split(model)

  def read(
    self, tokens: Int[np.ndarray, "B S"]
  ) -> tuple[Cached, Float[Array, "B V"]]:
    """Everything cached of prompts, and the logits of what follows them."""
    cached, logits = _read(self._graphdef, self._state, jnp.asarray(tokens))
    return cached, logits

  def answer(
    self,
    cached: Cached,
    keep: Bool[Array, "R B K S"],
    tokens: Int[np.ndarray, "B T"],
    start: int,
  ) -> Float[Array, "B T V"]:
    """Logits of what follows each token.

    Args:
      cached: From `read`.
      keep: What each head still has of it.
      tokens: The next ones, which see each other and are all kept.
      start: Position of the first of them.
    """
    return _answer(
      self._graphdef,
      self._state,
      cached,
      keep,
      jnp.asarray(tokens),
      jnp.int32(start),
    )

  def rereading(
    self, cached: Cached, length: int, tokens: Int[np.ndarray, "B T"]
  ) -> Float[Array, "R B K S"]:
    """Most attention that each token gets while `tokens` follow the prompt.

    Source:
      KVzip, https://arxiv.org/abs/2505.23416.
    """
    return _reread(
      self._graphdef,
      self._state,
      cached,
      jnp.asarray(tokens),
      jnp.int32(length),
    )

  def keep(
    self, policy: Policy, cached: Cached, *, length: int, budget: float
  ) -> Bool[Array, "R B K S"]:
    """What the policy keeps of the first `length` tokens of each prompt."""
    plan = policy.plan(length, budget, self.shape)
    w_o = _only_stack(nnx.merge(self._graphdef, self._state)).attention.out
    return _keep(
      policy, cached, w_o.kernel[...], plan.layers, jnp.int32(length)
    )


def _only_stack(model: DecoderLM) -> Any:
  (stack,) = model.stacks
  return stack


@functools.partial(jax.jit, static_argnums=0)
def _read(
  graphdef: Any, state: Any, tokens: Array
) -> tuple[Cached, Float[Array, "B V"]]:
  model = nnx.merge(graphdef, state)
  causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))

  def attend(q: Array, k: Array, v: Array, layer: None) -> tuple[Array, Cached]:
    del layer
    return _attention(q, [(k, v, causal[None, None])])[0], Cached(q, k, v)

  x, cached = _layers(model, tokens, jnp.int32(0), attend, None)
  return cached, model._logits(model.norm(x[:, -1:]))[:, 0]


@functools.partial(jax.jit, static_argnums=0)
def _answer(
  graphdef: Any,
  state: Any,
  cached: Cached,
  keep: Array,
  tokens: Array,
  start: Array,
) -> Float[Array, "B T V"]:
  model = nnx.merge(graphdef, state)
  causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))

  def attend(q: Array, k: Array, v: Array, layer: Any) -> tuple[Array, None]:
    old, kept = layer
    parts = [(old.k, old.v, kept[:, :, None]), (k, v, causal[None, None])]
    return _attention(q, parts)[0], None

  x, _ = _layers(model, tokens, start, attend, (cached, keep))
  return model._logits(model.norm(x))


@functools.partial(jax.jit, static_argnums=0)
def _reread(
  graphdef: Any, state: Any, cached: Cached, tokens: Array, length: Array
) -> Float[Array, "R B K S"]:
  model = nnx.merge(graphdef, state)
  causal = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))
  size = cached.k.shape[2]
  prompt = (jnp.arange(size) < length)[None, None, None]

  def attend(q: Array, k: Array, v: Array, old: Cached) -> tuple[Array, Array]:
    parts = [(old.k, old.v, prompt), (k, v, causal[None, None])]
    out, weights = _attention(q, parts)
    # [B, K, G, T, S] over the heads of a group and the tokens read again.
    return out, weights[..., :size].max(axis=(2, 3))

  return _layers(model, tokens, length, attend, cached)[1]


@functools.partial(jax.jit, static_argnums=0)
def _keep(
  policy: Policy,
  cached: Cached,
  w_o: Float[Array, "R N H D"],
  layers: dict[str, Array],
  length: Array,
) -> Bool[Array, "R B K S"]:
  rows = min(policy.window, cached.q.shape[2])

  def one(cache: Cached, w_o: Array, index: Array, layer: Any) -> Array:
    q = jax.lax.dynamic_slice_in_dim(cache.q, length - rows, rows)
    window = LayerWindow(q, cache.k, cache.v, length, w_o, index)
    return policy.keep(window, layer)

  over_prompts = jax.vmap(one, in_axes=(0, None, None, None))
  indices = jnp.arange(w_o.shape[0], dtype=jnp.int32)
  return jax.vmap(over_prompts)(cached, w_o, indices, layers)


def _layers(
  model: DecoderLM, tokens: Array, start: Array, attend: Any, per_layer: Any
) -> tuple[Float[Array, "B T D"], Any]:
  """Runs all layers; `attend` gives a layer's heads, and something to keep."""
  config = model.config
  stack = _only_stack(model)
  graphdef, state = nnx.split(stack)
  positions = jnp.broadcast_to(
    start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
  )

  def layer(x: Array, inputs: Any) -> tuple[Array, Any]:
    block = nnx.merge(graphdef, inputs[0])
    normed = block.attention_norm(x)
    q, k = (
      apply_rope(project(normed), positions, theta=config.rope_theta)
      for project in (block.attention.query, block.attention.key)
    )
    heads, found = attend(q, k, block.attention.value(normed), inputs[1])
    x = x + block.attention.out(heads)
    return x + block.mlp(block.mlp_norm(x)), found

  return jax.lax.scan(layer, model.embedding(tokens), (state, per_layer))


def _attention(
  q: Float[Array, "B T N H"], parts: list[tuple[Array, Array, Array]]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K G T keys"]]:
  """Attention over several (k, v, mask), and its weights.

  A mask is [B or 1, K or 1, T or 1, S].
  """
  batch, rows, heads, size = q.shape
  kv_heads = parts[0][0].shape[2]
  grouped = q.reshape(batch, rows, kv_heads, heads // kv_heads, size)
  logits = jnp.concatenate(
    [
      jnp.where(
        mask[:, :, None],
        size**-0.5 * jnp.einsum("btkgh,bskh->bkgts", grouped, k),
        _HIDDEN,
      )
      for k, _, mask in parts
    ],
    axis=-1,
  )
  weights = jax.nn.softmax(logits, axis=-1)
  v = jnp.concatenate([v for _, v, _ in parts], axis=1)
  out = jnp.einsum("bkgts,bskh->btkgh", weights, v)
  return out.reshape(q.shape), weights
