"""Routed attention in plain XLA."""

from pallas_kernels.routed_attention.xla.implementation import (
  backward as backward,
)
from pallas_kernels.routed_attention.xla.implementation import (
  forward as forward,
)
from pallas_kernels.routed_attention.xla.implementation import (
  refusal as refusal,
)
