"""Reads the text of a compiled program: what runs, and how often.

The text is what `jax.stages.Compiled.as_text()` gives: one device's part of the
program, with all that the compiler has put in. XLA's own cost analysis counts
the body of a loop once; here a body counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%?([\w.\-]+)$")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")
_COPIES = ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape")


class Array(NamedTuple):
  """One array that an instruction gives.

  Attributes:
    dtype: As XLA calls it, "bf16".
    shape: Its sizes.
    space: Memory it is in; 0 is the device's main memory.
  """

  dtype: str
  shape: tuple[int, ...]
  space: int

  @property
  def num_bytes(self) -> int:
    """Without what a layout pads."""
    return math.ceil(math.prod(self.shape) * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: Unique in the program.
    opcode: "fusion", "all-gather-start", ...
    results: Arrays that it gives, those of a tuple one by one.
    operands: Names of what it takes.
    attributes: The rest of the line.
  """

  name: str
  opcode: str
  results: tuple[Array, ...]
  operands: tuple[str, ...]
  attributes: str

  @property
  def result_bytes(self) -> int:
    """Of all results."""
    return sum(array.num_bytes for array in self.results)

  def calls(self, *keys: str) -> tuple[str, ...]:
    """Computations that it names as, say, "body" or "branch_computations"."""
    found: list[str] = []
    for key in keys:
      listed = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
      if listed:
        found += re.findall(r"[\w.\-]+", listed[1])
    return tuple(found)

  def text(self, key: str) -> str | None:
    """The value of `key="value"`, or of `key=value`."""
    found = re.search(rf'\b{key}=(?:"([^"]*)"|([^\s,}}]+))', self.attributes)
    return (found[1] or found[2]) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
  """A named list of instructions, in order; `root` is what it returns."""

  name: str
  instructions: Mapping[str, Instruction]
  root: Instruction


