"""What the devices of a compiled program send to each other."""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxheads.planning.hlo import Program, Visit

Groups = tuple[tuple[int, ...], ...]

_KINDS = (
  "all-gather",
  "all-reduce",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_CONTINUED = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """One collective operation of a program.

  Attributes:
    kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all",
      "collective-permute" or, from hand-written programs, another of XLA's.
    axes: Mesh axes that it is over, joined by "+".
    group_size: Devices that exchange with each other.
    operand: What each of them gives, as "bf16[1,512,512]".
    operand_bytes: Its size.
    sent_bytes: What one device sends each time, at the least: a device of n
      gives n - 1 others its part (all-gather), gets the sum of a part of n
      (reduce-scatter: so it sends what is not its part), both (all-reduce),
      keeps one part of n (all-to-all), or sends all (permute).
    times: How often it runs in one run of the program.
    source: Name of the operation in the traced program.
    name: Of the instruction.
  """

  kind: str
  axes: str
  group_size: int
  operand: str
  operand_bytes: int
  sent_bytes: float
  times: int
  source: str
  name: str

  @property
  def total_bytes(self) -> float:
    """Sent by one device in one run of the program."""
    return self.sent_bytes * self.times


def collectives(
  program: Program, mesh_shape: Mapping[str, int]
) -> tuple[Collective, ...]:
  """All collective operations of a program, in order; asynchronous ones once.

  Args:
    program: Compiled for the devices of a mesh.
    mesh_shape: Sizes of its axes, in order.
  Raises:
    ValueError: The devices of an operation are written in an unknown way.
  """
  found = []
  for visit in program.visits():
    kind = _kind(visit)
    if kind is None:
      continue
    instruction = visit.instruction
    operands = [
      array
      for operand in program.operands(visit)
      for array in operand.results[: _parts(operand.opcode)]
    ]
    size = sum(array.num_bytes for array in operands)
    if instruction.opcode.startswith("collective-permute"):
      pairs = _pairs(instruction.attributes)
      axes = _axes(pairs, mesh_shape)
      count = 2
      moves = any(source != target for source, target in pairs)
      sent = float(size if moves else 0)
    else:
      groups = replica_groups(
        instruction.attributes, math.prod(mesh_shape.values())
      )
      axes = _axes(groups, mesh_shape)
      count = len(groups[0])
      sent = size * _SENT[kind](count)
    found.append(
      Collective(
        kind=kind,
        axes="+".join(axes),
        group_size=count,
        operand=", ".join(
          f"{array.dtype}[{','.join(map(str, array.shape))}]"
          for array in operands
        ),
        operand_bytes=size,
        sent_bytes=sent,
        times=visit.times,
        source=instruction.text("op_name") or "",
        name=instruction.name,
      )
    )
  return tuple(found)


def by_kind_and_axes(
  found: Iterable[Collective],
) -> dict[tuple[str, str], float]:
  """Bytes that one device sends, summed."""
  sums: dict[tuple[str, str], float] = defaultdict(float)
  for collective in found:
    if collective.total_bytes:
      sums[collective.kind, collective.axes] += collective.total_bytes
  return dict(sorted(sums.items()))


def replica_groups(attributes: str, num_devices: int) -> Groups:
  """Which devices exchange with each other.

  XLA writes them as a list, as a transposed iota, or as axes of a mesh, which
  may be transposed too: {{0,2},{1,3}}, [2,2]<=[2,2]T(1,0), mesh['a'=2,'b'=2]
  {'a'}, mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}.

  Raises:
    ValueError: As none of these.
  """
  iota = re.search(rf"replica_groups=\[([\d,]+)\]<={_IOTA}", attributes)
  if iota:
    return _rows(_iota(iota[2], iota[3]).reshape(_numbers(iota[1])))
  mesh = re.search(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? "
    r"\{([^}]*)\}",
    attributes,
  )
  if mesh and ":" not in mesh[4]:  # Which would be a part of an axis.
    sizes = {
      name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])
    }
    ids = _iota(mesh[2] or str(math.prod(sizes.values())), mesh[3])
    return _groups_of_axes(ids, sizes, re.findall(r"'([^']+)'", mesh[4]))
  listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes)
  if listed:
    groups = tuple(
      tuple(_numbers(text)) for text in re.findall(r"\{([\d,]+)\}", listed[1])
    )
    return groups or (tuple(range(num_devices)),)
  raise ValueError(f"no replica groups that can be read: {attributes[:200]!r}")


# Of what a device gives, the part that it sends, by the size of the group.
_SENT = {
  "all-gather": lambda n: n - 1,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "reduce-scatter": lambda n: (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "collective-broadcast": lambda n: 1,
}


def _kind(visit: Visit) -> str | None:
  """What an instruction is, if it begins a collective operation."""
  instruction, computation = visit.instruction, visit.computation
  kind = instruction.opcode.removesuffix("-start")
  if kind not in _KINDS:
    return None
  # A TPU's operation that goes on beside others is in all of their fusions;
  # the first of them only starts it.
  if _CONTINUED.search(instruction.attributes):
    return None
  if visit.in_fusion and computation.name.startswith("all-reduce-scatter"):
    # The fusion keeps this device's part of the sum.
    return "reduce-scatter"
  return kind


def _parts(opcode: str) -> int | None:
  """How many arrays of an operand's tuple are meant; `None` is all."""
  return None if opcode != "copy-start" else 1


def _axes(
  groups: Sequence[Sequence[int]], mesh: Mapping[str, int]
) -> list[str]:
  """Mesh axes along which the devices of a group differ."""
  places = np.array(np.unravel_index(np.array(groups), tuple(mesh.values())))
  # [axes, groups, devices of a group]
  differ = (places != places[..., :1]).any(axis=(1, 2))
  named = [name for name, d in zip(mesh, differ, strict=True) if d]
  return named or ["none"]


def _iota(dims: str, order: str | None) -> np.ndarray:
  """0, 1, ... in these sizes, its axes then in that order."""
  sizes = _numbers(dims)
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose(_numbers(order)) if order else ids


def _groups_of_axes(
  ids: np.ndarray, sizes: Mapping[str, int], names: Sequence[str]
) -> Groups:
  """Of the devices `ids` of a mesh of these sizes."""
  axes = list(sizes)
  inner = [axes.index(name) for name in names]
  outer = [n for n in range(len(axes)) if n not in inner]
  width = math.prod(sizes[name] for name in names)
  placed = ids.reshape(tuple(sizes.values()))
  return _rows(placed.transpose(*outer, *inner).reshape(-1, width))


def _pairs(attributes: str) -> Groups:
  listed = re.search(
    r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes
  )
  if listed is None:
    raise ValueError(f"no pairs of devices: {attributes[:200]!r}")
  return tuple(
    tuple(_numbers(text)) for text in re.findall(r"\{([\d,]+)\}", listed[1])
  )


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]


def _rows(table: np.ndarray) -> Groups:
  return tuple(tuple(int(n) for n in row) for row in table)
