"""The engine's oracle: no pages, no rows, one mask over a dense cache.

The whole sequence runs through the model at once. Queries of the prompt see
all before them; those of the answer see of the prompt what each head keeps.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxheads.kvcache.policy import CacheShape, LayerWindow
from pallas_kernels.head_attention.reference import visible

SIZE = 64  # Of every sequence, so that little is compiled.


def answer(model, prompt, count, *, policy, budget=1.0, forced=None):
  """Greedy tokens, the logits of each, and what was kept [R, K, N].

  `forced` are tokens to answer with instead.
  """
  sizes = model.config
  tokens, logits = list(prompt), []
  kept = mask = None
  shape = CacheShape(sizes.num_layers, sizes.num_kv_heads)
  plan = policy.plan(len(prompt), budget, shape)
  for index in range(count):
    # One length for all: causality hides what is not there.
    padded = np.zeros(SIZE, np.int32)
    padded[: len(tokens)] = tokens
    if kept is None:
      kept = _keep(model, jnp.asarray(padded), len(prompt), policy, plan)
    if mask is None:
      mask = _mask(kept, plan.rings, len(prompt), count)
    out = _forward(model, jnp.asarray(padded), jnp.asarray(mask))
    logits.append(np.asarray(out[len(tokens) - 1]))
    new = int(np.argmax(logits[-1])) if forced is None else forced[index]
    tokens.append(new)
  return tokens[len(prompt) :], np.asarray(logits), kept


def logits(model, prompt, answer, *, policy, budget=1.0):
  """The logits of each token of an answer, and what was kept [R, K, N].

  By one forward pass, as the mask does not depend on the answer's tokens.
  """
  sizes = model.config
  shape = CacheShape(sizes.num_layers, sizes.num_kv_heads)
  length, count = len(prompt), len(answer)
  plan = policy.plan(length, budget, shape)
  padded = np.zeros(SIZE, np.int32)
  padded[: length + count - 1] = (*prompt, *answer[:-1])
  kept = _keep(model, jnp.asarray(padded), length, policy, plan)
  mask = _mask(kept, plan.rings, length, count)
  out = _forward(model, jnp.asarray(padded), jnp.asarray(mask))
  return np.asarray(out[length - 1 : length - 1 + count]), kept


def _mask(kept, rings, length, count):
  """[R, K, SIZE, SIZE]."""
  layers, heads, _ = kept.shape
  mask = np.tril(np.ones((SIZE, SIZE), bool))
  mask = np.broadcast_to(mask, (layers, heads, SIZE, SIZE)).copy()
  for layer in range(layers):
    sizes = kept[layer, :, :length].sum(-1)
    slots = np.argsort(-sizes, kind="stable")
    for slot, head in enumerate(slots):
      held = list(np.flatnonzero(kept[layer, head, :length]))
      ring = int(rings[layer, slot])
      for at in range(length, length + count):
        if ring:
          held.pop(len(held) - ring)  # The oldest of the last `ring`.
        held.append(at)
        mask[layer, head, at] = False
        mask[layer, head, at, held] = True
  return mask


def _layers(model):
  for stack, run in zip(model.stacks, model.config.runs, strict=True):
    for index in range(run.num_layers):
      graphdef, state = nnx.split(stack)
      yield nnx.merge(graphdef, jax.tree.map(lambda x, i=index: x[i], state))


@nnx.jit
def _project(model, tokens, mask):
  """Inputs of each layer's attention, and its q, k and v."""
  sizes = model.config
  positions = jnp.arange(tokens.shape[0])[None]
  x = model.embedding(tokens[None])
  found = []
  for layer, block in enumerate(_layers(model)):
    attention = block.attention
    h = block.attention_norm(x)
    k, v = attention.project_kv(h, positions)
    found.append((attention.project_q(h, positions)[0], k[0], v[0]))
    seen = jnp.repeat(mask[layer], sizes.num_heads // sizes.num_kv_heads, 0)
    if attention.pattern is not None:
      seen &= visible(attention.pattern, positions[0], tokens.shape[0])

    def read(q, chosen, k=k, v=v, seen=seen):
      groups = q.shape[2] // k.shape[2]
      k, v = (jnp.repeat(y, groups, axis=2) for y in (k, v))
      logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
      weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
      return jnp.einsum("bnts,bsnh->btnh", weights, v)

    x += attention.attend_with(h, positions, read)
    x += block.mlp(block.mlp_norm(x))
  return model.logits(x)[0], found


def _forward(model, tokens, mask):
  return _project(model, tokens, mask)[0]


def _keep(model, tokens, length, policy, plan):
  sizes = model.config
  causal = jnp.tril(jnp.ones((tokens.shape[0],) * 2, bool))
  mask = jnp.broadcast_to(
    causal, (sizes.num_layers, sizes.num_kv_heads, *causal.shape)
  )
  _, found = _project(model, tokens, mask)
  kept = []
  for layer, ((q, k, v), block) in enumerate(
    zip(found, _layers(model), strict=True)
  ):
    at = np.arange(length - policy.window, length)
    window = LayerWindow(
      q=q[jnp.asarray(np.maximum(at, 0))],
      k=k,
      v=v,
      length=jnp.int32(length),
      w_o=block.attention.out.kernel[...],
      layer=jnp.int32(layer),
    )
    mine = {name: jnp.asarray(x[layer]) for name, x in plan.layers.items()}
    kept.append(np.asarray(policy.keep(window, mine)))
  return np.asarray(kept)
