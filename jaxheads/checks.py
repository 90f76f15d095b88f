"""Checks of what arrays hold, for programs under `jax.jit`."""

from pallas_kernels.value_checks import value_checks as value_checks
