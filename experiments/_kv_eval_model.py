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

from jaxheads.kvcache import CacheShape, LayerWindow, Policy, reread_scores
from jaxheads.kvcache.window import over_group, window_attention
from jaxheads.models import DecoderBlock, DecoderLM

# Finite; every token sees at least itself.
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
    self, tokens: Int[np.ndarray, "B S"], context: int
  ) -> Float[Array, "R B K S"]:
    """What tokens from `context` on look at, see `kvcache.reread_scores`."""
    cached, _ = self.read(tokens)
    return _reread(cached, jnp.int32(context))

  def window_attention(
    self, cached: Cached, window: int
  ) -> Float[Array, "R B K S"]:
    """Attention that the last queries pay each token, the mean of a group."""
    return _window_attention(cached, window)

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
    return _attention(q, [(k, v, causal[None, None])]), Cached(q, k, v)

  x, cached = _layers(model, tokens, jnp.int32(0), attend, None)
  return cached, model.logits(x[:, -1:])[:, 0]


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
    return _attention(q, parts), None

  x, _ = _layers(model, tokens, start, attend, (cached, keep))
  return model.logits(x)


@jax.jit
def _reread(cached: Cached, context: Array) -> Float[Array, "R B K S"]:
  length = jnp.int32(cached.q.shape[2])
  scores = functools.partial(reread_scores, context=context, length=length)
  return jax.vmap(jax.vmap(scores))(cached.q, cached.k)


@functools.partial(jax.jit, static_argnums=1)
def _window_attention(cached: Cached, rows: int) -> Float[Array, "R B K S"]:
  kv_heads = cached.k.shape[3]
  length = jnp.int32(cached.k.shape[2])
  nothing = jnp.zeros((0, 0, 0))

  def one(cache: Cached) -> Array:
    q = cache.q[-rows:]
    window = LayerWindow(q, cache.k, cache.v, length, nothing, jnp.int32(0))
    return over_group(window_attention(window), kv_heads, "mean")

  return jax.vmap(jax.vmap(one))(cached)


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
  positions = jnp.broadcast_to(
    start + jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape
  )

  def layer(block: DecoderBlock, x: Array, inputs: Any) -> tuple[Array, Any]:
    normed = block.attention_norm(x)
    k, v = block.attention.project_kv(normed, positions)
    found = []

    def read(q: Array, chosen: Array | None) -> Array:
      assert chosen is None  # The models here route no heads.
      heads, kept = attend(q, k, v, inputs)
      found.append(kept)
      return heads

    x = x + block.attention.attend_with(normed, positions, read)
    return x + block.mlp(block.mlp_norm(x)), found[0]

  return model.scan_layers(layer, model.embedding(tokens), per_layer)


def _attention(
  q: Float[Array, "B T N H"], parts: list[tuple[Array, Array, Array]]
) -> Float[Array, "B T N H"]:
  """Attention over several (k, v, mask [B or 1, K or 1, T or 1, S])."""
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
  return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)
