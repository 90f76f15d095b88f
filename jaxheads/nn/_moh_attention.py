"""Attention whose heads are routed."""

from typing import Any

from jaxheads.moh import MoHConfig
from jaxheads.nn._attention import HeadAttention


class MoHAttention(HeadAttention):
  """Multi-head attention in which each token picks its heads.

  `HeadAttention` that must be told its `moh`; `None` is plain multi-head
  attention.

  Source:
    MoH, https://arxiv.org/abs/2410.11842.
  """

  def __init__(self, *sizes: Any, moh: MoHConfig | None, **options: Any):
    """As `HeadAttention`.

    Args:
      *sizes: `num_heads`, `in_features` and the further sizes.
      moh: Which heads are shared and how many are picked.
      **options: All others.
    """
    super().__init__(*sizes, moh=moh, **options)
