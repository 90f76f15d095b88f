"""Heads with a context each, through the kernels or as one dense mask."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxheads.moh._execution import combine_heads
from jaxheads.sharding import per_device
from pallas_kernels.head_attention import HeadContexts, head_attention
from pallas_kernels.head_attention.reference import visible

# Attention weights up to which `mask`, dropout and sowing may take the dense
# way: a gibibyte in float32.
_MOST_DENSE_WEIGHTS = 2**28


class _Tokens(NamedTuple):
  """Arrays with a batch axis."""

  q: Float[Array, "B T N H"]
  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K H"]
  gates: Float[Array, "B T N"] | None
  q_segment_ids: Int[Array, "B T"] | None
  kv_segment_ids: Int[Array, "B S"] | None


class _Shared(NamedTuple):
  """Arrays that all sequences share."""

  w_o: Float[Array, "N H Dout"]
  q_offset: Int[Array, ""]  # Not used where it is static.


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
  """
  if 0 in (*q.shape[:2], k.shape[1]):  # Nothing to compute.
    return jnp.zeros((*q.shape[:2], w_o.shape[-1]), q.dtype)
  q, k, v = nnx.nn.dtypes.promote_dtype((q, k, v), dtype=None)
  tokens = _Tokens(q, k, v, gates, q_segment_ids, kv_segment_ids)
  static = None if isinstance(q_offset, jax.Array) else q_offset
  shared = _Shared(w_o, jnp.asarray(q_offset, jnp.int32))
  run = functools.partial(
    _run,
    pattern=pattern.with_causality(is_causal),
    q_offset=static,
    implementation=implementation,
  )
  return per_device(run, tokens, shared, batch_size=q.shape[0])


def _run(
  tokens: _Tokens,
  shared: _Shared,
  *,
  pattern: HeadContexts,
  q_offset: int | None,
  implementation: str | None,
) -> Float[Array, "B T Dout"]:
  out = head_attention(
    tokens.q,
    tokens.k,
    tokens.v,
    pattern=pattern,
    q_offset=shared.q_offset if q_offset is None else q_offset,
    q_segment_ids=tokens.q_segment_ids,
    kv_segment_ids=tokens.kv_segment_ids,
    implementation=implementation,
  )
  return combine_heads(out, tokens.gates, shared.w_o).astype(out.dtype)


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
