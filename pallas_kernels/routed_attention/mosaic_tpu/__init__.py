"""Routed attention on TPUs: the kernels of head attention on packed rows."""

from pallas_kernels.routed_attention.mosaic_tpu.implementation import (
  backward as backward,
)
from pallas_kernels.routed_attention.mosaic_tpu.implementation import (
  forward as forward,
)
from pallas_kernels.routed_attention.mosaic_tpu.implementation import (
  refusal as refusal,
)
