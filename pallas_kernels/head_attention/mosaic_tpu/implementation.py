"""Head attention on TPUs, by Pallas Mosaic kernels.

Each query tile visits the key tiles that its head sees, and no others. Full
tiles have no mask arithmetic; products take the inputs' dtype (float32: all
passes of the matrix unit), everything else is float32.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.head_attention.contexts import HeadContexts
from pallas_kernels.head_attention.mosaic_tpu import specs
from pallas_kernels.head_attention.mosaic_tpu.backward_kernel import (
  Gradients,
  add_gradients,
)
from pallas_kernels.head_attention.mosaic_tpu.forward_kernel import attend
from pallas_kernels.head_attention.mosaic_tpu.plan import (
  Layout,
  forward_plan,
  key_plan,
)
from pallas_kernels.head_attention.mosaic_tpu.settings import (
  make_layouts,
  overlap,
  vmem_limit,
)
from pallas_kernels.head_attention.mosaic_tpu.tile import LOG2_E, NOTHING_SEEN
from pallas_kernels.head_attention.operands import Operands, Settings

# Float32 sums of dq take twice the memory of q. Where they would take more than
# this, some KV heads go after the others.
_MOST_SUMS_BYTES = 2 << 30


def _options(
  settings: Settings, operands: Operands, layout: Layout, *, backward: bool
) -> dict[str, Any]:
  return dict(
    scale=settings.scale,
    soft_cap=settings.logits_soft_cap,
    overlap=overlap(layout, backward=backward),
    vmem_bytes=vmem_limit(layout, operands),
    interpret=settings.interpret,
  )


def _q_padded(layouts: list[Layout]) -> int:
  block_q = max(layout.tiling.block_q for layout in layouts)
  return -(-layouts[0].q_length // block_q) * block_q


def _keys(layout: Layout, operands: Operands) -> specs.Keys:
  return specs.near_keys(
    layout, operands.k, operands.v, operands.kv_segment_ids
  )


def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Output, and log-sum-exp of the logits; see `operands.Implementation`."""
  layouts = make_layouts(settings, operands)
  B, T, N, _ = operands.q.shape
  padded = _q_padded(layouts)
  queries = specs.make_queries(operands.q, operands.q_segment_ids, padded)
  plans = [forward_plan(layout) for layout in layouts]
  results: tuple[Array | None, Array | None] = (None, None)
  if not all(plan.covers_all for plan in plans):
    shape = (B, N, padded, operands.v.shape[-1])
    results = (
      jnp.zeros(shape, operands.q.dtype),
      jnp.full((B, N, 1, padded), -jnp.inf, jnp.float32),
    )
  for layout, plan in zip(layouts, plans, strict=True):
    keys = _keys(layout, operands)
    options = _options(settings, operands, layout, backward=False)
    for call in plan.calls:
      results = attend(
        layout,
        call,
        queries,
        keys,
        previous=results,
        **options,
      )
  out, lse = results
  assert out is not None and lse is not None
  return out[:, :, :T].swapaxes(1, 2), lse[:, :, 0, :T]


