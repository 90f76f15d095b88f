"""Attention of packed queries over dense keys and values."""

from pallas_kernels.routed_attention.api import (
  routed_attention as routed_attention,
)
