"""Strided heads on XLA: their window, and their shard of the past.

Follows the near and far parts of `schedule.py`. Tile boundaries are computed
in the loop, so the offset of the queries may be traced.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.head_attention.xla.online_softmax import Tile
from pallas_kernels.head_attention.xla.rows import QueryTile, pad

State = Any


class Span(NamedTuple):
  """Keys that a step visits; `start` counts in the near or the far view."""

  is_far: bool
  start: Int[Array, ""]
  width: int
  is_full: bool


Step = Callable[[State, list[Span]], State]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Static sizes of a run of strided heads.

  Attributes:
    block: Tokens of a block.
    local, stride: As in `Strided`.
    kv_length: Keys, S.
    window: Keys from the start of a query tile's window to its last query,
      a multiple of `block`.
    width: Keys of a tile seen whole.
    edge: Keys of a tile with a mask.
    widest: Keys of a masked tile that may hold a whole window.
  """

  block: int
  local: int
  stride: int
  kv_length: int
  window: int
  width: int
  edge: int
  widest: int


class Keys:
  """The keys of a chunk of units, and the way through them.

  Args:
    shape: Static sizes.
    k, v: Keys and values of c KV heads (pairs of sequence and head).
    segments: Segment of each key, or None.
    residues: The shard of each unit: [c, units of a KV head].
  """

  def __init__(
    self,
    shape: Shape,
    k: Float[Array, "c S H"],
    v: Float[Array, "c S Hv"],
    segments: Int[Array, "c S"] | None,
    residues: Int[Array, "c g"],
  ) -> None:
    self.shape = shape
    self._residues = residues
    self._views = {False: self._near(k, v, segments)}
    if shape.stride:
      self._views[True] = self._far(k, v, segments)
    # For dq; forward does not use it, and XLA drops it there.
    self._transposed = {
      is_far: view[0].swapaxes(1, 2)
      for is_far, view in self._views.items()
      if view[0] is not None
    }

  def _near(self, *arrays: Array | None) -> list[Array | None]:
    # The last tile may hang over the end.
    shape = self.shape
    widest = max(shape.widest, shape.width, shape.edge)
    over = -shape.kv_length % shape.block + min(shape.window, widest)
    return [x if x is None else pad(x, 1, over) for x in arrays]

  def _far(self, *arrays: Array | None) -> list[Array | None]:
    shape = self.shape
    period = shape.block * shape.stride
    held = -(-shape.kv_length // period) * shape.block
    tail = -held % max(shape.width, shape.edge)

    def view(x: Array | None) -> Array | None:
      if x is None:
        return None
      x = pad(x, 1, -shape.kv_length % period)
      x = x.reshape(x.shape[0], -1, shape.stride, shape.block, *x.shape[2:])

      def shard(x: Array, residue: Array) -> Array:
        x = jax.lax.dynamic_index_in_dim(x, residue, 1, keepdims=False)
        return x.reshape(held, *x.shape[2:])

      shards = jax.vmap(jax.vmap(shard, (None, 0)))(x, self._residues)
      return pad(shards.reshape(-1, *shards.shape[2:]), 1, tail)

    return [view(x) for x in arrays]

  def visit(self, tile: QueryTile, state: State, step: Step) -> State:
    """Calls `step` for all that the tile's queries see, in order."""
    shape = self.shape
    start = self._window(tile.first)
    near = []
    if shape.window <= shape.widest:
      near.append(Span(False, start, shape.window, False))
    if shape.stride:
      state = self._visit_far(tile, start, near, state, step)
    elif near:
      state = step(state, near)
    return state if near else self._visit_window(tile, start, state, step)

  def _visit_far(
    self,
    tile: QueryTile,
    bound: Int[Array, ""],
    near: list[Span],
    state: State,
    step: Step,
  ) -> State:
    """The shards before `bound`; the last step also sees `near`."""
    width, edge = self.shape.width, self.shape.edge
    held = self._held(bound)
    whole = jnp.min(held) // width
    is_full = tile.segment is None
    state = _loop(step, state, True, whole, width, 0, is_full)
    done = whole * width
    # Shards differ by a block at most, so `width` holds what is left.
    if self.shape.block > width:
      more = jnp.maximum(jnp.max(held) - done, 1) - 1
      state = _loop(step, state, True, more // width, width, done, False)
      done += more // width * width

    def last(count: int) -> Callable[[State], State]:
      far = [Span(True, done, count * edge, False)] if count else []
      spans = [*far, *near]
      return lambda state: step(state, spans) if spans else state

    count = -(-(jnp.max(held) - done) // edge)
    branches = [last(count) for count in range(width // edge + 1)]
    return jax.lax.switch(count, branches, state)

  def _visit_window(
    self, tile: QueryTile, start: Int[Array, ""], state: State, step: Step
  ) -> State:
    """A long window: masked tiles at both ends, whole ones between."""
    shape = self.shape
    width, edge = shape.width, shape.edge
    is_full = tile.segment is None
    end = jnp.minimum(tile.last + 1, shape.kv_length)
    old = -(-(self._window(tile.last) - start) // edge)
    old = jnp.clip(old, 0, -(-(end - start) // edge))
    state = _loop(step, state, False, old, edge, start, False)
    start += old * edge
    whole = jnp.minimum(tile.first + 1, shape.kv_length) - start
    whole = jnp.maximum(whole // width, 0)
    state = _loop(step, state, False, whole, width, start, is_full)
    start += whole * width
    new = -(-(end - start) // edge)
    return _loop(step, state, False, new, edge, start, False)

  def _window(self, position: Int[Array, ""]) -> Int[Array, ""]:
    """First key of the window of a query there."""
    block = self.shape.block
    return jnp.maximum(position // block - self.shape.local + 1, 0) * block

  def _held(self, bound: Int[Array, ""]) -> Int[Array, " U"]:
    """Keys of each unit's shard before `bound`."""
    shape = self.shape
    bound = jnp.minimum(bound, shape.kv_length)
    blocks, rest = bound // shape.block, bound % shape.block
    residues = self._residues.reshape(-1)
    whole = -((residues - blocks) // shape.stride)  # Ceiling of the quotient.
    last = jnp.where(blocks % shape.stride == residues, rest, 0)
    return whole * shape.block + last

  def load(self, tile: QueryTile, span: Span) -> Tile:
    """The keys of a span, in float32, and what the tile sees of them."""
    k, v, segments = (
      None if x is None else self._slice(x, span)
      for x in self._views[span.is_far]
    )
    assert k is not None and v is not None
    visible = None
    if not span.is_full:
      visible = self._far_mask(tile, span) if span.is_far else None
      visible = self._near_mask(tile, span) if visible is None else visible
      if tile.segment is not None and segments is not None:
        visible = visible & (tile.segment[:, :, None] == segments[:, None])
    return Tile(k.astype(jnp.float32), v.astype(jnp.float32), visible)

  def _slice(self, x: Array, span: Span, axis: int = 1) -> Array:
    x = jax.lax.dynamic_slice_in_dim(x, span.start, span.width, axis)
    if span.is_far:
      return x
    return jnp.repeat(x, self._residues.shape[1], axis=0)

  def _near_mask(self, tile: QueryTile, span: Span) -> Array:
    shape = self.shape
    key = span.start + jnp.arange(span.width, dtype=jnp.int32)
    block = key // shape.block
    # One run of queries sees a key: it begins at the key's own.
    last = ((block + shape.local) * shape.block - 1)[None]
    if shape.stride:
      shard = self._residues.reshape(-1, 1)
      last = jnp.where(block % shape.stride == shard, 2**31 - 1, last)
    last = jnp.where(key < shape.kv_length, last, -1)
    # Else XLA repeats the integer divisions for every row.
    last = jax.lax.optimization_barrier(last)
    position = tile.position[:, None]
    return (key <= position) & (position <= last[:, None])

  def _far_mask(self, tile: QueryTile, span: Span) -> Array:
    index = span.start + jnp.arange(span.width, dtype=jnp.int32)
    held = self._held(self._window(tile.first))
    return (index < held[:, None])[:, None]

  def transposed(self, tile: Tile, span: Span) -> Float[Array, "U H W"]:
    """The keys of a span again, for dq."""
    del tile
    k = self._slice(self._transposed[span.is_far], span, 2)
    return k.astype(jnp.float32)

  def no_gradients(self) -> dict[bool, tuple[Array, Array]]:
    """What `add` adds to."""

    def zeros(x: Array | None) -> Array:
      assert x is not None
      return jnp.zeros(x.shape, jnp.float32)

    return {
      is_far: (zeros(view[0]), zeros(view[1]))
      for is_far, view in self._views.items()
    }

  def add(
    self,
    totals: dict[bool, tuple[Array, Array]],
    span: Span,
    dk: Float[Array, "U W H"],
    dv: Float[Array, "U W Hv"],
  ) -> dict[bool, tuple[Array, Array]]:
    """Adds what one step gives; units that share keys are summed."""

    def add(total: Array, part: Array) -> Array:
      part = part.reshape(total.shape[0], -1, *part.shape[1:]).sum(1)
      part += jax.lax.dynamic_slice_in_dim(total, span.start, span.width, 1)
      return jax.lax.dynamic_update_slice_in_dim(total, part, span.start, 1)

    old = totals[span.is_far]
    return totals | {span.is_far: (add(old[0], dk), add(old[1], dv))}

  def collect(
    self, totals: dict[bool, tuple[Array, Array]]
  ) -> tuple[Float[Array, "c S H"], Float[Array, "c S Hv"]]:
    """The sums, back in the layout of the keys."""
    shape = self.shape
    chunk, units = self._residues.shape

    def both(near: Array, far: Array | None) -> Array:
      near = near[:, : shape.kv_length]
      if far is None:
        return near
      period = shape.block * shape.stride
      held = -(-shape.kv_length // period)
      far = far[:, : held * shape.block]
      far = far.reshape(chunk, units, held, shape.block, -1)
      total = pad(near, 1, -shape.kv_length % period)
      total = total.reshape(chunk, held, shape.stride, shape.block, -1)

      def put(total: Array, parts: Array, residues: Array) -> Array:
        for unit in range(units):
          total = total.at[:, residues[unit]].add(parts[unit])
        return total

      total = jax.vmap(put)(total, far, self._residues)
      return total.reshape(chunk, -1, near.shape[2])[:, : shape.kv_length]

    near = totals[False]
    far = totals.get(True, (None, None))
    return both(near[0], far[0]), both(near[1], far[1])


def _loop(
  step: Step,
  state: State,
  is_far: bool,
  count: Int[Array, ""],
  width: int,
  origin: Array | int,
  is_full: bool,
) -> State:
  def body(i: Array, state: State) -> State:
    return step(state, [Span(is_far, origin + i * width, width, is_full)])

  return jax.lax.fori_loop(0, count, body, state)
