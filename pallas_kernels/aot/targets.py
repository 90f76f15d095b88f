"""Chips that kernels are compiled for without being there."""

import dataclasses
import functools
import os
import pathlib

import jax
from jax.experimental import topologies

# What the CUDA compiler needs to know of a GPU, as GpuTargetConfig protos.
GPU_TARGETS = pathlib.Path(__file__).parent / "gpu_targets"

# All that a machine without a CUDA toolkit lacks. JAX's own extras would bring
# the libraries that only running needs, at several gigabytes.
_CUDA_WHEELS = (
  "jax-cuda13-plugin and jax-cuda13-pjrt of JAX's own version, "
  "nvidia-cuda-nvcc, nvidia-cuda-runtime and nvidia-nvvm"
)


class CompilerMissing(RuntimeError):
  """The compiler of a chip is not installed."""


@dataclasses.dataclass(frozen=True)
class Chip:
  """A chip to compile for.

  Attributes:
    name: What users call it.
    platform: "tpu" or "gpu", as in `pallas_kernels.platform`.
    topology: For a TPU, the smallest slice that its compiler knows; for a GPU,
      the product whose description is in `gpu_targets/`.
    target: Name of that description.
  """

  name: str
  platform: str
  topology: str
  target: str = ""


CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v4", "tpu", "v4:2x2x1"),
    Chip("v5e", "tpu", "v5e:2x2"),
    Chip("v5p", "tpu", "v5p:2x2x1"),
    Chip("v6e", "tpu", "v6e:2x2"),
    Chip("tpu7x", "tpu", "tpu7x:2x2x1"),
    Chip("sm_80", "gpu", "NVIDIA A100", "sm80_a100.pbtxt"),
    Chip("sm_90", "gpu", "NVIDIA H200", "sm90_h200.pbtxt"),
    Chip("sm_100", "gpu", "NVIDIA B200", "sm100_b200.pbtxt"),
  )
}
_ALIASES = {"7x": "tpu7x"}
CHIP_NAMES = (*CHIPS, *_ALIASES)


def find(name: str) -> Chip:
  """The chip of that name.

  Raises:
    ValueError: There is none.
  """
  chip = CHIPS.get(_ALIASES.get(name, name))
  if chip is None:
    listed = ", ".join(CHIP_NAMES)
    raise ValueError(f"`chip` must be one of {listed}, got {name!r}.")
  return chip


@functools.cache
def device(chip: Chip) -> jax.Device:
  """One device of that kind: programs compile for it and cannot run.

  Raises:
    CompilerMissing: A wheel is not installed; the message names it.
  """
  if chip.platform == "gpu":
    return _gpu(chip)
  # Read when the compiler is loaded. The first lets several processes load it;
  # the others keep it from asking the network which TPU this is.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  try:
    topology = topologies.get_topology_desc(
      platform="tpu", topology_name=chip.topology
    )
  except RuntimeError as error:
    if "not installed" not in str(error):
      raise
    raise CompilerMissing(
      f"The compiler for {chip.name} is the wheel `libtpu`: "
      "pip install 'jaxheads[aot]'."
    ) from None
  return topology.devices[0]


def _gpu(chip: Chip) -> jax.Device:
  text = (GPU_TARGETS / chip.target).read_text("utf-8")
  try:
    topology = topologies.get_topology_desc(
      platform="cuda",
      topology_name=chip.topology,
      topology="1x1x1",
      target_config=text,
    )
  except NotImplementedError:
    # JAX registers CUDA only where it finds all that running needs, or where
    # it is told not to run on it.
    raise cuda_missing(
      chip, "If they are installed: JAX_PLATFORMS=cpu."
    ) from None
  return topology.devices[0]


def cuda_missing(chip: Chip, hint: str = "") -> CompilerMissing:
  """The error for a CUDA compiler that is not there, or not all of it."""
  return CompilerMissing(
    f"The compiler for {chip.name} is the wheels {_CUDA_WHEELS}: "
    f"pip install 'jaxheads[aot]'. {hint}".rstrip()
  )
