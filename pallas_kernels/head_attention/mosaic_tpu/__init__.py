"""Head attention on TPUs, by Pallas Mosaic kernels."""

from pallas_kernels.head_attention.mosaic_tpu.implementation import (
  backward as backward,
)
from pallas_kernels.head_attention.mosaic_tpu.implementation import (
  forward as forward,
)
from pallas_kernels.head_attention.mosaic_tpu.settings import refusal as refusal
