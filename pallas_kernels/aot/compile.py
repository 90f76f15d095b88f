"""Compiles any function for a chip that is not there."""

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels import platform
from pallas_kernels.aot import targets


class DoesNotCompile(RuntimeError):
  """The compiler refused; the message is a short reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What a program that compiled needs on one device.

  Attributes:
    chip: What it was compiled for.
    argument_bytes: Arguments, as the device lays them out.
    output_bytes: Results.
    temp_bytes: Device memory of everything in between.
    code_bytes: Machine code; 0 on GPUs, whose compiler does not tell.
    seconds: Time of tracing and compiling.
    kernels: Pallas kernels it calls, as "name (grid)", in order.
  """

  chip: str
  argument_bytes: int
  output_bytes: int
  temp_bytes: int
  code_bytes: int
  seconds: float
  kernels: tuple[str, ...]


@contextlib.contextmanager
def tracing_for(target: targets.Chip) -> Iterator[None]:
  """Kernels chosen and traced inside are for this chip.

  Raises:
    CompilerMissing: Its compiler is not installed.
  """
  device = targets.device(target)
  mesh = jax.sharding.Mesh(np.array([device]), ("device",))
  with (
    platform.compiling_for(target.platform),
    # Tells Pallas, and who chooses tiles, which one it is.
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
  ):
    yield


def compile_for(
  chip: str, fn: Callable[..., Any], *abstract_args: Any
) -> Report:
  """Compiles `fn` with the compiler of a chip that need not be there.

  Kernels are traced as for that chip: operations of `pallas_kernels` choose
  their implementation for it. Nothing runs.

  Args:
    chip: "v4", "v5e", "v5p", "v6e" or "tpu7x" (also "7x"); "sm_80", "sm_90" or
      "sm_100".
    fn: A function that `jax.jit` takes.
    *abstract_args: Pytrees of arrays or `jax.ShapeDtypeStruct`; only shapes
      and dtypes matter.

  Returns:
    Memory and time. All on one device, whatever sharding the arguments have.

  Raises:
    ValueError: There is no chip of that name.
    CompilerMissing: Its compiler is not installed.
    DoesNotCompile: The compiler refuses the program, for instance because a
      tile does not fit into the chip's memory.
  """
  target = targets.find(chip)
  device = targets.device(target)
  sharding = jax.sharding.SingleDeviceSharding(device)

  def place(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding
    )

  arguments = jax.tree.map(place, abstract_args)

  # A function of its own, or `jit` would return what it once traced for
  # another chip.
  @functools.wraps(fn)
  def fresh(*args: Any) -> Any:
    return fn(*args)

  language = "cuda" if target.platform == "gpu" else "tpu"
  start = time.perf_counter()
  with tracing_for(target):
    traced = jax.jit(fresh).trace(*arguments)
    kernels = tuple(_kernels(traced.jaxpr.jaxpr))
    try:
      lowered = traced.lower(lowering_platforms=(language,))
      _one_gpu_a_process(target, lowered)
      compiled = lowered.compile()
    except (RuntimeError, ValueError, NotImplementedError) as error:
      if isinstance(error, _WrongProcess):
        raise
      if _lacks_cuda(str(error)):
        raise targets.cuda_missing(target) from error
      raise DoesNotCompile(short_reason(str(error))) from error
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  if memory is None:
    raise AssertionError(f"the compiler of {chip} must tell memory sizes")
  return Report(
    chip=target.name,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    code_bytes=memory.generated_code_size_in_bytes,
    seconds=seconds,
    kernels=kernels,
  )


class _WrongProcess(RuntimeError):
  pass


# The first GPU that this process compiled a Mosaic GPU kernel for.
_mosaic_gpu_chips: list[str] = []


def _one_gpu_a_process(
  target: targets.Chip, lowered: jax.stages.Lowered
) -> None:
  """Refuses what would return another chip's kernel.

  JAX's Mosaic GPU keeps compiled kernels by their text, which does not hold
  the chip: a Hopper kernel then "compiles" for Blackwell.
  """
  if target.platform != "gpu" or "mosaic_gpu" not in lowered.as_text():
    return
  if not _mosaic_gpu_chips:
    _mosaic_gpu_chips.append(target.name)
  if _mosaic_gpu_chips[0] != target.name:
    raise _WrongProcess(
      "Mosaic GPU kernels compile for one chip in a process; this one has "
      f"compiled for {_mosaic_gpu_chips[0]}. Start another for {target.name}."
    )


def _kernels(jaxpr: Any) -> Iterator[str]:
  """Pallas kernels of a program, also those of the programs it calls."""
  for equation in jaxpr.eqns:
    # `pallas_call`, and what `pallas.mosaic_gpu.kernel` becomes.
    if equation.primitive.name in ("pallas_call", "mpmd_map", "core_map"):
      params = equation.params
      places = (params.get("grid_mapping"), *params.get("meshes", ()))
      grids = [tuple(getattr(place, "grid", ())) for place in places]
      grid = next(filter(None, grids), ())
      name = params.get("name") or "kernel"
      yield f"{name} ({' x '.join(map(str, grid))})"
      continue
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from _kernels(inner)


def _lacks_cuda(message: str) -> bool:
  signs = (
    "libdevice not found",
    "No PTX compilation provider",
    "Error loading CUDA libraries",
  )
  return any(sign in message for sign in signs)


def short_reason(message: str) -> str:
  """One line of what compilers say in pages.

  Memory that does not fit is named in words, with the sizes.
  """
  text = " ".join(message.split())
  for pattern, words in _REASONS:
    found = re.search(pattern, text, re.IGNORECASE)
    if found:
      return words.format(*found.groups())
  # Compilers begin with a code of their own: "INTERNAL: ".
  text = re.sub(r"^[A-Z_]+: ", "", text)
  return text if len(text) <= 200 else text[:197] + "..."


_SIZE = r"([\d.]+[KMGT]?)"
_REASONS = (
  (
    rf"Scoped allocation with size {_SIZE} and limit {_SIZE} exceeded scoped"
    " vmem limit",
    "VMEM exceeded: a kernel needs {0}, its limit is {1}. Take smaller tiles.",
  ),
  (
    r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)"
    r"[^|]*?space=vmem",
    "VMEM exceeded: one buffer has {0} bytes, all of it {1}. Take smaller "
    "tiles.",
  ),
  (
    r"Allocation \(size=(\d+)\) would exceed memory \(size=(\d+)\)"
    r"[^|]*?space=smem",
    "SMEM exceeded: one table has {0} bytes, all of it {1}. Take larger tiles:"
    " the work lists get shorter.",
  ),
  (
    rf"memory space vmem\. Used {_SIZE} of {_SIZE} vmem",
    "VMEM exceeded: the program needs {0}, all of it has {1}. Take smaller "
    "tiles.",
  ),
  (
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    "HBM exceeded: temporaries need {0}, there is {1}.",
  ),
  (
    r"Shared memory size limit exceeded: requested (\d+), available: (\d+)",
    "shared memory exceeded: a kernel needs {0} bytes, its limit is {1}. Take "
    "smaller tiles.",
  ),
  (
    r"exceeds available shared memory: smem_bytes=(\d+) > "
    r"max_smem_bytes=(\d+)",
    "shared memory exceeded: a kernel needs {0} bytes, its limit is {1}. Take "
    "smaller tiles.",
  ),
)
