"""What one device computes and moves in one run of a compiled program.

Loops count as often as they run. Of kernels written by hand the text tells only
which they are and what they take and give.
"""

import math
import re
from collections import Counter

import numpy as np

from jaxheads.planning.hlo import (
  Array,
  Computation,
  Instruction,
  Program,
  Visit,
  total,
)

# They name or group values, or wait for them.
_FREE = frozenset(
  (
    "parameter constant tuple get-tuple-element bitcast while conditional call "
    "opt-barrier optimization-barrier after-all partition-id replica-id iota"
  ).split()
)
_KERNEL = "tpu_custom_call"


def matmul_flops(program: Program) -> float:
  """Of all matrix products: two for a multiplication and an addition."""
  return total(program.visits(), lambda visit: _flops(program, visit))


def hbm_bytes(program: Program) -> float:
  """What is read from and written to the main memory, at the least.

  Each instruction, or fusion of some, reads its operands and writes its
  results, of slices only the slice; what the compiler keeps in a faster memory
  is left out.
  """
  return total(program.visits(), lambda visit: _traffic(program, visit))


def kernels(program: Program) -> dict[str, int]:
  """Kernels written by hand, and how often each runs."""
  found: Counter[str] = Counter()
  for visit in program.visits():
    if visit.instruction.text("custom_call_target") == _KERNEL:
      found[_kernel_name(visit.instruction)] += visit.times
  return dict(found)


def _kernel_name(instruction: Instruction) -> str:
  # XLA names the instruction after the kernel and numbers those that repeat.
  return re.sub(r"(\.(clone|remat)?\d*)+$", "", instruction.name)


def _flops(program: Program, visit: Visit) -> float:
  instruction = visit.instruction
  if instruction.opcode == "dot":
    left = program.operands(visit)[0].results[0].shape
    dims = re.search(
      r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes
    )
    contracted = dims[1].split(",") if dims and dims[1] else []
    size = math.prod(left[int(dim)] for dim in contracted)
    return 2.0 * size * math.prod(instruction.results[0].shape)
  if instruction.opcode == "convolution":
    return _convolution_flops(program, visit)
  return 0.0


def _convolution_flops(program: Program, visit: Visit) -> float:
  """As XLA counts: only positions that meet an element and no padding."""
  instruction = visit.instruction
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
  assert labels is not None
  left, right = (operand.results[0] for operand in program.operands(visit))
  out = instruction.results[0]
  sizes = [
    dict(zip(names, array.shape, strict=True))
    for names, array in zip(labels.groups(), (left, right, out), strict=True)
  ]
  flops = 2.0 * sizes[1]["i"] * sizes[2]["b"] * sizes[2]["f"]
  spatial = sorted(set(labels[1]) - {"b", "f"})
  window = _window(instruction.attributes, len(spatial))
  for dim, (stride, pad, dilate_left, dilate_right) in zip(
    spatial, window, strict=True
  ):
    at = (
      np.arange(sizes[2][dim])[:, None] * stride
      + np.arange(sizes[1][dim]) * dilate_right
      - pad
    )
    within = (at >= 0) & (at <= (sizes[0][dim] - 1) * dilate_left)
    flops *= int((within & (at % dilate_left == 0)).sum())
  return flops


def _window(attributes: str, count: int) -> list[tuple[int, int, int, int]]:
  """Stride, padding in front and both dilations of each spatial axis."""
  text = re.search(r"window=\{([^}]*)\}", attributes)

  def values(key: str, default: str) -> list[int]:
    found = re.search(rf"\b{key}=([\d_x\-]+)", text[1]) if text else None
    parts = found[1].split("x") if found else [default] * count
    return [int(part.split("_")[0]) for part in parts]

  return list(
    zip(
      values("stride", "1"),
      values("pad", "0_0"),
      values("lhs_dilate", "1"),
      values("rhs_dilate", "1"),
      strict=True,
    )
  )


