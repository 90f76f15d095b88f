"""Reads the TPU compiler's final schedule: how many cycles a loop body takes.

A TPU core issues one bundle of instructions a cycle, in an order that the
compiler has fixed. The bundles of straight-line code are therefore its cycles,
but for stalls that the schedule does not show (a full matrix unit, a late
copy): a lower bound, the same on every machine.

The compiler writes the schedule if LIBTPU_INIT_ARGS holds `dump_flags(folder)`
when it is loaded, once a process.
"""

import bisect
import dataclasses
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping

# Of some eighty texts a kernel, the two that are read here.
_PASSES = "final_bundles|final_hlo-static-per-bundle-utilization"

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_PLACE = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel\s*(?:\([^)]*\))?\s*target = \$region(\d+)")
_MATMUL = re.compile(r"= vmatmul\b")
_SELECT = re.compile(r"= vsel\b")


def dump_flags(folder: pathlib.Path) -> str:
  """Flags that make the TPU compiler write its schedules into `folder`."""
  return (
    f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    f"--xla_jf_dump_llo_pass_label_regex={_PASSES}"
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body:
  """Bundles between two ends of a branch; the counts leave out `inner`.

  The slots that follow a branch before it acts, at most four bundles, count
  with what it may skip.

  Attributes:
    kind: "kernel" (all of it), "loop", or "guard" (what a branch may skip).
    first, last: Addresses of its bundles.
    bundles: How many are its own.
    slots: Used slots of every unit ("MXU", "VALU", ...) in them.
    matmuls: Products that they start.
    selects: Vector selections in them: what masks are made of.
    inner: The bodies in it, in order.
  """

  kind: str
  first: int
  last: int
  bundles: int
  slots: Mapping[str, int]
  matmuls: int
  selects: int
  inner: tuple["Body", ...]

  def walk(self) -> Iterator["Body"]:
    """This body and all in it, in order."""
    yield self
    for body in self.inner:
      yield from body.walk()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """One kernel.

  Attributes:
    name: Of the kernel.
    capacity: Slots a bundle has for every unit.
    root: All of its code.
  """

  name: str
  capacity: Mapping[str, int]
  root: Body

  def tiles(self) -> list[Body]:
    """Bodies that hold matrix products themselves, in order."""
    return [body for body in self.root.walk() if body.matmuls]

  def step_bundles(self) -> int:
    """Bundles of a grid step besides its tile: what comes next, and copies.

    All that the loop over the grid holds around the tiles; what starts or ends
    an output tile is beside them.
    """
    inside = self._around_tiles()
    grid = next(body for body in self.root.inner if inside in body.walk())
    return (
      sum(body.bundles for body in grid.walk())
      - sum(body.bundles for body in inside.walk())
      + inside.bundles
    )

  def ends_bundles(self) -> int:
    """Bundles that start and end an output tile, once each."""
    return sum(
      each.bundles
      for body in self._around_tiles().inner
      if not any(each.matmuls for each in body.walk())
      for each in body.walk()
    )

  def occupancy(self, body: Body, unit: str) -> float:
    """Share of a unit's slots that a body uses."""
    return body.slots.get(unit, 0) / (self.capacity[unit] * body.bundles)

  def _around_tiles(self) -> Body:
    """The innermost body that holds all tiles."""
    count = len(self.tiles())
    holding = [
      body
      for body in self.root.walk()
      if sum(each.matmuls > 0 for each in body.walk()) == count
      and not body.matmuls
    ]
    return holding[-1]


def read_dump(folder: pathlib.Path, names: str) -> list[Schedule]:
  """Kernels that the compiler has written to a folder, in program order.

  Args:
    folder: See `dump_flags`.
    names: Regular expression that is found in the names that are wanted. JAX
      and the compiler add to the name that `pallas_call` got.
  """
  found = []
  for path in folder.glob("*-final_bundles.txt"):
    # TIME-NAME-PASS-final_bundles.txt; another text ends likewise.
    parts = re.fullmatch(r"\d+-(.*)-\d+-final_bundles\.txt", path.name)
    if not parts or not re.search(names, parts.group(1)):
      continue
    name = parts.group(1)
    (usage,) = (
      each
      for each in folder.glob("*-final_hlo-static-per-bundle-utilization.txt")
      if f"-{name}-" in each.name
    )
    found.append(parse(name, path.read_text(), usage.read_text()))
  return sorted(found, key=lambda schedule: _number(schedule.name))


def _number(name: str) -> int:
  """The compiler numbers the kernels of one name in program order."""
  suffix = name.rpartition(".")[2]
  return int(suffix) if suffix.isdigit() else 0


@dataclasses.dataclass
class _Bundle:
  address: int
  matmuls: int = 0
  selects: int = 0
  branches: list[int] = dataclasses.field(default_factory=list)


def parse(name: str, bundles: str, usage: str) -> Schedule:
  """One kernel from the texts of its final bundles and their utilization.

  Raises:
    ValueError: The texts are not what this reader knows: another compiler's.
  """
  capacity, rows = _read_usage(usage)
  code, places = _read_bundles(bundles)
  if len(code) != len(rows):
    raise ValueError(
      f"`usage` must have a row a bundle: {name} has {len(code)} bundles and "
      f"{len(rows)} rows."
    )
  spans = _spans(name, code, places)
  return Schedule(name=name, capacity=capacity, root=_nest(spans, code, rows))


def _read_usage(text: str) -> tuple[dict[str, int], list[Counter[str]]]:
  lines = text.strip().splitlines()
  if len(lines) < 4 or not lines[0].startswith("=="):
    raise ValueError("`usage` must begin with the units and their capacity.")
  units = [unit.strip() for unit in lines[1].split(",")]
  capacity = dict(zip(units, map(int, lines[2].split()), strict=True))
  rows = [
    Counter(dict(zip(units, map(int, line.split()), strict=True)))
    for line in lines[4:]
  ]
  return capacity, rows


def _read_bundles(text: str) -> tuple[list[_Bundle], dict[int, int]]:
  """The bundles, and the index of the bundle at which each region starts."""
  code: list[_Bundle] = []
  places: dict[int, int] = {}
  for line in text.splitlines():
    found = _BUNDLE.match(line)
    if found:
      code.append(_Bundle(int(found.group(1), 16)))
    if not code:
      continue  # The key before the first bundle.
    bundle = code[-1]
    bundle.matmuls += len(_MATMUL.findall(line))
    bundle.selects += len(_SELECT.findall(line))
    bundle.branches += map(int, _BRANCH.findall(line))
    for region in _PLACE.findall(line):
      places[int(region)] = len(code) - 1
  return code, places


def _spans(
  name: str, code: list[_Bundle], places: dict[int, int]
) -> list[tuple[int, int, str]]:
  """First and last index and kind of every body, outer ones first."""
  exit_bundle = len(code) - 1
  spans = [(0, exit_bundle, "kernel")]
  nowhere = []
  for at, bundle in enumerate(code):
    for region in bundle.branches:
      target = places.get(region, exit_bundle)
      if region not in places:
        nowhere.append((at, region))
      if target <= at:
        spans.append((target, at, "loop"))
      elif target > at + 1:
        spans.append((at + 1, target - 1, "guard"))
  loops = [span for span in spans if span[2] == "loop"]
  for at, region in nowhere:
    # A core that has nothing to do leaves before the loops; the region after
    # the last bundle is empty and not written.
    if any(first <= at for first, _, _ in loops):
      raise ValueError(f"{name} branches to region {region}, which is not.")
  return sorted(spans, key=lambda span: (span[0], -span[1]))


def _nest(
  spans: list[tuple[int, int, str]],
  code: list[_Bundle],
  rows: list[Counter[str]],
) -> Body:
  (first, last, kind), rest = spans[0], spans[1:]
  inner = []
  own = set(range(first, last + 1))
  while rest:
    start, stop, _ = rest[0]
    if stop > last:
      raise ValueError(f"branches cross at bundle {code[stop].address:#x}.")
    count = bisect.bisect_right(rest, stop, key=lambda span: span[0])
    inner.append(_nest(rest[:count], code, rows))
    own -= set(range(start, stop + 1))
    rest = rest[count:]
  return Body(
    kind=kind,
    first=code[first].address,
    last=code[last].address,
    bundles=len(own),
    slots=dict(sum((rows[at] for at in own), Counter())),
    matmuls=sum(code[at].matmuls for at in own),
    selects=sum(code[at].selects for at in own),
    inner=tuple(inner),
  )
