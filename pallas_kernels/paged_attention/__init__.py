"""Attention of a few queries over caches whose pages belong to one KV head."""

from pallas_kernels.paged_attention.api import (
  paged_attention as paged_attention,
)
from pallas_kernels.paged_attention.table import PageTable as PageTable