def _traffic(program: Program, visit: Visit) -> float:
  instruction = visit.instruction
  opcode = instruction.opcode
  if (
    visit.in_fusion or opcode in _FREE or opcode.endswith(("-done", "-update"))
  ):
    return 0.0
  operands = program.operands(visit)
  if opcode == "fusion":
    (called,) = instruction.calls("calls")
    return _fusion_traffic(
      program, program.computations[called], operands, instruction.results
    )
  if opcode == "custom-call":
    # Others only name buffers.
    if instruction.text("custom_call_target") != _KERNEL:
      return 0.0
    return sum(map(_in_hbm, operands)) + _in_hbm(instruction)
  if opcode in ("dynamic-slice", "slice", "gather"):
    return min(_in_hbm(operands[0]), instruction.result_bytes) + _in_hbm(
      instruction
    )
  if opcode == "dynamic-update-slice":
    return 2.0 * min(operands[1].result_bytes, _in_hbm(operands[0]))
  if opcode.endswith("-start"):
    # Operand, or its slice, and what is made of it; the rest only says so.
    made = instruction.results[0 if opcode == "copy-start" else 1]
    read = sum(map(_in_hbm, operands))
    if opcode == "slice-start":
      read = min(read, made.num_bytes)
    return read + (made.num_bytes if made.space == 0 else 0)
  return sum(map(_in_hbm, operands)) + _in_hbm(instruction)


def _fusion_traffic(
  program: Program,
  fused: Computation,
  operands: tuple[Instruction, ...],
  results: tuple[Array, ...],
) -> float:
  moved = 0.0
  for number, operand in enumerate(operands):
    whole = _in_hbm(operand)
    if whole:
      moved += min(whole, _read(program, fused, number, whole)[0])

  def written(part: Instruction, result: Array) -> int:
    if part.opcode in ("bitcast", "reshape"):
      return written(fused.instructions[part.operands[0]], result)
    if part.opcode == "dynamic-update-slice":
      update = fused.instructions[part.operands[1]]
      return min(update.result_bytes, result.num_bytes)
    # What is passed through is written by nobody.
    return 0 if part.opcode == "parameter" else result.num_bytes

  root = fused.root
  parts = (
    [fused.instructions[name] for name in root.operands]
    if root.opcode == "tuple"
    else [root] * len(results)
  )
  for part, result in zip(parts, results, strict=False):
    if result.space == 0:
      moved += written(part, result)
  return moved


def _read(
  program: Program, fused: Computation, number: int, whole: int
) -> tuple[int, bool]:
  """What a fusion reads of its operand of that number and size.

  And whether it gives it on as it is.
  """

  def of_value(name: str) -> tuple[int, bool]:
    size, given_on = 0, name == fused.root.name
    for user in fused.instructions.values():
      if name not in user.operands:
        continue
      first = user.operands[0] == name
      if user.opcode in ("dynamic-slice", "slice", "gather") and first:
        size += user.result_bytes
      elif user.opcode == "dynamic-update-slice" and first:
        continue  # Changed in place.
      elif user.opcode in ("bitcast", "reshape"):
        more, same = of_value(user.name)
        size, given_on = size + more, given_on or same
      elif user.opcode == "fusion":
        (called,) = user.calls("calls")
        inner = program.computations[called]
        for place, operand in enumerate(user.operands):
          if operand != name:
            continue
          more, same = _read(program, inner, place, whole)
          size += more
          if same:
            more, same = of_value(user.name)
            size, given_on = size + more, given_on or same
      elif user.opcode != "tuple":  # Which only gives it on.
        return whole, given_on
    return size, given_on

  for instruction in fused.instructions.values():
    if instruction.opcode == "parameter" and number == int(
      instruction.attributes.split(")")[0]
    ):
      return of_value(instruction.name)
  return 0, False


def _in_hbm(instruction: Instruction) -> int:
  return sum(a.num_bytes for a in instruction.results if a.space == 0)
