"""Where the bytes of one device go."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Bytes of one device while a program runs.

  Attributes:
    arguments: By what they are, as their shapes say.
    padding: What their layout on the device adds to that.
    new_outputs: Results that are not written over arguments.
    temporaries: All that lives in between, at the worst moment: gradients,
      activations, gathered parameters.
    code: Machine code.
    heap: What the compiler counts of temporaries. More than lives at once, as
      programs fit for which arguments and heap would be too much. In no sum.
  """

  arguments: Mapping[str, int]
  padding: int
  new_outputs: int
  temporaries: int
  code: int
  heap: int

  @property
  def total(self) -> int:
    """What the program needs."""
    return (
      sum(self.arguments.values())
      + self.padding
      + self.new_outputs
      + self.temporaries
      + self.code
    )

  def by_category(self) -> dict[str, int]:
    """All parts by name."""
    rest = {
      "padding": self.padding,
      "new outputs": self.new_outputs,
      "temporaries": self.temporaries,
      "code": self.code,
    }
    return {**self.arguments, **{name: n for name, n in rest.items() if n}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TooLarge:
  """What the compiler says of a program that does not fit.

  Attributes:
    arguments: As of `Memory`.
    used: What it needs.
    limit: What the device has, without what the system keeps.
  """

  arguments: Mapping[str, int]
  used: float
  limit: float


def bytes_per_device(tree: Any) -> int:
  """Of arrays, or their shapes, each with a sharding; the largest part."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def measure(compiled: jax.stages.Compiled, parts: Mapping[str, Any]) -> Memory:
  """What a program needs, as its compiler says.

  Args:
    compiled: The program.
    parts: All of its arguments, by what they are.
  """
  stats = compiled.memory_analysis()
  if stats is None:
    raise AssertionError("the compiler must tell memory sizes")
  arguments = {name: bytes_per_device(part) for name, part in parts.items()}
  new_outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
  kept = stats.argument_size_in_bytes + new_outputs
  return Memory(
    arguments=arguments,
    padding=stats.argument_size_in_bytes - sum(arguments.values()),
    new_outputs=new_outputs,
    temporaries=max(0, stats.peak_memory_in_bytes - kept),
    code=stats.generated_code_size_in_bytes,
    heap=stats.temp_size_in_bytes,
  )


def too_large(message: str, parts: Mapping[str, Any]) -> TooLarge | None:
  """What an error of the compiler says of memory; None if something else."""
  for pattern in (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)",
  ):
    found = re.search(pattern, message, re.IGNORECASE)
    if found:
      used, limit = (
        float(number) * _UNITS[unit.upper()]
        for number, unit in (found.groups()[:2], found.groups()[2:])
      )
      arguments = {name: bytes_per_device(part) for name, part in parts.items()}
      return TooLarge(arguments=arguments, used=used, limit=limit)
  return None
