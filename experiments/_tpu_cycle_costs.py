"""What the cycles of tiles add up to, for `bench_tpu_cycles.py`.

A kernel of ours has code of its own for each part of a tile that it may
compute. Which of them a grid step runs is not guessed: the conditions in the
kernel are evaluated for every step, on the tables that it reads (`Work.of`). A
call then costs, with cycles as in `cycles`,

  for each code: steps that run it x its cycles
  for each step: what is beside the tiles, conditions and copies too, and
                 `BRANCH` bundles for each code that it skips
  for each output tile: what starts and ends it
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from experiments._tpu_cycle_cases import HEAD_SIZE, Case, Problem, Schedules
from pallas_kernels.aot.bundles import Body, Schedule
from pallas_kernels.head_attention import HeadContexts, Strided, Tiling
from pallas_kernels.head_attention.contexts import Rule
from pallas_kernels.head_attention.mosaic_tpu.items import (
  EDGE,
  FAR,
  FIRST,
  Call,
  read_step,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import (
  Layout,
  forward_plan,
  key_plan,
)
from pallas_kernels.head_attention.mosaic_tpu.settings import overlap_on
from pallas_kernels.head_attention.mosaic_tpu.tile import Code, codes
from pallas_kernels.head_attention.schedule import split_heads

# Floating-point operations of the matrix units in a cycle of a core: published
# peak over clock. v4: 275/2 T at 1.05 GHz, v5e: 197 T at 1.5, v5p: 459/2 T at
# 1.75, v6e: 918 T at 1.75; tpu7x, whose clock is not published, as v6e, whose
# 256-wide units it has too. A head of 128 fills half of such a unit: there the
# floor is out of reach.
PEAK = {
  "v4": 131072,
  "v5e": 131072,
  "v5p": 131072,
  "v6e": 524288,
  "tpu7x": 524288,
}
# Bytes that the memory delivers in a cycle of a core: published bandwidth, of
# v4, v5p and tpu7x half, over the clocks above.
BYTES_PER_CYCLE = {
  "v4": 1228 / 2 / 1.05,
  "v5e": 819 / 1.5,
  "v5p": 2765 / 2 / 1.75,
  "v6e": 1640 / 1.75,
  "tpu7x": 7380 / 2 / 1.75,
}
GENERATION = {"v4": 4, "v5e": 5, "v5p": 5, "v6e": 6, "tpu7x": 7}
LITE = ("v5e", "v6e")
# The products that a direction makes of a tile.
PRODUCTS = {"forward": 2, "backward": 5}
# The kernels of a direction of splash attention, and how many each makes.
PARTS: dict[str, dict[str, dict[str, int]]] = {
  "splash fused": {"forward": {"fwd": 2}, "backward": {"dkv": 5}},
  "splash unfused": {"forward": {"fwd": 2}, "backward": {"dq": 3, "dkv": 4}},
}


def kernels(schedules: Schedules, part: str) -> list[Schedule]:
  """The kernels of a part, in program order."""
  return [each for each in schedules if f"_{part}" in each.name]


def floor(case: Case, products: int) -> float:
  """Cycles that the matrix units need at the least for one tile."""
  flops = products * 2 * case.block_q * case.block_kv * HEAD_SIZE
  return flops / PEAK[case.chip]


def cycles(case: Case, body: Body, products: int, share: float = 1.0) -> float:
  """Cycles of one tile: its bundles, but no fewer than the floor.

  Args:
    case: What is compiled.
    body: Its code.
    products: That it makes.
    share: Of the logits that a full tile has.
  """
  return max(body.bundles, share * floor(case, products))


# Bundles after a branch before it acts. Where it skips a tile they are counted
# with that tile, which does not run.
BRANCH = 4


def our_layout(case: Case, problem: Problem) -> Layout:
  """All heads of ours."""
  rules: tuple[Rule, ...] = (Strided(local=1, stride=1),) * problem.heads
  if case.mask == "s2":
    rules = problem.pattern().rules
  (run,) = split_heads(HeadContexts(problem.block, rules))
  return Layout(
    run=run,
    block=problem.block,
    is_causal=True,
    tiling=Tiling(block_q=case.block_q, block_kv=case.block_kv),
    q_length=problem.length,
    kv_length=problem.length,
    q_offset=0,
    groups=1,
  )


@dataclasses.dataclass(frozen=True)
class Work:
  """What one call of our kernels does.

  Attributes:
    layout: Of it.
    codes: The code that it has for tiles, by name.
    counts: How many tiles run each.
    steps: Grid steps; one that shows a head nothing runs no tile's code.
    outputs: Output tiles.
  """

  layout: Layout
  codes: dict[str, Code]
  counts: dict[str, int]
  steps: int
  outputs: int

  @classmethod
  def of(cls, layout: Layout, call: Call) -> "Work":
    """Counts what the kernel's own conditions let run, step by step."""
    row, item, member = np.indices((call.rows, call.items, call.members))
    step = read_step(call.tables, row, item, member, call.members)
    named = {_name(code, layout): code for code in codes(layout, call)}
    counts = {
      name: int(code.runs(layout, call.tables, item, step).sum())
      for name, code in named.items()
    }
    firsts = (step.flags & FIRST) != 0
    return cls(layout, named, counts, item.size, int(firsts[..., 0].sum()))

  @property
  def visits(self) -> int:
    """Tiles."""
    return sum(self.counts.values())

  def tiles(
    self, case: Case, schedule: Schedule, part: str
  ) -> dict[str, "Tile"]:
    """One of each code, for the logits that it does compute."""
    tiling = self.layout.tiling
    overlap = overlap_on(
      GENERATION[case.chip],
      self.layout,
      backward=part == "backward",
      is_lite=case.chip in LITE,
    )
    found = {}
    for name, body in label(schedule, self.codes).items():
      chunks = self.codes[name].chunks(self.layout, overlap)
      logits = sum(chunk.size * chunk.keys for chunk in chunks)
      share = logits / (tiling.block_q * tiling.block_kv)
      found[name] = Tile.of(case, schedule, body, PRODUCTS[part], share)
    return found

  def cost(self, case: Case, schedule: Schedule, part: str) -> "Cost":
    """Cycles of the call.

    Every tile that runs costs what the schedule of its own code takes, which
    knows the keys that it leaves out. Every step costs what the loop over the
    grid holds beside tiles, and `BRANCH` for each code that it skips.
    """
    tiles = sum(
      self.counts[name] * tile.cycles
      for name, tile in self.tiles(case, schedule, part).items()
    )
    skipped = self.steps * len(self.codes) - self.visits
    rest = (
      self.steps * schedule.step_bundles()
      + skipped * BRANCH
      + self.outputs * schedule.ends_bundles()
    )
    return Cost(self.visits, tiles, tiles + rest)


