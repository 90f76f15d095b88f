"""What every Triton kernel of head attention needs to know and to do.

Kernels get whole arrays and compute addresses themselves: the rows of a tile
may lie anywhere, so a head's shard is read as easily as a run of keys. The
public layouts [B, T, N, H] and [B, S, K, H] are read as they are.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.tiling import Tiling

# Base-2 exponentials are one instruction; the constant goes into the scale.
LOG2_E = math.log2(math.e)
# Running maximum of a row that has seen nothing, and the log-sum-exp that
# makes all weights of a row zero: finite, so that no inf - inf appears.
LOWEST = -1e30
HIGHEST = 1e30
# No position is larger: sums of two still fit int32.
FARTHEST = 2**30
# Last query of a key that stays visible.
FOREVER = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Problem:
  """Sizes and options of one call; letters as in the public door.

  Attributes:
    q_offset: Position of the first query; None if an array holds it.
    columns, v_columns: H and Hv, rounded up to what Triton's tiles take.
  """

  B: int
  T: int
  S: int
  N: int
  K: int
  H: int
  Hv: int
  dtype: Any
  block: int
  is_causal: bool
  scale: float
  cap: float | None
  q_offset: int | None
  has_segments: bool
  tiling: Tiling
  columns: int
  v_columns: int

  @property
  def groups(self) -> int:
    """Query heads a KV head, G."""
    return self.N // self.K

  @property
  def q_tiles(self) -> int:
    """Query tiles of a head."""
    return pl.cdiv(self.T, self.tiling.block_q)

  @property
  def list_block(self) -> int:
    """Block of work lists: a tile of keys has one or more."""
    return min(self.block, self.tiling.block_kv)

  @property
  def kv_tiles(self) -> int:
    """Contiguous key tiles of a head."""
    return pl.cdiv(self.S, self.tiling.block_kv)


def describe(settings: Settings, operands: Operands, tiling: Tiling) -> Problem:
  """The problem that these inputs pose."""
  B, T, N, H = operands.q.shape
  _, S, K, Hv = operands.v.shape
  return Problem(
    B=B,
    T=T,
    S=S,
    N=N,
    K=K,
    H=H,
    Hv=Hv,
    dtype=operands.q.dtype,
    block=settings.pattern.block_size,
    is_causal=settings.pattern.is_causal,
    scale=settings.scale,
    cap=settings.logits_soft_cap,
    q_offset=settings.q_offset,
    has_segments=operands.q_segment_ids is not None,
    tiling=tiling,
    columns=padded(H),
    v_columns=padded(Hv),
  )


def padded(size: int) -> int:
  """Columns of a tile: a power of two that tensor cores take."""
  return max(16, pl.next_power_of_2(size))


def divide(x: jax.Array, by: int) -> jax.Array:
  """X // by for x of at least 0; `//` also handles signs, at a cost."""
  if by & (by - 1) == 0:
    return lax.shift_right_logical(x, jnp.int32(by.bit_length() - 1))
  return lax.div(x, jnp.int32(by))


def divide_up(x: jax.Array, by: int) -> jax.Array:
  """Least n with n * by >= x, at least 0."""
  return divide(jnp.maximum(x, 0) + (by - 1), by)


def clip(x: jax.Array, low: Any, high: Any) -> jax.Array:
  """`x` in [low, high]."""
  return jnp.minimum(jnp.maximum(x, low), high)


def read_offset(problem: Problem, offset_ref: Any) -> jax.Array | int:
  """Position of the first query."""
  return offset_ref[0] if problem.q_offset is None else problem.q_offset


def load_rows(
  ref: Any,
  batch: jax.Array,
  rows: jax.Array,
  head: jax.Array,
  size: int,
  *,
  exist: jax.Array | None = None,
) -> jax.Array:
  """Rows of ref [B, rows, heads, size]; what does not exist reads as zero.

  Args:
    ref: Whole array.
    batch, head: Which ones.
    rows: Row of each line of the tile, in any order.
    size: Columns that exist; the tile has `padded(size)` of them.
    exist: Which of `rows` do; `None` if all.
  """
  columns = lax.iota(jnp.int32, padded(size))
  mask = None if exist is None else exist[:, None]
  if columns.size != size:
    inside = (columns < size)[None]
    mask = inside if mask is None else mask & inside
  where = ref.at[batch, rows[:, None], head, columns[None]]
  if mask is None:
    return plgpu.load(where)
  mask = jnp.broadcast_to(mask, (rows.size, columns.size))
  other = 0.0 if jnp.issubdtype(ref.dtype, jnp.floating) else 0
  return plgpu.load(where, mask=mask, other=other)


