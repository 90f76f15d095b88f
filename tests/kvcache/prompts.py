"""Prompts that tests make up, and what the library is asked about them."""

import functools

import jax
import numpy as np

from jaxheads.kvcache import LayerWindow

H, D = 8, 12


def draw(seed, tokens, *, rows=4, N=8, K=4, H=H):
  """float32 arrays of one layer: q, k, v, w_o as the oracle takes them."""
  rng = np.random.default_rng(seed)
  return (
    2 * rng.normal(size=(rows, N, H)).astype(np.float32),
    rng.normal(size=(tokens, K, H)).astype(np.float32),
    rng.normal(size=(tokens, K, H)).astype(np.float32),
    rng.normal(size=(N, H, D)).astype(np.float32),
  )


def window(q, k, v, w_o, *, size=None, layer=0, dtype=np.float32):
  """The same for the library: padded to `size`, with NaN where nothing is."""
  tokens, rows = len(k), len(q)
  size = tokens if size is None else size
  pad = ((0, size - tokens), (0, 0), (0, 0))
  k, v = (np.pad(x, pad, constant_values=np.nan) for x in (k, v))
  q = q.copy()
  q[: max(0, rows - tokens)] = np.nan  # From before the prompt's start.
  # NumPy's, so that nothing is compiled for it.
  q, k, v, w_o = (x.astype(dtype) for x in (q, k, v, w_o))
  return LayerWindow(q, k, v, np.int32(tokens), w_o, np.int32(layer))


@functools.partial(jax.jit, static_argnums=0)
def run(policy, window, layer):
  return policy.keep(window, layer)


def keep(policy, plan, window, r=0):
  """Keep sets [K, S] of layer r, as NumPy."""
  return np.asarray(run(policy, window, layer_of(plan, r)))


def layer_of(plan, r):
  """What a policy is told of layer r."""
  return {name: x[r] for name, x in plan.layers.items()}