def _name(code: Code, layout: Layout) -> str:
  """Of a tile: near or far, full or edge, and which edge."""
  place = "far" if code.kind & FAR else "near"
  if not code.kind & EDGE:
    return f"{place} full"
  if code.edge is not None:
    return f"{place} edge at {code.edge.offset}"
  if code.blocks is not None:
    return f"{place} edge of {code.blocks[1] * layout.block}"
  if code.halves is not None:
    return f"{place} edge of halves {code.halves.word:04b}"
  return f"{place} edge"


def label(schedule: Schedule, names: Iterable[str]) -> dict[str, Body]:
  """The tiles of one of our kernels by name.

  Raises:
    ValueError: The kernel does not have these tiles, or a full one selects as
      much as an edge: the order is not what it was.
  """
  tiles, names = schedule.tiles(), list(names)
  if len(tiles) != len(names):
    raise ValueError(
      f"{schedule.name} has {len(tiles)} tiles, the schedule {names}."
    )
  found = dict(zip(names, tiles, strict=True))
  full = [body.selects for name, body in found.items() if "full" in name]
  edge = [body.selects for name, body in found.items() if "edge" in name]
  if full and edge and max(full) >= min(edge):
    raise ValueError(
      f"{schedule.name} selects {full} times in full tiles, {edge} in edges."
    )
  return found


