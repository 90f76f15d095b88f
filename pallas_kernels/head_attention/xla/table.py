"""Heads with any rule on XLA: the blocks they see, gathered into tiles.

What a query tile sees is listed in the loop, so the offset of the queries may
be traced, and no list of visits is ever kept. Rules that have closed forms
are evaluated; tables are looked up, a bit an entry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.head_attention.contexts import Ranged, Rule, Strided, Table
from pallas_kernels.head_attention.xla.online_softmax import Tile
from pallas_kernels.head_attention.xla.rows import QueryTile, pad

State = Any


class Span(NamedTuple):
  """Blocks that a step visits."""

  blocks: Int[Array, "U n"]
  kept: Bool[Array, "U q n"] | None  # By block of queries; None: all is seen.


Step = Callable[[State, list[Span]], State]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """Static sizes of a run of heads with any rule.

  Attributes:
    block: Tokens of a block of the pattern.
    part: Tokens that are gathered together; divides `block`.
    parts: Of them, in one tile.
    q_blocks: Blocks that the queries of a tile may touch.
    kv_length: Keys, S.
    is_causal: Hide keys after the query.
  """

  block: int
  part: int
  parts: int
  q_blocks: int
  kv_length: int
  is_causal: bool


# A stride that no block index reaches.
_NEVER = 2**30


def closed_form(rules: tuple[Rule, ...]) -> Int[np.ndarray, "rules 6"]:
  """Strided and ranged rules as numbers, for `_keep`."""
  rows = []
  for rule in rules:
    if isinstance(rule, Strided):
      far = (rule.stride, rule.residue) if rule.stride else (_NEVER, _NEVER - 1)
      rows.append((min(rule.local, _NEVER), 1, 0, *far, rule.sinks))
    else:
      assert isinstance(rule, Ranged)
      rows.append(
        (
          min(rule.near, _NEVER),
          rule.near_stride,
          rule.near_residue,
          rule.far_stride,
          rule.far_residue,
          0,
        )
      )
  return np.minimum(np.array(rows, np.int64), _NEVER).astype(np.int32)


def tables(
  rules: tuple[Rule, ...],
) -> tuple[np.ndarray, Int[np.ndarray, " rules"]]:
  """Distinct tables of one size (a bit an entry), and which one a head has."""
  distinct = list(dict.fromkeys(rules))
  masks = [rule.mask() for rule in distinct if isinstance(rule, Table)]
  packed = np.stack([np.packbits(mask, axis=1) for mask in masks])
  index = np.array([distinct.index(rule) for rule in rules], np.int32)
  return packed, index


class Keys:
  """The keys of a chunk of units, and the way through them.

  Args:
    shape: Static sizes.
    k, v: Keys and values of c KV heads (pairs of sequence and head).
    segments: Segment of each key, or None.
    units: What each unit sees: rows of `closed_form` [c, g, 6], or indices
      [c, g] into `packed`.
    packed: See `tables`; None if the rules have closed forms.
  """

  def __init__(
    self,
    shape: Shape,
    k: Float[Array, "c S H"],
    v: Float[Array, "c S Hv"],
    segments: Int[Array, "c S"] | None,
    units: Int[Array, "c g ..."],
    packed: np.ndarray | None,
  ) -> None:
    self.shape = shape
    self._units = units.reshape(-1, *units.shape[2:])
    self._packed = packed
    self._pair = np.repeat(np.arange(units.shape[0]), units.shape[1])[:, None]
    self._views = [x if x is None else self._view(x) for x in (k, v, segments)]

  def _view(self, x: Array) -> Array:
    """[c, S, ...] in parts: [c, parts of S, part, ...]."""
    x = pad(x, 1, -self.shape.kv_length % self.shape.part)
    return x.reshape(x.shape[0], -1, self.shape.part, *x.shape[2:])

  def visit(self, tile: QueryTile, state: State, step: Step) -> State:
    """Calls `step` for all that the tile's queries see, whole parts first."""
    shape = self.shape
    part, n = shape.part, shape.parts
    held = -(-shape.kv_length // part)
    start = jnp.arange(held, dtype=jnp.int32) * part
    i = tile.first // shape.block
    i = i + jnp.arange(shape.q_blocks, dtype=jnp.int32)
    i = jnp.minimum(i, tile.last // shape.block)
    keep = self._keep(i, start // shape.block)
    some, whole = keep.any(1), keep.all(1)
    whole &= start + part <= shape.kv_length
    if shape.is_causal:
      some &= start <= tile.last
      whole &= start + part <= tile.first + 1
    if tile.segment is not None:
      whole = jnp.zeros_like(whole)
    rank = jnp.where(whole, 0, jnp.where(some, 1, 2))
    order = jnp.argsort(rank, axis=1, stable=True).astype(jnp.int32)
    order = pad(order, 1, -held % n)
    seen = some.sum(1, dtype=jnp.int32)

    def span(index: Array, is_full: bool) -> Span:
      blocks = jax.lax.dynamic_slice_in_dim(order, index * n, n, 1)
      if is_full:
        return Span(blocks, None)
      kept = jnp.take_along_axis(keep, blocks[:, None], axis=2)
      slot = index * n + jnp.arange(n, dtype=jnp.int32)
      return Span(blocks, kept & (slot < seen[:, None])[:, None])

    done = jnp.min(whole.sum(1, dtype=jnp.int32)) // n
    state = jax.lax.fori_loop(
      0, done, lambda t, state: step(state, [span(t, True)]), state
    )
    return jax.lax.fori_loop(
      done,
      -(-jnp.max(seen) // n),
      lambda t, state: step(state, [span(t, False)]),
      state,
    )

  def _keep(
    self, i: Int[Array, " q"], j: Int[Array, " parts"]
  ) -> Bool[Array, "U q parts"]:
    """What the rules keep of blocks j for blocks i."""
    if self._packed is not None:
      rows, columns = self._packed.shape[1], self._packed.shape[2] * 8
      packed = jnp.asarray(self._packed)
      i = jnp.minimum(i, rows - 1)
      bits = jnp.unpackbits(packed[self._units[:, None], i[None]], axis=2)
      return bits[:, :, jnp.minimum(j, columns - 1)].astype(bool)
    near, near_stride, near_residue, far_stride, far_residue, sinks = (
      self._units[:, None, None, column] for column in range(6)
    )
    i = i[:, None]
    is_near = i - j < near
    in_near = j % near_stride == near_residue
    in_far = j % far_stride == far_residue
    visible = (is_near & in_near) | (~is_near & in_far) | (j < sinks)
    return (j <= i) & visible

  def load(self, tile: QueryTile, span: Span) -> Tile:
    """The keys of a span, in float32, and what the tile sees of them."""
    k, v, segments = (
      x if x is None else self._gather(x, span) for x in self._views
    )
    assert k is not None and v is not None
    visible = None
    if span.kept is not None:
      shape = self.shape
      q_block = tile.position // shape.block - tile.first // shape.block
      q_block = jnp.minimum(q_block, shape.q_blocks - 1)
      visible = jnp.repeat(span.kept[:, q_block], shape.part, axis=2)
      key = jnp.arange(shape.part, dtype=jnp.int32)
      key = span.blocks[..., None] * shape.part + key
      key = key.reshape(key.shape[0], 1, -1)
      visible &= key < shape.kv_length
      if shape.is_causal:
        visible &= key <= tile.position[:, None]
      if tile.segment is not None and segments is not None:
        visible &= tile.segment[:, :, None] == segments[:, None]
    return Tile(k.astype(jnp.float32), v.astype(jnp.float32), visible)

  def _gather(self, x: Array, span: Span) -> Array:
    x = x[self._pair, span.blocks]
    return x.reshape(x.shape[0], -1, *x.shape[3:])

  def transposed(self, tile: Tile, span: Span) -> Float[Array, "U H W"]:
    """The keys of a span again, for dq."""
    del span
    return tile.k.swapaxes(1, 2)

  def no_gradients(self) -> list[Array]:
    """What `add` adds to."""
    return [
      jnp.zeros(x.shape, jnp.float32) for x in self._views[:2] if x is not None
    ]

  def add(
    self,
    totals: list[Array],
    span: Span,
    dk: Float[Array, "U W H"],
    dv: Float[Array, "U W Hv"],
  ) -> list[Array]:
    """Adds what one step gives; units that share keys are summed."""

    def add(total: Array, more: Array) -> Array:
      shape = (*span.blocks.shape, self.shape.part, more.shape[-1])
      return total.at[self._pair, span.blocks].add(more.reshape(shape))

    return [add(totals[0], dk), add(totals[1], dv)]

  def collect(
    self, totals: list[Array]
  ) -> tuple[Float[Array, "c S H"], Float[Array, "c S Hv"]]:
    """The sums, back in the layout of the keys."""
    dk, dv = (
      x.reshape(x.shape[0], -1, x.shape[3])[:, : self.shape.kv_length]
      for x in totals
    )
    return dk, dv
