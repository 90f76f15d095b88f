"""Compiles for TPUs and GPUs that are not here.

`compile_for` takes any function and says what it needs on a chip; `python -m
pallas_kernels.aot` asks about head attention.
"""

from pallas_kernels.aot.compile import DoesNotCompile as DoesNotCompile
from pallas_kernels.aot.compile import Report as Report
from pallas_kernels.aot.compile import compile_for as compile_for
from pallas_kernels.aot.targets import CHIP_NAMES as CHIP_NAMES
from pallas_kernels.aot.targets import CompilerMissing as CompilerMissing
