"""Routed attention on GPUs from Hopper on, by Pallas Mosaic GPU kernels."""

from pallas_kernels.routed_attention.mosaic_gpu.implementation import (
  backward as backward,
)
from pallas_kernels.routed_attention.mosaic_gpu.implementation import (
  forward as forward,
)
from pallas_kernels.routed_attention.mosaic_gpu.implementation import (
  refusal as refusal,
)
