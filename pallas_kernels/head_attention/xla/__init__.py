"""Head attention in plain XLA, on every platform."""

from pallas_kernels.head_attention.xla.implementation import (
  backward as backward,
)
from pallas_kernels.head_attention.xla.implementation import forward as forward
from pallas_kernels.head_attention.xla.implementation import refusal as refusal
