"""Head attention on GPUs, by Pallas Triton kernels."""

from pallas_kernels.head_attention.triton.implementation import (
  backward as backward,
)
from pallas_kernels.head_attention.triton.implementation import (
  forward as forward,
)
from pallas_kernels.head_attention.triton.implementation import (
  refusal as refusal,
)
