"""Heads with a context each, through the kernels or as one dense mask."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxheads.moh._execution import combine_heads
from jaxheads.sharding import constrain, context, per_device, spec
from jaxheads.sharding.partition import heads_index, local_patterns
from pallas_kernels.head_attention import HeadContexts, head_attention
from pallas_kernels.head_attention.cases import Case, Part, attend_case
from pallas_kernels.head_attention.reference import visible

# Attention weights up to which `mask`, dropout and sowing may take the dense
# way: a gibibyte in float32.
_MOST_DENSE_WEIGHTS = 2**28


class _Operands(NamedTuple):
  """Arrays of which each device has a part."""

  q: Float[Array, "B T N H"]
  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K H"]
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: Int[Array, "B S"] | None
  q_offset: Int[Array, ""]  # Not used where it is static.


_SPECS = _Operands(
  spec("batch", None, "heads", None),
  spec("batch", None, "kv_heads", None),
  spec("batch", None, "kv_heads", None),
  spec("batch", None),
  spec("batch", None),
  spec(),
)


def patterned_attention(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  w_o: Float[Array, "N H Dout"],
  gates: Float[Array, "B T N"] | None,
  pattern: HeadContexts,
  is_causal: bool,
  q_offset: Int[Array, ""] | int,
  q_segment_ids: Int[Array, "B T"] | None,
  kv_segment_ids: Int[Array, "B S"] | None,
  implementation: str | None,
  balanced: bool | None = None,
  active: Bool[Array, "B T N"] | None = None,
  num_active: int | None = None,
) -> Float[Array, "B T Dout"]:
  """Sum over heads of gate x attention x output projection, without bias.

  Every head is computed, each over what the pattern lets it see.

  Args:
    q: Finished queries.
    k, v: Finished keys and values of all tokens.
    w_o: Output projection.
    gates: Weight of each head for each token; `None` means 1.
    pattern: What each head sees.
    is_causal: Hide later keys also where the pattern does not.
    q_offset: Index, among the keys, of the first query.
    q_segment_ids, kv_segment_ids: Both or neither.
    implementation: See `pallas_kernels.head_attention.head_attention`.
    balanced: The order of tokens that are split over devices, see
      `jaxheads.sharding.context`; `None` gathers them.
    active, num_active: Heads to compute, of tokens that are split.
  """
  if 0 in (*q.shape[:2], k.shape[1]):  # Nothing to compute.
    return jnp.zeros((*q.shape[:2], w_o.shape[-1]), q.dtype)
  q, k, v = nnx.nn.dtypes.promote_dtype((q, k, v), dtype=None)
  pattern = pattern.with_causality(is_causal)
  if balanced is not None:
    out = context.attend(
      q,
      k,
      v,
      pattern=pattern,
      balanced=balanced,
      q_segment_ids=q_segment_ids,
      kv_segment_ids=kv_segment_ids,
      active=active,
      num_active=num_active,
      implementation=implementation,
    )
    return combine_heads(out, gates, w_o).astype(out.dtype)
  static = None if isinstance(q_offset, jax.Array) else q_offset
  run = functools.partial(
    _run,
    pattern=pattern,
    q_offset=static,
    implementation=implementation,
  )
  out = per_device(
    run,
    _Operands(
      q,
      k,
      v,
      q_segment_ids,
      kv_segment_ids,
      jnp.asarray(q_offset, jnp.int32),
    ),
    _SPECS,
    _SPECS.q,
    batch_size=q.shape[0],
    num_kv_heads=k.shape[2],
  )
  out = constrain(out, "batch", "length", "heads", None)
  return combine_heads(out, gates, w_o).astype(out.dtype)


def _run(
  operands: _Operands,
  *,
  pattern: HeadContexts,
  q_offset: int | None,
  implementation: str | None,
) -> Float[Array, "B T n H"]:
  q, k, v = operands[:3]
  segments = operands.q_segment_ids, operands.kv_segment_ids
  patterns = local_patterns(pattern, q.shape[2])
  if len(set(patterns)) == 1:
    return head_attention(
      q,
      k,
      v,
      pattern=patterns[0],
      q_offset=operands.q_offset if q_offset is None else q_offset,
      q_segment_ids=segments[0],
      kv_segment_ids=segments[1],
      implementation=implementation,
    )
  if q_offset is None:  # Nobody trains with an offset that is traced.
    return jax.lax.switch(
      heads_index(),
      [
        functools.partial(
          _run, pattern=local, q_offset=None, implementation=implementation
        )
        for local in patterns
      ],
      operands,
    )
  queries, keys = (0, q.shape[1]), (0, k.shape[1])
  return attend_case(
    q,
    ((k, v),),
    cases=tuple(
      Case(((queries, (Part(0, keys, local, q_offset),)),))
      for local in patterns
    ),
    which=heads_index(),
    q_segment_ids=segments[0],
    kv_segment_ids=None if segments[1] is None else (segments[1],),
    implementation=implementation,
  )


def dense_mask(
  pattern: HeadContexts,
  mask: Bool[Array, "#B #N #T S"] | None,
  *,
  shape: tuple[int, int, int],
  q_offset: Int[Array, ""] | int,
  why: str,
) -> Any:
  """The pattern as a token mask [1 or B, N, T, S], together with `mask`.

  Args:
    pattern: What each head sees.
    mask: A further mask, or None.
    shape: B, T and S.
    q_offset: Index, among the keys, of the first query.
    why: The argument that needs the weights, for the message.
  Raises:
    ValueError: That many weights would not fit.
  """
  batch, length, kv_length = shape
  weights = batch * pattern.num_heads * length * kv_length
  if weights > _MOST_DENSE_WEIGHTS:
    raise ValueError(
      f"{why} needs every attention weight of a layer with a `pattern` at "
      f"once, and that is {weights:,} of them, more than "
      f"{_MOST_DENSE_WEIGHTS:,}. Leave it out, or use shorter sequences or "
      "smaller batches; `segment_ids` and `token_mask` need none of this."
    )
  seen = visible(pattern, jnp.arange(length) + q_offset, kv_length)[None]
  return seen if mask is None else seen & mask.astype(bool)
