"""What `bench_moh.py` times: the operator, the layer, a step of decoding."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments import _attention_cases as attention_cases
from experiments._timing import Call, Calls
from jaxheads import s2
from jaxheads.attention import attention
from jaxheads.decoding import kv_read_fraction
from jaxheads.errors import UserError
from jaxheads.moh import MoHConfig, RouterParams, route
from jaxheads.nn import MoHAttention, auxiliary_loss
from pallas_kernels.packing import gather_rows, pack, scatter_rows
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import default_tiling

LOCAL_BLOCKS, BLOCK_SIZE = 8, 64


@dataclasses.dataclass(frozen=True)
class Sizes:
  """One problem.

  Attributes:
    batch, length: Sequences, and tokens of each; of decoding, tokens so far.
    heads, kv_heads, head_dim: Of the layer, whose width is heads x head_dim.
    stride: Vertical stride of sharded contexts; 0 is none.
    dtype: Of the computation.
  """

  batch: int
  length: int
  heads: int
  kv_heads: int
  head_dim: int
  stride: int
  dtype: str

  @property
  def width(self) -> int:
    """Features of the layer's inputs."""
    return self.heads * self.head_dim

  def pattern(self) -> s2.Pattern | None:
    """What each head sees; None is everything."""
    if not self.stride:
      return None
    return s2.strided(
      self.heads,
      num_kv_heads=self.kv_heads,
      block_size=BLOCK_SIZE,
      local_blocks=LOCAL_BLOCKS,
      vertical_stride=self.stride,
    )

  def visible_keys(self) -> float:
    """Keys that a token sees, averaged over a causal sequence and the heads."""
    pattern = self.pattern()
    density = pattern.density(self.length) if pattern else 1.0
    return density * (self.length + 1) / 2

  def problem(self) -> attention_cases.Problem:
    """Queries, keys and values of attention alone."""
    return attention_cases.Problem.make(
      batch=self.batch,
      length=self.length,
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      dtype=self.dtype,
      block_size=BLOCK_SIZE,
      local_blocks=LOCAL_BLOCKS,
    )


def picked_heads(moh: MoHConfig, batch: int, length: int) -> jax.Array:
  """Heads of tokens that pick at random, bool [B, T, N]."""
  width = max(moh.num_routed, 1)  # A score of its own for every routed head.
  x = jax.random.normal(jax.random.key(2), (batch, length, width))
  params = RouterParams(
    jnp.eye(width) if moh.routes else None,
    jnp.zeros((width, 2)) if moh.routes and moh.num_shared else None,
    jnp.zeros((width, moh.num_shared)) if moh.num_shared > 1 else None,
  )
  return route(x, params, moh).mask


def packed_operator(sizes: Sizes, moh: MoHConfig) -> Calls:
  """Attention of the active pairs: packing, kernel, unpacking."""
  problem = sizes.problem()
  active = picked_heads(moh, sizes.batch, sizes.length)
  tiling = default_tiling(sizes.length, sizes.length, moh.active_fraction)

  def attend(q: Any, k: Any, v: Any, active: Any) -> jax.Array:
    packing = pack(active, num_active=moh.num_active, block_rows=tiling.block_q)
    rows = routed_attention(
      gather_rows(q, packing),
      k,
      v,
      packing,
      pattern=sizes.pattern(),
      is_causal=True,
      tiling=tiling,
    )
    return scatter_rows(rows, packing)

  return attention_cases.both(problem, attend, active)


def whole_operator(sizes: Sizes) -> Calls:
  """Our attention of all heads, without packing."""
  problem = sizes.problem()
  pattern = sizes.pattern() or problem.pattern(1)
  return attention_cases.both(
    problem, functools.partial(attention, pattern=pattern)
  )


