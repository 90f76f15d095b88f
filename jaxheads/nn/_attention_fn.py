"""Patterns for the attention module that Flax brings."""

import dataclasses
from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.head_attention import HeadContexts, head_attention


def attention_fn(
  pattern: HeadContexts, *, implementation: str | None = None
) -> Callable[..., Array]:
  """An `attention_fn` for `nnx.MultiHeadAttention` that follows a pattern.

  Grouped queries work. What Flax passes along and a pattern cannot honour is
  refused: `mask` and `bias` (hence also Flax's decoding, which masks the
  unfilled cache), active dropout, sowing the weights, `precision`. For all of
  these but the last take `jaxheads.nn.S2Attention`.

  Args:
    pattern: What each head sees. If it is causal, attention is, also without
      `is_causal`.
    implementation: See `jaxheads.attention`.

  Returns:
    A hashable function (query [*batch, T, N, H], key [*batch, S, K, H],
    value [*batch, S, K, Hv], ...) to [*batch, T, N, Hv].

  Example:
    >>> pattern = s2.strided(8, local_blocks=8, vertical_stride=8)
    >>> nnx.MultiHeadAttention(
    ...   8, 512, attention_fn=attention_fn(pattern), decode=False,
    ...   rngs=nnx.Rngs(0),
    ... )
  """
  return _PatternedAttentionFn(pattern, implementation)


@dataclasses.dataclass(frozen=True)
class _PatternedAttentionFn:
  """Equal patterns make equal functions, so Flax's graphs compare equal."""

  pattern: HeadContexts
  implementation: str | None

  def __call__(
    self,
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K Hv"],
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nnx.Module | None = None,
    is_causal: bool = False,
    **others: Any,
  ) -> Float[Array, "*batch T N Hv"]:
    del broadcast_dropout, dropout_rng
    refused = {
      "bias": bias is not None,
      "mask": mask is not None,
      "dropout_rate": dropout_rate > 0 and not deterministic,
      "sow_weights": module is not None,
      "precision": precision is not None,
    } | {name: other is not None for name, other in others.items()}
    for name, given in refused.items():
      if given:
        raise ValueError(f"`{name}` {_WAY_OUT.get(name, _UNKNOWN)}")
    query, key, value = nnx.nn.dtypes.promote_dtype(
      (query, key, value), dtype=dtype
    )
    batch_shape = query.shape[:-3]
    q, k, v = (
      array.reshape(-1, *array.shape[-3:]) for array in (query, key, value)
    )
    out = head_attention(
      q,
      k,
      v,
      pattern=self.pattern.with_causality(is_causal),
      q_offset=0,
      implementation=self.implementation,
    )
    return out.reshape(*batch_shape, *out.shape[1:])


_UNKNOWN = "cannot be used with a pattern."
_WAY_OUT = {
  "bias": "cannot be added to the logits of a pattern; leave it out.",
  "mask": (
    "cannot be joined with a pattern in `nnx.MultiHeadAttention`, which also "
    "masks its cache while decoding. Leave it out (the causal mask is the "
    "pattern's own), or use `jaxheads.nn.S2Attention`, which takes masks, "
    "packed sequences and a cache."
  ),
  "dropout_rate": (
    "above 0 needs the attention weights, which a pattern's kernels never "
    "store. Use 0 or `deterministic=True`, or `jaxheads.nn.S2Attention`."
  ),
  "sow_weights": (
    "needs the attention weights, which a pattern's kernels never store. Use "
    "False, or `jaxheads.nn.S2Attention`."
  ),
  "precision": (
    "must be None: logits and sums are float32, and products follow "
    "`jax.default_matmul_precision`."
  ),
}
