"""What the cycles of tiles add up to, for `bench_tpu_cycles.py`."""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np

from experiments._tpu_cycle_cases import HEAD_SIZE, Case, Problem, Schedules
from pallas_kernels.aot.bundles import Body, Schedule
from pallas_kernels.head_attention import Tiling
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  Visits,
  split_heads,
  strided_visits,
)

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
# The kernels of a direction, and how many products each makes of a tile.
PARTS: dict[str, dict[str, dict[str, int]]] = {
  "ours": {"forward": {"forward": 2}, "backward": {"backward": 5}},
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


def cycles(case: Case, body: Body, products: int) -> float:
  """Cycles of one tile: its bundles, but no fewer than the floor."""
  return max(body.bundles, floor(case, products))


# Tiles of our kernels, in the order in which they are compiled.
KINDS = ("near full", "far full", "near edge", "far edge")


def our_visits(case: Case, problem: Problem) -> Visits:
  """What each head of ours visits."""
  run = StridedHeads(0, 1, local=1, stride=1, residues=(0,))
  if case.mask == "s2":
    (found,) = split_heads(problem.pattern())
    assert isinstance(found, StridedHeads)
    run = found
  visits = strided_visits(
    run,
    block=problem.block,
    tiling=Tiling(block_q=case.block_q, block_kv=case.block_kv),
    q_length=problem.length,
    kv_length=problem.length,
    q_offset=0,
  )
  if case.mask == "causal":
    # The only shard is the keys themselves.
    visits = visits._replace(is_far=np.zeros_like(visits.is_far))
  return visits


def kind_counts(visits: Visits) -> dict[str, int]:
  """How many tiles of each kind are visited; no kind with none."""
  kinds = np.asarray(visits.is_far, int) + 2 * ~visits.is_full
  counts = np.bincount(kinds, minlength=len(KINDS))
  return {
    name: int(count) for name, count in zip(KINDS, counts, strict=True) if count
  }


def label(schedule: Schedule, kinds: Iterable[str]) -> dict[str, Body]:
  """The tiles of one of our kernels by kind.

  Raises:
    ValueError: The kernel does not have these tiles, or a full one selects as
      much as an edge: the order is not what it was.
  """
  tiles, names = schedule.tiles(), list(kinds)
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


def our_calls(
  case: Case, schedules: Schedules, problem: Problem, part: str
) -> list[tuple[Schedule, Visits, dict[str, Body]]]:
  """Each call of a part: its code, what it visits, its tiles by kind."""
  visits = our_visits(case, problem)
  lists = [visits]
  if part == "backward":
    lists = [visits.take(~visits.is_far), visits.take(visits.is_far)]
  return [
    (schedule, items, label(schedule, kind_counts(items)))
    for schedule, items in zip(
      kernels(schedules, part),
      (items for items in lists if items.q_tile.size),
      strict=True,
    )
  ]


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
    cls, case: Case, schedule: Schedule, body: Body, products: int
  ) -> "Tile":
    """A body's."""
    return cls(
      body.bundles,
      cycles(case, body, products),
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

  def plus(
    self, visits: int, tiles: float, rest: float, times: int = 1
  ) -> "Cost":
    """With another kernel's, which runs `times` times."""
    return Cost(
      self.visits + times * visits,
      self.tiles + times * tiles,
      self.total + times * (tiles + rest),
    )


def our_cost(
  case: Case, schedules: Schedules, problem: Problem, direction: str
) -> Cost:
  """Our kernels over the whole problem."""
  cost = Cost()
  for part, products in PARTS["ours"][direction].items():
    for schedule, items, bodies in our_calls(case, schedules, problem, part):
      in_tiles = sum(
        count * cycles(case, bodies[kind], products)
        for kind, count in kind_counts(items).items()
      )
      steps = items.q_tile.size
      output_tiles = items.q_tile if part == "forward" else items.kv_tile
      outputs = np.unique(output_tiles).size
      rest = steps * schedule.step_bundles() + outputs * schedule.ends_bundles()
      cost = cost.plus(steps, in_tiles, rest, problem.heads)
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
    cost = cost.plus(visits, visits * cycles(case, body, products), rest)
  return cost
