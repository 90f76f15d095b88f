"""Counts TPU cycles of routed attention, without a TPU.

    python -m experiments.bench_routed_tpu_cycles                # all chips
    python -m experiments.bench_routed_tpu_cycles --chips v5e

Our kernel on packed rows against the same kernel with all heads on, compiled
with the real TPU compiler (see `bench_tpu_cycles.py`): one full tile at equal
tile sizes, and a whole problem with half of the heads active (a quarter of them
shared, the others picked at random), both at their best tile sizes. To the
routed side is added the time to gather queries and to scatter outputs, at the
memory's full speed; making the work lists is not counted. Needs
`pip install 'jaxheads[aot]'`.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments._tpu_cycle_cases import (
  HEAD_SIZE,
  Case,
  Problem,
  Schedules,
  routed_tiling,
)
from experiments._tpu_cycle_costs import (
  BYTES_PER_CYCLE,
  Work,
  kernels,
  our_work,
)
from experiments.bench_tpu_cycles import (
  DIRECTIONS,
  Cells,
  CycleConfig,
  Results,
  show,
  wide_console,
)
from jaxheads.errors import UserError, one_line_errors
from jaxheads.moh import MoHConfig
from pallas_kernels.head_attention.mosaic_tpu.items import Call, Tables
from pallas_kernels.packing import Packing, pack
from pallas_kernels.routed_attention.mosaic_tpu import implementation, worklist
from pallas_kernels.routed_attention.operands import Operands, Settings

MASKS = ("causal", "s2")
TILES = (512, 1024)
# Of the queries' size: read by half and written by half; then the same for the
# outputs, all of which are written. Backward does both twice.
MOVED = {"forward": 2.5, "backward": 5.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(CycleConfig):
  """Counts TPU cycles of routed attention."""

  active: float = 0.5
  """Fraction of active heads."""
  json: pathlib.Path | None = pathlib.Path(
    "experiments/results/bench_routed_tpu_cycles.json"
  )
  """Where to write the figures as JSON."""

  def __post_init__(self) -> None:
    super().__post_init__()
    if not 0 < self.active <= 1:
      raise UserError(f"`--active` must be in (0, 1], got {self.active}.")


def cases(chips: tuple[str, ...]) -> list[Case]:
  """Everything to compile."""
  return [
    Case(chip, kernel, mask, size, size)
    for chip in chips
    for kernel in ("ours", "routed")
    for mask in MASKS
    for size in TILES
  ]


def picks(problem: Problem, active: float, block_rows: int) -> Packing:
  """The rows of one sequence whose tokens pick their heads at random."""
  moh = MoHConfig.from_fraction(problem.heads, active)
  random = np.random.default_rng(0).random((problem.length, moh.num_routed))
  chosen = np.argsort(random, axis=1)[:, : moh.top_k] + moh.num_shared
  mask = np.zeros((1, problem.length, problem.heads), bool)
  mask[..., : moh.num_shared] = True
  mask[0, np.arange(problem.length)[:, None], chosen] = True
  return pack(
    jnp.asarray(mask), num_active=moh.num_active, block_rows=block_rows
  )


def routed_work(
  case: Case, problem: Problem, active: float
) -> dict[str, list[Work]]:
  """What the kernels of each direction do, in program order."""
  packing = picks(problem, active, case.block_q)

  def shape(*sizes: int) -> Any:
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

  keys = shape(1, problem.length, problem.heads, HEAD_SIZE)
  operands = Operands(
    shape(packing.num_rows, HEAD_SIZE),
    keys,
    keys,
    packing,
    jnp.int32(0),
    None,
    None,
    None,
  )
  settings = Settings(
    pattern=problem.pattern() if case.mask == "s2" else None,
    is_causal=True,
    scale=1.0,
    tiling=routed_tiling(case),
  )
  (run,) = implementation.make_runs(settings, operands)
  each = run.layout, run.blocks
  backward = [worklist.by_near_tile(*each)]
  if worklist.far_tiles(run.layout):
    backward.append(worklist.by_far_tile(*each))

  def count(work: worklist.Worklist) -> Work:
    tables = worklist.tables_of(run.blocks, work.place, work.tiles)
    return Work.of(
      run.layout,
      Call(
        Tables(*map(np.asarray, tables)),
        rows=1,
        members=1,
        kinds=work.kinds,
        count=int(work.length),
      ),
    )

  return {
    "forward": [count(worklist.by_block(*each))],
    "backward": [count(work) for work in backward],
  }


def kernels_cost(
  case: Case, schedules: Schedules, work: list[Work], direction: str
) -> float:
  """Cycles of the kernels of a direction."""
  return sum(
    each.cost(case, schedule, direction).total
    for schedule, each in zip(kernels(schedules, direction), work, strict=True)
  )


def full_tile(
  case: Case, schedules: Schedules, work: list[Work], direction: str
) -> float | None:
  """Cycles of the dearest full tile of a case; None if it has none."""
  return max(
    (
      tile.cycles
      for schedule, each in zip(
        kernels(schedules, direction), work, strict=True
      )
      for name, tile in each.tiles(case, schedule, direction).items()
      if "full" in name
    ),
    default=None,
  )


def full_tiles(
  results: Results,
  work: dict[Case, dict[str, list[Work]]],
  chip: str,
  mask: str,
  direction: str,
) -> dict[str, dict[str, float]]:
  """Of both kernels, by tile size; only where both have one."""
  found: dict[str, dict[str, float]] = {}
  for size in TILES:
    tiles: dict[str, float] = {}
    for kernel in ("ours", "routed"):
      case = Case(chip, kernel, mask, size, size)
      schedules = results[case]
      if not isinstance(schedules, str):
        what = work[dataclasses.replace(case, chip="any")][direction]
        cost = full_tile(case, schedules, what, direction)
        if cost is not None:
          tiles[kernel] = round(cost)
    if len(tiles) == 2:
      found[str(size)] = tiles
  return found


@dataclasses.dataclass(frozen=True)
class Best:
  """The tile size that takes the fewest cycles."""

  size: int
  cycles: float

  @classmethod
  def of(cls, costs: dict[int, float]) -> "Best":
    """Of cycles by tile size."""
    size = min(costs, key=costs.__getitem__)
    return cls(size, costs[size])


def rows_of(
  results: Results, problem: Problem, active: float
) -> list[dict[str, Any]]:
  """A row a chip, direction and mask."""
  ideal = MoHConfig.from_fraction(problem.heads, active).active_fraction
  visible = {"causal": 1.0, "s2": problem.density()}
  work = {
    case: routed_work(case, problem, active)
    if case.kernel == "routed"
    else our_work(case, problem)
    for case in cases(("any",))
  }
  rows = []
  for chip in dict.fromkeys(case.chip for case in results):
    for direction in DIRECTIONS:
      moved = MOVED[direction] * problem.length * problem.heads * HEAD_SIZE * 2
      moved /= BYTES_PER_CYCLE[chip]
      dense = None
      for mask in MASKS:
        ours: dict[int, float] = {}
        routed: dict[int, float] = {}
        for case, found in results.items():
          if (case.chip, case.mask) != (chip, mask) or isinstance(found, str):
            continue
          what = work[dataclasses.replace(case, chip="any")][direction]
          side = ours if case.kernel == "ours" else routed
          side[case.block_q] = kernels_cost(case, found, what, direction)
        all_heads, picked = Best.of(ours), Best.of(routed)
        dense = dense or all_heads.cycles
        cost = picked.cycles + moved
        rows.append(
          {
            "chip": chip,
            "direction": direction,
            "mask": mask,
            "full_tile": full_tiles(results, work, chip, mask, direction),
            "all_heads": round(all_heads.cycles),
            "all_heads_tile": all_heads.size,
            "routed": round(picked.cycles),
            "routed_tile": picked.size,
            "moved": round(moved),
            "ratio": round(all_heads.cycles / cost, 3),
            "ideal_ratio": round(1 / ideal, 3),
            "over_ideal_pairs": round(
              cost / dense / (ideal * visible[mask]), 3
            ),
          }
        )
  return rows


def cells(rows: list[dict[str, Any]]) -> Cells:
  """The table, header first."""
  table = [
    "chip|direction|mask|full tile, 512|full tile, 1024|all heads, Mcycles|"
    "routed|gather, scatter|ratio|ideal|cost : ideal pairs".split("|")
  ]
  for row in rows:
    tiles = [row["full_tile"].get(str(size)) for size in TILES]
    table.append(
      [
        row["chip"],
        row["direction"],
        row["mask"],
        *(
          f"{tile['routed']:,} / {tile['ours']:,}" if tile else "-"
          for tile in tiles
        ),
        f"{row['all_heads'] / 1e6:.1f}",
        f"{row['routed'] / 1e6:.1f}",
        f"{row['moved'] / 1e6:.1f}",
        f"{row['ratio']:.2f}x",
        f"{row['ideal_ratio']:.2f}x",
        f"{row['over_ideal_pairs']:.2f}",
      ]
    )
  return table


@one_line_errors
def main() -> None:
  config = tyro.cli(BenchConfig, description=__doc__)
  console = wide_console()
  problem = Problem()
  results = config.compile(cases(config.chips), problem)
  rows = rows_of(results, problem, config.active)
  show(
    console,
    f"{config.active:.0%} of {problem.heads} heads, {problem.length:,} tokens",
    cells(rows),
    config.markdown,
  )
  config.write(console, problem, active=config.active, rows=rows)


if __name__ == "__main__":
  main()