class Visit(NamedTuple):
  """An instruction, and how it is run.

  Attributes:
    instruction: What.
    computation: Where it stands.
    times: How often it runs in one run of the program.
    in_fusion: Whether it is part of a fusion, which keeps what it computes to
      itself.
  """

  instruction: Instruction
  computation: Computation
  times: int
  in_fusion: bool


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    computations: By name.
    entry: The one that runs.
    num_partitions: Devices that it runs on.
  """

  computations: Mapping[str, Computation]
  entry: Computation
  num_partitions: int

  def visits(self) -> tuple[Visit, ...]:
    """All that runs. Of branches, the one that writes most."""
    return tuple(self._visits(self.entry, 1, False))

  @property
  def unknown_loops(self) -> tuple[str, ...]:
    """Loops whose number of turns the text does not tell: they count once."""
    return tuple(
      visit.instruction.name
      for visit in self.visits()
      if visit.instruction.opcode == "while"
      and self._trip_count(visit.computation, visit.instruction) is None
    )

  def operands(self, visit: Visit) -> tuple[Instruction, ...]:
    """What an instruction takes."""
    mine = visit.computation.instructions
    return tuple(mine[name] for name in visit.instruction.operands)

  def _visits(
    self, computation: Computation, times: int, in_fusion: bool
  ) -> Iterator[Visit]:
    for instruction in computation.instructions.values():
      yield Visit(instruction, computation, times, in_fusion)
      inner, fused = times, in_fusion
      match instruction.opcode:
        case "while":
          count = self._trip_count(computation, instruction)
          inner *= 1 if count is None else count
          called = instruction.calls("body")
        case "fusion":
          fused, called = True, instruction.calls("calls")
        case "call" | "async-start":
          called = instruction.calls("to_apply", "calls")
        case "conditional":
          branches = instruction.calls(
            "branch_computations", "true_computation", "false_computation"
          )
          called = (max(branches, key=self._written),) if branches else ()
        case _:
          called = ()
      for name in called:
        yield from self._visits(self.computations[name], inner, fused)

  def _written(self, name: str) -> int:
    return sum(
      visit.times * visit.instruction.result_bytes
      for visit in self._visits(self.computations[name], 1, False)
      if not visit.in_fusion
    )

  def _trip_count(
    self, computation: Computation, loop: Instruction
  ) -> int | None:
    """Turns of a loop that counts from a constant to a constant."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.attributes)
    if known:
      return int(known[1])
    (condition,) = loop.calls("condition")
    (body,) = loop.calls("body")
    test = self._resolve(self.computations[condition], None)
    if not isinstance(test, _Test):
      return None

    def start(value: "_Value") -> int | None:
      if not isinstance(value, _Carried):
        return value if isinstance(value, int) else None
      found = self._resolve(computation, loop.operands[0], value.index)
      return found if isinstance(found, int) else None

    def step(value: "_Value") -> int | None:
      """What a turn adds."""
      if isinstance(value, int):
        return 0
      if not isinstance(value, _Carried):
        return None
      after = self._resolve(self.computations[body], None, value.index)
      if isinstance(after, _Carried) and after.index == value.index:
        return after.added
      return None

    left, right = start(test.left), start(test.right)
    step_left, step_right = step(test.left), step(test.right)
    if left is None or right is None or step_left is None or step_right is None:
      return None
    # Brought to: goes on while `left - right` < 0.
    gap, change = left - right, step_left - step_right
    if test.direction in ("GT", "GE"):
      gap, change = -gap, -change
    if test.direction in ("LE", "GE"):
      gap -= 1
    if test.direction == "NE" and change:
      return -gap // change if gap % change == 0 else None
    if test.direction == "EQ" or change <= 0:
      return None
    return max(0, math.ceil(-gap / change))

  def _resolve(
    self,
    computation: Computation,
    name: str | None,
    index: int | None = None,
    arguments: "tuple[_Value, ...] | None" = None,
  ) -> "_Value":
    """A whole number as a constant, or as what a loop carries plus one.

    Args:
      computation: Where it stands.
      name: Of the instruction; `None` is the root.
      index: Which part of a tuple.
      arguments: What the parameters of a fused computation are; `None` in a
        loop, whose only one is what it carries.
    """
    instruction = (
      computation.root if name is None else computation.instructions[name]
    )

    def operand(number: int, index: int | None = None) -> "_Value":
      return self._resolve(
        computation, instruction.operands[number], index, arguments
      )

    match instruction.opcode:
      case "constant":
        found = re.match(r"(-?\d+)\)", instruction.attributes)
        return int(found[1]) if found else None
      case "parameter" if arguments is not None:
        found = re.match(r"(\d+)\)", instruction.attributes)
        return arguments[int(found[1])] if found else None
      case "parameter":
        return None if index is None else _Carried(index, 0)
      case "get-tuple-element":
        return operand(0, int(instruction.text("index") or 0))
      case "tuple" if index is not None:
        return operand(index)
      case "opt-barrier" | "optimization-barrier":
        return operand(0, index)
      case "add" | "subtract":
        left, right = operand(0), operand(1)
        if isinstance(left, int) and instruction.opcode == "add":
          left, right = right, left
        if not isinstance(right, int):
          return None
        right = right if instruction.opcode == "add" else -right
        if isinstance(left, int):
          return left + right
        if isinstance(left, _Carried):
          return _Carried(left.index, left.added + right)
        return None
      case "compare":
        left, right = operand(0), operand(1)
        direction = instruction.text("direction") or ""
        if isinstance(left, _Test) or isinstance(right, _Test):
          return None
        return _Test(direction, left, right)
      case "fusion":
        values = tuple(operand(n) for n in range(len(instruction.operands)))
        (called,) = instruction.calls("calls")
        return self._resolve(self.computations[called], None, index, values)
      case opcode if opcode in _COPIES:
        return operand(0, index)
    return None