@functools.cache
def our_work(case: Case, problem: Problem) -> dict[str, list[Work]]:
  """The calls of a direction, in program order; no matter which chip."""
  layout = our_layout(case, problem)
  plan = key_plan(layout)
  calls = {
    "forward": forward_plan(layout).calls,
    "backward": plan.near.calls + plan.far.calls,
  }
  return {
    part: [Work.of(layout, call) for call in each]
    for part, each in calls.items()
  }


def our_calls(
  case: Case, schedules: Schedules, problem: Problem, part: str
) -> list[tuple[Schedule, Work]]:
  """Each call of a part: its code, and what it does."""
  work = our_work(dataclasses.replace(case, chip="any"), problem)[part]
  return list(zip(kernels(schedules, part), work, strict=True))


@dataclasses.dataclass(frozen=True)
class Tile:
  """The code of one tile, in one kernel or the sum of several.

  Attributes:
    bundles: As scheduled.
    cycles: The same, but no fewer than the matrix units need.
    mxu_used, mxu_slots: Slots of the matrix units, used and there.
  """

  bundles: int = 0
  cycles: float = 0
  mxu_used: int = 0
  mxu_slots: int = 0

  @classmethod
  def of(
    cls,
    case: Case,
    schedule: Schedule,
    body: Body,
    products: int,
    share: float = 1.0,
  ) -> "Tile":
    """A body's."""
    return cls(
      body.bundles,
      cycles(case, body, products, share),
      body.slots.get("MXU", 0),
      schedule.capacity["MXU"] * body.bundles,
    )

  def __add__(self, other: "Tile") -> "Tile":
    return Tile(
      self.bundles + other.bundles,
      self.cycles + other.cycles,
      self.mxu_used + other.mxu_used,
      self.mxu_slots + other.mxu_slots,
    )

  def figures(self) -> dict[str, float]:
    """For the record."""
    return {
      "bundles": self.bundles,
      "cycles": round(self.cycles),
      "mxu_occupancy": round(self.mxu_used / self.mxu_slots, 3),
    }


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cycles of a whole problem, all heads of one sequence.

  Attributes:
    visits: Tiles.
    tiles: Cycles in tiles.
    total: Also those of grid steps, and of starting and ending output tiles.
  """

  visits: int = 0
  tiles: float = 0
  total: float = 0

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.visits + other.visits,
      self.tiles + other.tiles,
      self.total + other.total,
    )


def our_cost(
  case: Case, schedules: Schedules, problem: Problem, direction: str
) -> Cost:
  """Our kernels over the whole problem."""
  cost = Cost()
  for schedule, work in our_calls(case, schedules, problem, direction):
    cost += work.cost(case, schedule, direction)
  return cost


@functools.cache
def splash_visits(problem: Problem, block_q: int, block_kv: int) -> int:
  """Tiles, summed over the heads, in which splash attention has work."""
  pattern = problem.pattern()
  blocks = range(problem.length // problem.block)
  rows, columns = block_q // problem.block, block_kv // problem.block
  shape = (len(blocks) // rows, rows, len(blocks) // columns, columns)
  return sum(
    int(
      pattern.block_mask(rule, blocks, blocks)
      .reshape(shape)
      .any(axis=(1, 3))
      .sum()
    )
    for rule in pattern.rules
  )


def splash_cost(
  case: Case, schedules: Schedules, problem: Problem, direction: str
) -> Cost:
  """Splash attention's kernels over the whole problem.

  Heads whose masks differ share one grid, over all tiles of all of them; one
  without work costs a step.
  """
  visits = splash_visits(problem, case.block_q, case.block_kv)
  q_tiles = problem.length // case.block_q
  kv_tiles = problem.length // case.block_kv
  cost = Cost()
  for part, products in PARTS[case.kernel][direction].items():
    (schedule,) = kernels(schedules, part)
    (body,) = schedule.tiles()
    outputs = kv_tiles if part == "dkv" else q_tiles
    rest = problem.heads * (
      q_tiles * kv_tiles * schedule.step_bundles()
      + outputs * schedule.ends_bundles()
    )
    tiles = visits * cycles(case, body, products)
    cost += Cost(visits, tiles, tiles + rest)
  return cost
