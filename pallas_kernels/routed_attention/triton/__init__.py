"""Routed attention on GPUs: the Triton kernels of head attention, packed."""

from pallas_kernels.routed_attention.triton.implementation import (
  backward as backward,
)
from pallas_kernels.routed_attention.triton.implementation import (
  forward as forward,
)
from pallas_kernels.routed_attention.triton.implementation import (
  refusal as refusal,
)