@dataclasses.dataclass(frozen=True)
class _Carried:
  """Part `index` of what a loop carries, plus a constant."""

  index: int
  added: int


@dataclasses.dataclass(frozen=True)
class _Test:
  """A comparison of two whole numbers."""

  direction: str
  left: "int | _Carried | _Test | None"
  right: "int | _Carried | _Test | None"


_Value = int | _Carried | _Test | None


def parse(text: str) -> Program:
  """The program that `text` is.

  Raises:
    ValueError: It is no text of a compiled program.
  """
  computations: dict[str, Computation] = {}
  entry = None
  name, is_entry = None, False
  instructions: dict[str, Instruction] = {}
  root = None
  for raw in text.splitlines():
    head = _HEAD.match(raw)
    if head:
      name, is_entry = head[2], bool(head[1])
      instructions, root = {}, None
    elif raw.startswith("}") and name is not None:
      if root is None:
        raise ValueError(f"computation {name!r} has no root")
      computations[name] = Computation(name, instructions, root)
      entry = computations[name] if is_entry else entry
      name = None
    elif name is not None:
      instruction = _instruction(raw)
      if instruction is not None:
        instructions[instruction.name] = instruction
        if raw.lstrip().startswith("ROOT "):
          root = instruction
  if entry is None:
    raise ValueError("the text is no compiled program: it has no entry")
  partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
  return Program(computations, entry, int(partitions[1]) if partitions else 1)


def total(
  visits: tuple[Visit, ...], of: Callable[[Visit], float | None]
) -> float:
  """Sum of a figure over all that runs; `None` is nothing."""
  return sum(visit.times * (of(visit) or 0) for visit in visits)


def _instruction(raw: str) -> Instruction | None:
  start = _START.match(raw)
  if start is None:
    return None
  rest = _COMMENT.sub("", raw[start.end() :])
  if rest.startswith("("):
    end = _closing(rest, 0) + 1
  else:
    end = rest.index(" ")
  type_, rest = rest[:end], rest[end:].lstrip()
  opcode, _, rest = rest.partition("(")
  # In front of the parentheses that close the operands.
  end = _closing("(" + rest, 0) - 1
  inside, attributes = rest[:end], rest[end + 1 :]
  operands: tuple[str, ...] = ()
  if opcode in ("constant", "parameter"):
    attributes = f"{inside}){attributes}"
  else:
    operands = tuple(
      found[1]
      for part in _split(inside)
      if (found := _NAME.search(part.strip()))
    )
  return Instruction(start[2], opcode, _arrays(type_), operands, attributes)


def _arrays(type_: str) -> tuple[Array, ...]:
  arrays = []
  for dtype, sizes, layout in _ARRAY.findall(type_):
    space = _SPACE.search(layout)
    shape = tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n)
    arrays.append(Array(dtype, shape, int(space[1]) if space else 0))
  return tuple(arrays)


def _bits(dtype: str) -> int:
  if dtype in _BITS:
    return _BITS[dtype]
  # "bf16", "f8e4m3fn", "s4".
  found = re.match(r"[a-z]+(\d+)", dtype)
  return int(found[1]) if found else 0


def _closing(text: str, at: int) -> int:
  """Where the parenthesis that opens at `at` closes."""
  depth = 0
  for place in range(at, len(text)):
    if text[place] in "({[":
      depth += 1
    elif text[place] in ")}]":
      depth -= 1
      if depth == 0:
        return place
  raise ValueError(f"unbalanced parentheses: {text[:80]!r}")


def _split(text: str) -> list[str]:
  """At the commas that are not in parentheses."""
  parts, depth, start = [], 0, 0
  for place, letter in enumerate(text):
    if letter in "({[":
      depth += 1
    elif letter in ")}]":
      depth -= 1
    elif letter == "," and depth == 0:
      parts.append(text[start:place])
      start = place + 1
  parts.append(text[start:])
  return parts if text.strip() else []