def store_rows(
  ref: Any,
  index: tuple[Any, ...],
  size: int,
  value: jax.Array,
  *,
  exist: jax.Array | None = None,
) -> None:
  """Writes a tile to `ref.at[index]`, whose last axis is `size` long."""
  columns = lax.iota(jnp.int32, padded(size))
  mask = (columns < size)[None]
  if exist is not None:
    mask = mask & exist[:, None]
  mask = jnp.broadcast_to(mask, value.shape)
  plgpu.store(
    ref.at[(*index, columns[None])], value.astype(ref.dtype), mask=mask
  )


def dot(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
  """Matrix product in float32; float32 operands are not rounded to TF32."""
  exact = a.dtype == jnp.float32
  return plgpu.dot(
    a,
    b,
    trans_b=trans_b,
    precision=lax.Precision.HIGHEST if exact else None,
  )


def logits_of(
  problem: Problem, products: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
  """Logits in base 2, and their slope by the soft cap (None without one)."""
  if problem.cap is None:
    return products * (problem.scale * LOG2_E), None
  tanh = jnp.tanh(products * (problem.scale / problem.cap))
  return tanh * (problem.cap * LOG2_E), 1 - tanh * tanh


# Weighted sum of the values, greatest logit, sum of the weights; base 2.
Softmax = tuple[jax.Array, jax.Array, jax.Array]


def softmax_of_nothing(queries: int, columns: int) -> Softmax:
  """Where `add_to_softmax` begins."""
  return (
    jnp.zeros((queries, columns), jnp.float32),
    jnp.full((queries,), LOWEST, jnp.float32),
    jnp.zeros((queries,), jnp.float32),
  )


def add_to_softmax(
  softmax: Softmax,
  logits: jax.Array,
  v: jax.Array,
  v_scale: jax.Array | None = None,
) -> Softmax:
  """With a tile more: logits in base 2 [queries, keys], values [keys, Hv].

  `v_scale` [keys] multiplies the values.
  """
  acc, m, l = softmax
  top = jnp.maximum(m, jnp.max(logits, axis=1))
  weights = jnp.exp2(logits - top[:, None])
  shrink = jnp.exp2(m - top)
  l = l * shrink + jnp.sum(weights, axis=1)
  if v_scale is not None:
    weights *= v_scale[None]
  return acc * shrink[:, None] + dot(weights.astype(v.dtype), v), top, l


def call(
  kernel: Callable[..., None],
  problem: Problem,
  *,
  grid: Sequence[int],
  inputs: Sequence[Any],
  out_shape: Sequence[jax.ShapeDtypeStruct],
  num_warps: int,
  num_stages: int,
  interpret: Any,
  name: str,
  aliases: Mapping[int, int] | None = None,
) -> Any:
  """`pl.pallas_call` on whole arrays.

  Args:
    kernel: Takes the problem, then the refs.
    problem: What is computed.
    grid: Programs; up to three axes.
    inputs, out_shape: Arrays in, and what comes out.
    num_warps, num_stages: For Triton's compiler.
    interpret: For `pallas_call`.
    name: What profilers show.
    aliases: Input -> output that begins as this input.
  """
  bound = functools.partial(kernel, problem)
  # Its address in the compiler's messages and in profiles.
  bound.__name__ = name  # type: ignore[attr-defined]
  with warnings.catch_warnings():
    # JAX 0.11 deprecated Pallas-Triton for Mosaic-GPU, which older chips
    # lack. Code that JAX compiles later, outside this call, still warns.
    warnings.filterwarnings(
      "ignore", "The Pallas Triton backend", DeprecationWarning
    )
    return pl.pallas_call(
      bound,
      grid=tuple(grid),
      out_shape=tuple(out_shape),
      compiler_params=plgpu.CompilerParams(
        num_warps=num_warps, num_stages=num_stages
      ),
      interpret=interpret,
      name=name,
      input_output_aliases=dict(aliases or {}),
    )(*inputs)
