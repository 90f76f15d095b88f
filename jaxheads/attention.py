"""The one attention entry point: queries, keys, and what each head may see."""

from pallas_kernels.head_attention import head_attention as attention

__all__ = ["attention"]
