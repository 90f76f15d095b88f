"""Attention whose heads see a part of the context each."""

from typing import Any

from jaxheads.nn._attention import HeadAttention
from pallas_kernels.head_attention import HeadContexts


class S2Attention(HeadAttention):
  """Multi-head attention in which each head sees its own part of the context.

  `HeadAttention` that must be told its `pattern`; what no head of it sees
  costs nothing. Give `moh` too, and each token also picks its heads.

  The pattern counts blocks from the first key of the sequence: in decoding
  from the start of the cache, in packed sequences from the start of the row.
  The cache keeps every key, and the pattern masks by position.

  `mask`, dropout and `sow_weights` need all attention weights at once: they
  work while these fit into a gibibyte, and are refused beyond.

  Example:
    >>> pattern = s2.strided(8, local_blocks=8, vertical_stride=8)
    >>> layer = S2Attention(8, 512, pattern=pattern, rngs=nnx.Rngs(0))
    >>> layer(x).shape  # Causal, because the pattern is.
    (1, 8192, 512)

  Source:
    S2-Attention, https://arxiv.org/abs/2407.17678.
  """

  def __init__(self, *sizes: Any, pattern: HeadContexts, **options: Any):
    """As `HeadAttention`.

    Args:
      *sizes: `num_heads`, `in_features` and the further sizes.
      pattern: What each head sees; see `jaxheads.s2`.
      **options: All others.
    """
    super().__init__(*sizes, pattern=pattern, **options)
