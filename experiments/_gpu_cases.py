"""What `check_gpu.py` checks: small problems, their oracle and their rounding.

A case makes its operands, runs an implementation ("reference" is the oracle)
and computes the same by the whole attention matrix in the operands' precision.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.head_attention import head_attention
from pallas_kernels.head_attention.contexts import (
  HeadContexts,
  Rule,
  Strided,
  Table,
)
from pallas_kernels.packing import gather_rows, pack, scatter_rows
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import Tiling

Values = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadCase:
  """One problem of head attention."""

  name: str
  rules: tuple[Rule, ...]
  dtype: str = "float32"
  block: int = 64
  T: int = 1000
  S: int | None = None
  K: int = 2
  H: int = 64
  is_causal: bool = True
  cap: float | None = None
  has_segments: bool = False

  operation = "head_attention"

  def arrays(self) -> tuple[jax.Array, ...]:
    """Operands, the loss's weights, and segment ids."""
    return _draw(self, 2, self.S or self.T)

  def run(self, arrays: tuple[jax.Array, ...], implementation: str) -> Values:
    """Output, log-sum-exp and gradients."""
    q, k, v, weights, *ids = arrays

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
      return head_attention(
        q,
        k,
        v,
        pattern=HeadContexts(self.block, self.rules, self.is_causal),
        logits_soft_cap=self.cap,
        return_lse=True,
        implementation=implementation,
        **_segments(self, ids),
      )

    return _values(attend, (q, k, v), weights)

  def dense(self, arrays: tuple[jax.Array, ...]) -> Values:
    """The same by the whole attention matrix."""
    q, k, v, weights, *ids = arrays
    mask = _mask(self, k.shape[1], k.shape[1] - self.T, ids)
    return _values(_densely(self, mask), (q, k, v), weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedCase:
  """One problem of routed attention.

  Attributes:
    active: Part of the tokens that picks each head.
    offset: Position of the first query.
    block_rows: Of the packing.
  """

  name: str
  rules: tuple[Rule, ...]
  active: tuple[float, ...] = (0.5, 0.5, 0.5, 0.5)
  dtype: str = "float32"
  block: int = 64
  T: int = 600
  S: int | None = None
  K: int = 2
  H: int = 64
  B: int = 1
  offset: int = 0
  block_rows: int = 128
  is_causal: bool = True
  has_segments: bool = False

  operation = "routed_attention"
  cap = None

  def arrays(self) -> tuple[jax.Array, ...]:
    """Operands, the loss's weights, segment ids, and who picked whom."""
    shape = (self.B, self.T, len(self.rules))
    draws = jax.random.uniform(jax.random.key(4), shape)
    arrays = _draw(self, self.B, self.S or self.T)
    return (*arrays, draws < jnp.asarray(self.active))

  def run(self, arrays: tuple[jax.Array, ...], implementation: str) -> Values:
    """Output, where picked, and gradients."""
    q, k, v, weights, *ids, picked = arrays

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
      packing = pack(
        picked, num_active=len(self.rules), block_rows=self.block_rows
      )
      rows = routed_attention(
        gather_rows(q, packing),
        k,
        v,
        packing,
        pattern=HeadContexts(self.block, self.rules, self.is_causal),
        q_offset=self.offset,
        tiling=Tiling(block_q=self.block_rows, block_kv=256, block_edge=256),
        implementation=implementation,
        **_segments(self, ids),
      )
      return scatter_rows(rows, packing), None

    return _values(attend, (q, k, v), weights)

  def dense(self, arrays: tuple[jax.Array, ...]) -> Values:
    """The same by the whole attention matrix."""
    q, k, v, weights, *ids, picked = arrays
    mask = _mask(self, k.shape[1], self.offset, ids)
    densely = _densely(self, mask)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
      return jnp.where(picked[..., None], densely(q, k, v)[0], 0), None

    return _values(attend, (q, k, v), weights)


Case = HeadCase | RoutedCase


def shards(heads: int, stride: int, local: int = 2) -> tuple[Strided, ...]:
  """Neighbouring heads share a residue in pairs."""
  return tuple(
    Strided(local=local, stride=stride, residue=head // 2 % stride)
    for head in range(heads)
  )


def head_cases() -> list[HeadCase]:
  """The grid of head attention."""
  keep = np.random.default_rng(0).random((16, 16)) < 0.4
  table = Table.from_mask(keep)
  other = Table.from_mask(keep.T)
  window = (Strided(local=3, sinks=1),) * 4
  grid = [
    HeadCase(name="strided", rules=shards(4, 4)),
    HeadCase(name="whole tiles", rules=shards(4, 4), T=2048),
    HeadCase(name="heads of 96", rules=shards(4, 4), H=96),
    HeadCase(name="heads of 128", rules=shards(8, 4), H=128),
    HeadCase(name="heads of 256", rules=shards(4, 4), H=256),
    HeadCase(name="blocks of 16", rules=shards(4, 8), block=16),
    HeadCase(name="blocks of 256", rules=shards(4, 2, 1), block=256),
    HeadCase(name="dense", rules=shards(4, 1, 1)),
    HeadCase(name="last queries", rules=shards(4, 4), T=300, S=1500),
    HeadCase(name="soft cap", rules=shards(4, 4), cap=10.0),
    HeadCase(name="segments", rules=shards(4, 4), has_segments=True),
    HeadCase(name="sinks", rules=window),
    HeadCase(name="tables", rules=(table, table), K=1),
    HeadCase(name="not causal", rules=(table, other), K=1, is_causal=False),
  ]
  return _in_both_dtypes(grid)


def routed_cases() -> list[RoutedCase]:
  """The grid of routed attention."""
  four, window = shards(4, 4), (Strided(local=3),) * 2
  ragged = (1.0, 0.6, 0.1, 0.0)
  grid = [
    RoutedCase(name="strided", rules=four),
    RoutedCase(name="one head picked by all, one by none", rules=four, B=2),
    RoutedCase(name="all heads", rules=four, active=(1.0,) * 4),
    RoutedCase(name="few tokens", rules=four, active=(0.02,) * 4),
    RoutedCase(name="heads of 96", rules=four, H=96),
    RoutedCase(name="heads of 128", rules=four, H=128),
    RoutedCase(name="heads of 256", rules=four, H=256),
    RoutedCase(name="groups of 8", rules=shards(8, 4), active=(0.5,) * 8, K=1),
    RoutedCase(name="a KV head each", rules=four, K=4),
    RoutedCase(name="one head", rules=shards(1, 4), active=(0.7,), K=1),
    RoutedCase(name="blocks of 16", rules=shards(4, 8), block=16),
    RoutedCase(name="blocks of 256", rules=shards(4, 2, 1), block=256),
    RoutedCase(name="dense", rules=shards(4, 1, 1)),
    RoutedCase(name="window", rules=window * 2),
    RoutedCase(name="window and dense", rules=window + shards(2, 1, 1)),
    RoutedCase(name="small blocks of rows", rules=four, block_rows=16),
    RoutedCase(name="large blocks of rows", rules=four, block_rows=512),
    RoutedCase(name="last queries", rules=four, T=300, S=900, offset=600),
    RoutedCase(name="not causal in a block", rules=four, is_causal=False),
    RoutedCase(name="segments", rules=four, has_segments=True, B=2),
  ]
  grid[1] = dataclasses.replace(grid[1], active=ragged)
  return _in_both_dtypes(grid)


def _in_both_dtypes(grid: list[Any]) -> list[Any]:
  return [
    dataclasses.replace(case, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for case in grid
  ]


def _draw(case: Case, B: int, S: int) -> tuple[jax.Array, ...]:
  """q, k, v, weights of the output, and segment ids of queries and keys."""
  keys = jax.random.split(jax.random.key(1), 6)
  N, dtype = len(case.rules), jnp.dtype(case.dtype)
  return (
    jax.random.normal(keys[0], (B, case.T, N, case.H), dtype),
    jax.random.normal(keys[1], (B, S, case.K, case.H), dtype),
    jax.random.normal(keys[2], (B, S, case.K, case.H), dtype),
    jax.random.normal(keys[3], (B, case.T, N, case.H)),
    jnp.sort(jax.random.randint(keys[4], (B, case.T), 0, 3)),
    jnp.sort(jax.random.randint(keys[5], (B, S), 0, 3)),
  )


def _segments(case: Case, ids: list[jax.Array]) -> dict[str, Any]:
  names = ("q_segment_ids", "kv_segment_ids")
  return dict(zip(names, ids, strict=True)) if case.has_segments else {}


def _mask(case: Case, S: int, offset: int, ids: list[jax.Array]) -> jax.Array:
  """What every head sees, [B or 1, N, T, S]."""
  queries = np.arange(case.T)[:, None] + offset
  keys = np.arange(S)[None]
  masks = []
  for rule in case.rules:
    mask = rule.keep(queries // case.block, keys // case.block)
    masks.append(mask & (keys <= queries) if case.is_causal else mask)
  mask = jnp.asarray(np.stack(masks))[None]
  if case.has_segments:
    mask = mask & (ids[0][:, :, None] == ids[1][:, None])[:, None]
  return mask


def _densely(case: Case, mask: jax.Array) -> Any:
  """A function of q, k and v, in their own precision."""

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    groups = len(case.rules) // case.K
    wide_k, wide_v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    logits = jnp.einsum(
      "btnh,bsnh->bnts", q, wide_k, preferred_element_type=jnp.float32
    )
    logits *= case.H**-0.5
    if case.cap is not None:
      logits = case.cap * jnp.tanh(logits / case.cap)
    logits = jnp.where(mask, logits, -1e30)
    kept = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", kept.astype(v.dtype), wide_v)
    lse = jax.nn.logsumexp(logits, axis=-1)
    lse = jnp.where(mask.any(-1), lse, -jnp.inf)
    return out, lse.swapaxes(1, 2)  # [B, T, N]

  return attend


def _values(
  attend: Any, operands: tuple[jax.Array, ...], weights: jax.Array
) -> Values:
  """Output, log-sum-exp if there is one, and gradients of a loss of both."""

  def loss(*operands: jax.Array) -> Any:
    out, lse = attend(*operands)
    wide = out.astype(jnp.float32)
    total, named = (wide * weights).sum(), {"out": wide}
    if lse is not None:
      seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
      total, named["lse"] = total + jnp.sin(seen).sum(), seen
    return total, named

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (_, named), grads = jax.jit(grad)(*operands)
  named |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
  return {
    name: np.asarray(value.astype(jnp.float32), np.float64)
    for name, value in named.items()
  }