def layer(sizes: Sizes, moh: MoHConfig, execution: str | None) -> MoHAttention:
  """The layer that is timed: causal, with RoPE."""
  try:
    return MoHAttention(
      sizes.heads,
      sizes.width,
      num_kv_heads=sizes.kv_heads,
      moh=moh,
      pattern=sizes.pattern(),
      rope_theta=10_000.0,
      use_bias=False,
      dtype=jnp.dtype(sizes.dtype),
      execution=execution,
      rngs=nnx.Rngs(0),
    )
  except ValueError as error:
    raise UserError(str(error)) from None


def inputs(sizes: Sizes, length: int) -> jax.Array:
  """Of the layer, normally distributed."""
  shape = (sizes.batch, length, sizes.width)
  return jax.random.normal(jax.random.key(1), shape, sizes.dtype)


def whole_layer(sizes: Sizes, moh: MoHConfig, execution: str) -> Calls:
  """The layer forward, and forward plus backward."""
  parts: Any = nnx.split(layer(sizes, moh, execution), nnx.Param, ...)
  graph, params, rest = parts
  x = inputs(sizes, sizes.length)

  def forward(params: Any, x: jax.Array, rest: Any) -> jax.Array:
    return nnx.merge(graph, params, rest, copy=True)(x, is_causal=True)

  def loss(params: Any, x: jax.Array, rest: Any) -> jax.Array:
    merged = nnx.merge(graph, params, rest, copy=True)
    out = merged(x, is_causal=True).astype(jnp.float32)
    return jnp.mean(out * out) + 0.01 * auxiliary_loss(merged)

  jit_forward = jax.jit(forward)
  jit_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))

  def run(function: Callable[..., Any]) -> Call:
    return lambda: jax.block_until_ready(function(params, x, rest))

  return {
    "forward": run(jit_forward),
    "forward+backward": run(jit_gradient),
  }


def decode_step(sizes: Sizes, moh: MoHConfig) -> Calls:
  """One token a sequence, the last of `length`; the cache is written into."""
  module = layer(sizes, moh, None)
  dtype = jnp.dtype(sizes.dtype)
  module.init_cache((sizes.batch, sizes.length, sizes.width), dtype)
  for key, cached in enumerate((module.cached_key, module.cached_value)):
    assert cached is not None
    noise = jax.random.normal(jax.random.key(key), cached.shape, dtype)
    cached[...] = noise
  parts: Any = nnx.split(module, nnx.Cache, ...)
  graph, cache, rest = parts
  x = inputs(sizes, 1)
  index = jnp.int32(sizes.length - 1)
  held = {"cache": cache}

  @functools.partial(jax.jit, donate_argnums=0)
  def step(cache: Any, rest: Any, x: jax.Array, index: jax.Array) -> Any:
    merged = nnx.merge(graph, cache, rest, copy=True)
    merged.cache_index[...] = index
    out = merged(x, decode=True)
    return out, nnx.state(merged, nnx.Cache)

  def run() -> None:
    out, held["cache"] = step(held["cache"], rest, x, index)
    jax.block_until_ready(out)

  return {"decode": run}


def read_fraction(sizes: Sizes, moh: MoHConfig) -> float:
  """KV heads that a decoding step reads, of all; many steps' average."""
  active = picked_heads(moh, 4096, 1)
  return float(kv_read_fraction(active, sizes.kv_heads))


def layer_flops(sizes: Sizes, heads: int) -> float:
  """Of one token with so many active heads, per head size; 2 a MAC."""
  per_head = 4 * sizes.width + 4 * sizes.visible_keys()  # Q, O; logits, values.
  return heads * per_head + sizes.kv_heads * 4 * sizes.width


def decode_bytes(sizes: Sizes, read: float) -> float:
  """Of one step: all weights, and so much of the cache."""
  pattern = sizes.pattern()
  keys = float(sizes.length)
  if pattern is not None:
    before = pattern.visible_pairs(sizes.length - 1)
    keys = (pattern.visible_pairs(sizes.length) - before) / sizes.heads
  cache = 2 * sizes.batch * sizes.kv_heads * sizes.head_dim * keys
  weights = 2 * sizes.width * (sizes.heads + sizes.kv_heads) * sizes.head_dim
  return (weights + cache * read) * jnp.dtype(sizes.dtype).itemsize
