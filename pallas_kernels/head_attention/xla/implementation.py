"""Head attention in plain XLA: loops over tiles, nothing of size T x S.

Every step takes some heads together, for that is how XLA keeps the cores of a
CPU busy. The softmax is computed online. Backward recomputes the weights from
the saved log-sum-exp and adds dk and dv tile by tile, in a fixed order:
results repeat bit for bit. Small problems are one tile (see `dense`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.head_attention.contexts import Table
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import StridedHeads
from pallas_kernels.head_attention.xla import (
  dense,
  online_softmax,
  strided,
  table,
  tiling,
)
from pallas_kernels.head_attention.xla.rows import (
  QueryTile,
  Run,
  runs,
)


def refusal(settings: Settings, operands: Operands) -> str | None:
  """None: everything is covered."""
  del settings, operands
  return None


@functools.partial(jax.jit, static_argnums=0)
def forward(
  settings: Settings, operands: Operands
) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
  """Output in q's dtype, and the float32 log-sum-exp."""
  if _is_empty(operands):
    q, v = operands.q, operands.v
    batch, length, heads = q.shape[:3]
    out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    return out, jnp.full((batch, heads, length), -jnp.inf, jnp.float32)
  if dense.fits(settings, operands):
    return dense.forward(settings, operands)
  results = [
    _Heads(settings, operands, run, backward=False).forward()
    for run in runs(settings.pattern, operands.k.shape[2])
  ]
  out = jnp.concatenate([out for out, _ in results], axis=2)
  lse = jnp.concatenate([lse for _, lse in results], axis=2)
  return out, lse.swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=0)
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
  """Gradients of q, k and v; float32 sums, returned in their dtypes."""
  q, k, v = operands[:3]
  if _is_empty(operands):
    return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)
  empty = lse == -jnp.inf
  delta = jnp.einsum(
    "btnh,btnh->bnt",
    out.astype(jnp.float32),
    d_out.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  # The weights of a row that sees nothing are exp(-inf).
  delta = jnp.where(empty, 0.0, delta - d_lse)
  lse = jnp.where(empty, jnp.inf, lse)
  if dense.fits(settings, operands):
    dq, dk, dv = dense.backward(settings, operands, lse, delta, d_out)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
  lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
  all_dq = []
  dk = jnp.zeros(k.shape, jnp.float32)
  dv = jnp.zeros(v.shape, jnp.float32)
  for run in runs(settings.pattern, k.shape[2]):
    heads = _Heads(settings, operands, run, backward=True)
    dq, run_dk, run_dv = heads.backward(lse, delta, d_out)
    all_dq.append(dq)
    dk = dk.at[:, :, run.kv_start : run.kv_stop].add(run_dk)
    dv = dv.at[:, :, run.kv_start : run.kv_stop].add(run_dv)
  dq = jnp.concatenate(all_dq, axis=2)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _is_empty(operands: Operands) -> bool:
  """Whether there are no queries, or no keys for them to see."""
  return not (operands.q.size and operands.k.size)


class _Heads:
  """One run of heads, and the loops over its chunks and query tiles."""

  def __init__(
    self, settings: Settings, operands: Operands, run: Run, *, backward: bool
  ) -> None:
    self.settings = settings
    self.operands = operands
    self.run = run
    self.layout, self.shape = tiling.plan(
      settings, operands, run, backward=backward
    )
    heads = slice(run.heads.start, run.heads.stop)
    kv_heads = slice(run.kv_start, run.kv_stop)
    self._heads = heads
    q, k, v, q_segments, kv_segments, _ = operands
    layout = self.layout
    self._q = layout.pack(q[:, :, heads])
    self._k = layout.pack_keys(k[:, :, kv_heads])
    self._v = layout.pack_keys(v[:, :, kv_heads])
    self._q_segments = self._kv_segments = None
    if q_segments is not None and kv_segments is not None:
      wide = (*q_segments.shape, heads.stop - heads.start)
      self._q_segments = layout.pack(
        jnp.broadcast_to(q_segments[..., None], wide)
      )
      wide = (*kv_segments.shape, run.kv_heads)
      self._kv_segments = layout.pack_keys(
        jnp.broadcast_to(kv_segments[..., None], wide)
      )
    self._tables = None
    if isinstance(run.heads, StridedHeads):
      self._units = np.array(run.heads.residues, np.int32)
    elif isinstance(run.heads.rules[0], Table):
      self._tables, self._units = table.tables(run.heads.rules)
    else:
      self._units = table.closed_form(run.heads.rules)
    self._q_offset = operands.q_offset
    if settings.q_offset is not None:
      self._q_offset = jnp.int32(settings.q_offset)

  def _keys(self, chunk: Any) -> Any:
    """Either kind of keys: their methods are the same."""
    k, v, segments, units = chunk
    if isinstance(self.shape, strided.Shape):
      return strided.Keys(self.shape, k, v, segments, units)
    return table.Keys(self.shape, k, v, segments, units, self._tables)

  def _chunks(self) -> Any:
    layout = self.layout
    units = jnp.asarray(self._units[:: layout.fold])
    units = units.reshape(1, layout.kv_heads, layout.units, *units.shape[1:])
    units = jnp.broadcast_to(units, (layout.batch, *units.shape[1:]))
    units = units.reshape(
      layout.chunks, layout.pairs, layout.units, *units.shape[3:]
    )
    return self._k, self._v, self._kv_segments, units

  def _tile(self, index: Array, segment: Array | None) -> QueryTile:
    layout = self.layout
    first = self._q_offset + index * layout.block_q
    last = self._q_offset + layout.length - 1
    position = first + jnp.arange(layout.block_q, dtype=jnp.int32)
    return QueryTile(
      first,
      jnp.minimum(first + layout.block_q - 1, last),
      jnp.tile(position, layout.fold),
      segment,
    )

  def _scaled(self, q: Array) -> Array:
    return q.astype(jnp.float32) * self.settings.scale

  def forward(self) -> tuple[Array, Array]:
    """[B, T, heads, Hv] and [B, T, heads]."""
    cap = self.settings.logits_soft_cap
    tiles = jnp.arange(self.layout.tiles, dtype=jnp.int32)

    def chunk_step(chunk: Any) -> Any:
      keys = self._keys(chunk[-1])

      def tile_step(_: None, xs: Any) -> Any:
        index, q, segment = xs
        tile = self._tile(index, segment)
        q = self._scaled(q)

        def step(softmax: online_softmax.Softmax, spans: Any) -> Any:
          met = [keys.load(tile, span) for span in spans]
          return online_softmax.extend(softmax, q, met, cap)

        state = online_softmax.start(q, self._v.shape[-1])
        out, lse = online_softmax.finish(keys.visit(tile, state, step))
        return None, (out.astype(self.operands.q.dtype), lse)

      q, segments = chunk[:2]
      return jax.lax.scan(tile_step, None, (tiles, q, segments))[1]

    out, lse = _map(chunk_step, (self._q, self._q_segments, self._chunks()))
    return self.layout.unpack(out), self.layout.unpack(lse)

  def backward(self, lse: Array, delta: Array, d_out: Array) -> Any:
    """Dq [B, T, heads, H], dk and dv of the run's KV heads, in float32."""
    cap = self.settings.logits_soft_cap
    scale = self.settings.scale
    tiles = jnp.arange(self.layout.tiles, dtype=jnp.int32)
    pack = self.layout.pack
    heads = self._heads

    def chunk_step(chunk: Any) -> Any:
      keys = self._keys(chunk[-1])

      def tile_step(totals: Any, xs: Any) -> Any:
        index, q, segment, lse, delta, d_out = xs
        tile = self._tile(index, segment)
        rows = online_softmax.Rows(
          self._scaled(q), d_out.astype(jnp.float32), lse, delta
        )

        def step(state: Any, spans: Any) -> Any:
          dq, totals = state
          for span in spans:
            met = keys.load(tile, span)
            more, dk, dv = online_softmax.gradients(
              rows, met, keys.transposed(met, span), cap
            )
            dq, totals = dq + more, keys.add(totals, span, dk, dv)
          return dq, totals

        dq = jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)
        dq, totals = keys.visit(tile, (dq, totals), step)
        return totals, dq.swapaxes(1, 2) * scale

      totals, dq = jax.lax.scan(
        tile_step, keys.no_gradients(), (tiles, *chunk[:-1])
      )
      return dq, *keys.collect(totals)

    dq, dk, dv = _map(
      chunk_step,
      (
        self._q,
        self._q_segments,
        pack(lse[:, :, heads], jnp.inf),
        pack(delta[:, :, heads]),
        pack(d_out[:, :, heads]),
        self._chunks(),
      ),
    )
    unpack = self.layout.unpack_keys
    return self.layout.unpack(dq), unpack(dk), unpack(dv)


def _map(function: Any, xs: Any) -> Any:
  """`jax.lax.map`, without a loop around a single item."""
  if jax.tree.leaves(xs)[0].shape[0] > 1:
    return jax.lax.map(function, xs)
  one = function(jax.tree.map(lambda x: x[0], xs))
  return jax.tree.map(lambda x: x[None], one)
