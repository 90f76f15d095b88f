"""Calls of routed attention with a pattern, and what they must equal."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platform
from pallas_kernels.head_attention import HeadContexts
from pallas_kernels.packing import gather_rows, pack, scatter_rows
from pallas_kernels.routed_attention import routed_attention
from tests import oracles, s2_cases

FORWARD, GRADIENT = 1e-5, 2e-5

# Four heads, over blocks of 4 or 8 tokens; `reach` covers every length here.
HEADS = {
  "strided": s2_cases.strided(4, block=4),
  "strided, shared by the group": s2_cases.strided(
    4, block=8, num_kv_heads=2, stride=2, local=1
  ),
  "strided and dense": s2_cases.strided(4, block=4, dense_heads=2),
  "window": s2_cases.window(4, block=4, local=3),
  "sinks": s2_cases.window(4, block=4, local=2, sinks=1),
  "strided with sinks": s2_cases.with_sinks(
    s2_cases.strided(4, block=4, stride=3, local=2), 3
  ),
  "ranged": s2_cases.ranged(
    [0, 0, 1, 1], [0, 1, 2, 3], near=3, near_stride=2, far_stride=4
  ),
  "tables": s2_cases.random_blocks(4),
  "tables, not causal": s2_cases.random_blocks(4, causal=False, density=0.2),
  "mixed": s2_cases.joined(
    s2_cases.strided(2, stride=2, local=1),
    s2_cases.window(1, local=2, sinks=1),
    s2_cases.random_blocks(1, seed=3),
  ),
}
HEADS["strided, not causal in a block"] = dataclasses.replace(
  HEADS["strided"],
  pattern=dataclasses.replace(HEADS["strided"].pattern, is_causal=False),
)


def draw(seed, *, B=2, T=37, S=50, K=2, N=4, H=8, dtype=jnp.float32):
  """Queries, keys, values and a cotangent."""
  rng = np.random.default_rng(seed)
  shapes = {
    "q": (B, T, N, H),
    "k": (B, S, K, H),
    "v": (B, S, K, H),
    "d_out": (B, T, N, H),
  }
  return {
    name: jnp.asarray(rng.normal(size=shape), dtype)
    for name, shape in shapes.items()
  }


def picks(seed, shape, density):
  """Which (token, head) pairs are active, each on its own."""
  return jnp.asarray(np.random.default_rng(seed).random(shape) < density)


def segments(seed, arrays, offset):
  """Ids of packed sequences: the queries' are those of the keys from offset."""
  (B, T), S = arrays["q"].shape[:2], arrays["k"].shape[1]
  length = max(S, offset + T)
  ids = np.random.default_rng(seed).integers(0, 3, (B, length))
  return {
    "q_segment_ids": jnp.asarray(ids[:, offset : offset + T]),
    "kv_segment_ids": jnp.asarray(ids[:, :S]),
  }


@functools.partial(
  jax.jit,
  static_argnames=(
    "pattern",
    "is_causal",
    "tiling",
    "implementation",
    "interpret",
  ),
)
def routed(
  arrays,
  active,
  options,
  *,
  pattern,
  tiling,
  implementation,
  is_causal=False,
  interpret=False,
):
  """Output [B, T, N, H] and the gradients of q, k and v."""
  packing = pack(active, num_active=active.shape[2], block_rows=tiling.block_q)

  def forward(q, k, v):
    rows = routed_attention(
      gather_rows(q, packing),
      k,
      v,
      packing,
      pattern=pattern,
      is_causal=is_causal,
      tiling=tiling,
      implementation=implementation,
      **options,
    )
    return scatter_rows(rows, packing)

  with platform.interpreting(interpret):
    out, pullback = jax.vjp(forward, arrays["q"], arrays["k"], arrays["v"])
    return out, pullback(arrays["d_out"])


def visible(arrays, blocks, pattern: HeadContexts, options):
  """What every head sees, token by token: bool [B, N, T, S]."""
  B, T, N, _ = arrays["q"].shape
  S = arrays["k"].shape[1]
  size = pattern.block_size
  offset = int(options.get("q_offset", 0))
  queries, keys = np.arange(T) + offset, np.arange(S)
  seen = blocks[:, queries // size][:, :, keys // size]
  if pattern.is_causal:
    seen = seen & (keys[None] <= queries[:, None])
  seen = np.broadcast_to(seen, (B, N, T, S)).copy()
  if "q_segment_ids" in options:
    same = np.equal(
      np.asarray(options["q_segment_ids"])[:, :, None],
      np.asarray(options["kv_segment_ids"])[:, None],
    )
    seen &= same[:, None]
  return seen


def expected(arrays, active, blocks, pattern: HeadContexts, options):
  """The same in NumPy float64: masked dense attention, then the mask."""
  B, T, N, H = arrays["q"].shape
  seen = visible(arrays, blocks, pattern, options)
  # Each head's output is its own part of the sum: an identity per head.
  w_o = np.zeros((N, H, N * H))
  for n in range(N):
    w_o[n, :, n * H : (n + 1) * H] = np.eye(H)
  gates = np.asarray(active, np.float64)
  flat = (arrays["q"], arrays["k"], arrays["v"], w_o, gates, seen, H**-0.5)
  out = oracles.moh_heads(*flat)
  dout = np.asarray(arrays["d_out"]).reshape(B, T, N * H)
  dq, dk, dv, _, _ = oracles.moh_heads_grads(*flat, dout)
  return out.reshape(B, T, N, H), (dq, dk, dv)


def check(got, wanted):
  """Outputs and gradients agree."""
  oracles.assert_close(got[0], wanted[0], FORWARD)
  for one, other in zip(got[1], wanted[1], strict=True):
    oracles.assert_close(one, other, GRADIENT)