def backward(
  settings: Settings,
  operands: Operands,
  out: Float[Array, "B T N Hv"],
  lse: Float[Array, "B N T"],
  d_out: Float[Array, "B T N Hv"],
  d_lse: Float[Array, "B N T"],
) -> tuple[
  Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]
]:
  """Gradients of q, k and v; see `operands.Implementation`."""
  N, K = operands.q.shape[2], operands.k.shape[2]
  sums_bytes = 4 * operands.q.size
  step = max(1, K * _MOST_SUMS_BYTES // max(sums_bytes, 1))
  parts = []
  for start in range(0, K, step):
    kv_heads = slice(start, min(start + step, K))
    heads = slice(kv_heads.start * N // K, kv_heads.stop * N // K)
    parts.append(
      _backward(
        _settings_of(settings, heads),
        operands._replace(
          q=operands.q[:, :, heads],
          k=operands.k[:, :, kv_heads],
          v=operands.v[:, :, kv_heads],
        ),
        out[:, :, heads],
        lse[:, heads],
        d_out[:, :, heads],
        d_lse[:, heads],
      )
    )
  dq, dk, dv = (
    each[0] if len(each) == 1 else jnp.concatenate(each, axis=2)
    for each in zip(*parts, strict=True)
  )
  return dq, dk, dv


def _settings_of(settings: Settings, heads: slice) -> Settings:
  """The settings of some heads."""
  pattern = settings.pattern
  if len(pattern.rules) == heads.stop - heads.start:
    return settings
  return dataclasses.replace(
    settings,
    pattern=HeadContexts(
      pattern.block_size, pattern.rules[heads], pattern.is_causal
    ),
  )


def _backward(
  settings: Settings,
  operands: Operands,
  out: Array,
  lse: Array,
  d_out: Array,
  d_lse: Array,
) -> tuple[Array, Array, Array]:
  """Of all heads at once."""
  layouts = make_layouts(settings, operands)
  queries = _cotangents(layouts, operands, out, lse, d_out, d_lse)
  B, N, padded, H = queries.q.shape
  # Accumulated in HBM; key tiles come one after the other.
  dq = jnp.zeros((B, N, H, padded), jnp.float32)
  parts = []
  for layout in layouts:
    dk, dv, dq = _run_gradients(
      layout,
      queries,
      _keys(layout, operands),
      dq,
      len(layouts) == 1,
      _options(settings, operands, layout, backward=True),
    )
    parts.append((dk, dv))
  dk, dv = (
    _sum_of_runs(layouts, list(each), like)
    for each, like in zip(
      zip(*parts, strict=True), (operands.k, operands.v), strict=True
    )
  )
  # Rounded first: a transposed copy of the sums takes twice the memory.
  dq = (dq * settings.scale).astype(operands.q.dtype)
  return dq[..., : operands.q.shape[1]].transpose(0, 3, 1, 2), dk, dv


def _cotangents(
  layouts: list[Layout],
  operands: Operands,
  out: Array,
  lse: Array,
  d_out: Array,
  d_lse: Array,
) -> specs.Queries:
  padded = _q_padded(layouts)
  seen = jnp.isfinite(lse)
  product = out.astype(jnp.float32) * d_out.astype(jnp.float32)
  delta = product.sum(-1).swapaxes(1, 2) - d_lse
  statistics = (
    jnp.where(seen, lse * LOG2_E, NOTHING_SEEN),
    jnp.where(seen, delta, 0.0),
  )
  missing = padded - lse.shape[2]
  lse, delta = (
    jnp.pad(x, ((0, 0), (0, 0), (0, missing)), constant_values=fill)[:, :, None]
    for x, fill in zip(statistics, (NOTHING_SEEN, 0.0), strict=True)
  )
  return specs.make_queries(
    operands.q, operands.q_segment_ids, padded
  )._replace(
    d_out=specs.pad_tokens(d_out.swapaxes(1, 2), 2, padded),
    lse=lse,
    delta=delta,
  )


def _run_gradients(
  layout: Layout,
  queries: specs.Queries,
  keys: specs.Keys,
  dq: Array,
  is_only_run: bool,
  options: dict[str, Any],
) -> Gradients:
  """Of the KV heads that the run reads, padded; and `dq` with its heads."""
  plan = key_plan(layout)
  # Several parts are added in float32.
  whole = is_only_run and not plan.far.calls
  dtype = keys.k.dtype if whole else jnp.float32
  results = Gradients(None, None, dq)
  if not plan.near.covers_all:
    heads = slice(layout.kv_start, layout.kv_stop)
    dk, dv = (jnp.zeros_like(x[:, heads], dtype) for x in (keys.k, keys.v))
    results = Gradients(dk, dv, dq)
  for calls, adds in ((plan.near.calls, False), (plan.far.calls, True)):
    for call in calls:
      results = add_gradients(
        layout,
        call,
        queries,
        keys,
        dtype=dtype,
        previous=results,
        adds=adds,
        **options,
      )
  return results


def _sum_of_runs(
  layouts: list[Layout], parts: list[Array], like: Float[Array, "B S K H"]
) -> Array:
  S, K = like.shape[1:3]
  placed = [
    jnp.pad(
      part[:, :, :S],
      ((0, 0), (layout.kv_start, K - layout.kv_stop), (0, 0), (0, 0)),
    )
    for layout, part in zip(layouts, parts, strict=True)
  ]
  total = functools.reduce(operator.add, placed)
  return total.swapaxes(1, 2).astype(like.dtype)
