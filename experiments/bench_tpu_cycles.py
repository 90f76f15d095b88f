"""Counts TPU cycles of our kernel and of splash attention, without a TPU.

    python -m experiments.bench_tpu_cycles                 # all chips
    python -m experiments.bench_tpu_cycles --chips v5e --markdown

Both are compiled with the real TPU compiler, whose final schedule says how many
cycles the code of a tile takes; the same figures on every machine. Two tables:
one tile at equal tile sizes, and a whole problem (strided contexts, each head
with a residue of its own), in which every kernel has its best tile size and
splash attention gets the same masks. Needs `pip install 'jaxheads[aot]'`.
"""

import concurrent.futures
import concurrent.futures.process
import dataclasses
import importlib.metadata
import json
import multiprocessing
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import rich.console
import rich.table
import tyro

from experiments._tpu_cycle_cases import (
  HEAD_SIZE,
  Case,
  Problem,
  Schedules,
  compile_case,
)
from experiments._tpu_cycle_costs import (
  PARTS,
  PRODUCTS,
  Tile,
  floor,
  kernels,
  our_calls,
  our_cost,
  splash_cost,
)
from jaxheads.errors import UserError, one_line_errors
from pallas_kernels.aot.targets import CHIPS

TPUS = tuple(name for name, chip in CHIPS.items() if chip.platform == "tpu")
EQUAL_TILES = (512, 1024)
# Others that may be our best.
OUR_TILES = ((512, 1024), (1024, 512))
# Splash attention's own best: narrow key tiles skip more, wide ones cost less.
SPLASH_TILES = (
  (1024, 128),
  (2048, 128),
  (1024, 256),
  (2048, 256),
  (2048, 512),
  (1024, 1024),
)
SPLASH = ("splash fused", "splash unfused")
DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CycleConfig:
  """What to compile, and where the figures go."""

  chips: tuple[str, ...] = TPUS
  """Chips to compile for."""
  workers: int = 2
  """Compilers that run at once; each takes about 2 GB."""
  json: pathlib.Path | None = None
  """Where to write the figures as JSON."""
  markdown: bool = False
  """Print the tables as Markdown."""

  def __post_init__(self) -> None:
    for chip in self.chips:
      if chip not in TPUS:
        raise UserError(
          f"`--chips` must be among {', '.join(TPUS)}, got {chip!r}."
        )
    if self.workers < 1:
      raise UserError(f"`--workers` must be at least 1, got {self.workers}.")

  def compile(
    self,
    listed: list[Any],
    problem: Any,
    compile_one: Callable[[Any, Any], Schedules | str] = compile_case,
  ) -> dict[Any, Schedules | str]:
    """Every case; says how far it is."""
    progress = rich.console.Console(stderr=True, highlight=False)
    return compile_all(listed, problem, self.workers, progress, compile_one)

  def write(
    self, console: rich.console.Console, problem: Any, **figures: Any
  ) -> None:
    """Writes the figures, and what they depend on."""
    if self.json is None:
      return
    self.json.parent.mkdir(parents=True, exist_ok=True)
    record = {
      "environment": environment(),
      "problem": dataclasses.asdict(problem) | {"head_size": HEAD_SIZE},
      **figures,
    }
    self.json.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"wrote {self.json}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(CycleConfig):
  """Counts TPU cycles of our kernel and of splash attention."""

  json: pathlib.Path | None = pathlib.Path(
    "experiments/results/bench_tpu_cycles.json"
  )
  """Where to write the figures as JSON."""


Results = dict[Case, Schedules | str]


def cases(chips: Iterable[str]) -> list[Case]:
  """Everything to compile."""
  found = []
  for chip in chips:
    for size in EQUAL_TILES:
      found += [
        Case(chip, "ours", mask, size, size) for mask in ("causal", "s2")
      ]
      found += [
        Case(chip, kernel, mask, size, size)
        for kernel in SPLASH
        for mask in ("causal", "none")
      ]
    found += [Case(chip, "ours", "s2", *tile) for tile in OUR_TILES]
    found += [
      Case(chip, kernel, "s2", *tile)
      for tile in SPLASH_TILES
      for kernel in SPLASH
    ]
  return found


def compile_alone(
  compile_one: Callable[[Any, Any], Schedules | str], case: Any, problem: Any
) -> Schedules | str:
  """A case in a fresh process, which a compiler may take down with it."""
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    try:
      return pool.submit(compile_one, case, problem).result()
    except concurrent.futures.process.BrokenProcessPool:
      return "the compiler crashed"


def compile_all(
  listed: list[Any],
  problem: Any,
  workers: int,
  console: rich.console.Console,
  compile_one: Callable[[Any, Any], Schedules | str],
) -> dict[Any, Schedules | str]:
  """Every case; so many at once."""
  results: dict[Any, Schedules | str] = {}
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    pending = {
      pool.submit(compile_alone, compile_one, case, problem): case
      for case in listed
    }
    for future in concurrent.futures.as_completed(pending):
      case = pending[future]
      try:
        results[case] = found = future.result()
      except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
      outcome = f": {found}" if isinstance(found, str) else ""
      console.print(f"{len(results)} of {len(listed)}: {case}{outcome}")
  return {case: results[case] for case in listed}


def tile_rows(results: Results, problem: Problem) -> list[dict[str, Any]]:
  """One tile at equal tile sizes: a row a chip, size and direction."""
  rows = []
  for chip in dict.fromkeys(case.chip for case in results):
    for size in EQUAL_TILES:
      for direction in DIRECTIONS:
        case = Case(chip, "ours", "s2", size, size)
        ours = our_tiles(results, case, problem, direction)
        row: dict[str, Any] = {
          "chip": chip,
          "tile": f"{size} x {size}",
          "direction": direction,
          "floor": round(floor(case, PRODUCTS[direction])),
          "ours": {kind: tile.figures() for kind, tile in ours.items()},
        }
        # The dearer of the full tiles.
        full = max(
          (tile for kind, tile in ours.items() if "full" in kind),
          key=lambda tile: tile.cycles,
          default=None,
        )
        if full:
          row["share_of_floor"] = round(row["floor"] / full.cycles, 3)
          row["full"] = full.figures()
        for mask in ("causal", "none"):
          splash = splash_tiles(results, chip, size, mask, direction)
          row[f"splash {mask}"] = {
            kernel: tile.figures() for kernel, tile in splash.items()
          }
          if full and splash:
            best = min(tile.cycles for tile in splash.values())
            row[f"ratio {mask}"] = round(full.cycles / best, 3)
        rows.append(row)
  return rows


def our_tiles(
  results: Results, case: Case, problem: Problem, direction: str
) -> dict[str, Tile]:
  """Our tiles by kind, as dear as they get; none if they do not compile."""
  tiles: dict[str, Tile] = {}
  for mask in ("causal", "s2"):
    masked = dataclasses.replace(case, mask=mask)
    schedules = results[masked]
    if isinstance(schedules, str):
      return {}
    found: dict[str, Tile] = {}
    for schedule, work in our_calls(masked, schedules, problem, direction):
      for kind, tile in work.tiles(masked, schedule, direction).items():
        found[kind] = found.get(kind, Tile()) + tile
    for kind, tile in found.items():
      tiles[kind] = max(
        tile, tiles.get(kind, tile), key=lambda each: each.cycles
      )
  return tiles


def splash_tiles(
  results: Results, chip: str, size: int, mask: str, direction: str
) -> dict[str, Tile]:
  """Splash attention's tile, by the kind of its backward pass."""
  tiles = {}
  for kernel in SPLASH:
    case = Case(chip, kernel, mask, size, size)
    schedules = results[case]
    if isinstance(schedules, str):
      continue
    tiles[kernel] = sum(
      (
        Tile.of(case, schedule, body, products)
        for part, products in PARTS[kernel][direction].items()
        for schedule in kernels(schedules, part)
        for body in schedule.tiles()
      ),
      start=Tile(),
    )
  return tiles


def whole_rows(results: Results, problem: Problem) -> list[dict[str, Any]]:
  """The whole problem, every kernel at its best tile size."""
  rows = []
  for chip in dict.fromkeys(case.chip for case in results):
    for direction in DIRECTIONS:
      ours, splash = (
        {
          case: cost(case, schedules, problem, direction)
          for case, schedules in results.items()
          if case.chip == chip
          and case.mask == "s2"
          and (case.kernel == "ours") == is_ours
          and not isinstance(schedules, str)
        }
        for is_ours, cost in ((True, our_cost), (False, splash_cost))
      )
      if not ours or not splash:
        continue
      row: dict[str, Any] = {"chip": chip, "direction": direction}
      for what in ("total", "tiles"):
        best = [
          min(costs, key=lambda case: getattr(costs[case], what))
          for costs in (ours, splash)
        ]
        mine, theirs = ours[best[0]], splash[best[1]]
        row[what] = {
          "ours": round(getattr(mine, what)),
          "ours_tile": f"{best[0].block_q} x {best[0].block_kv}",
          "ours_visits": mine.visits,
          "splash": round(getattr(theirs, what)),
          "splash_tile": f"{best[1].block_q} x {best[1].block_kv}",
          "splash_visits": theirs.visits,
          "splash_kernel": best[1].kernel,
          "ratio": round(getattr(theirs, what) / getattr(mine, what), 2),
        }
      rows.append(row)
  return rows


Cells = list[list[str]]


def tile_cells(rows: list[dict[str, Any]]) -> Cells:
  """The first table, header first."""

  def cycles(tile: dict[str, Any] | None) -> str:
    return f"{tile['cycles']:,}" if tile else "-"

  def edges(tiles: dict[str, Any], place: str) -> str:
    found = [each for name, each in tiles.items() if f"{place} edge" in name]
    return ", ".join(map(cycles, found)) or "-"

  def ratio(value: float | None) -> str:
    return f"{value:.2f}" if value else "-"

  cells = [
    "chip|tile|direction|ours, full|near edges|far edges|splash|ours : splash|"
    "splash, no mask|ours : that|MXU floor|share|MXU use".split("|")
  ]
  for row in rows:
    full = row.get("full")
    splash = [
      min(
        row[f"splash {mask}"].values(),
        key=lambda tile: tile["cycles"],
        default=None,
      )
      for mask in ("causal", "none")
    ]
    cells.append(
      [
        row["chip"],
        row["tile"],
        row["direction"],
        cycles(full),
        edges(row["ours"], "near"),
        edges(row["ours"], "far"),
        cycles(splash[0]),
        ratio(row.get("ratio causal")),
        cycles(splash[1]),
        ratio(row.get("ratio none")),
        f"{row['floor']:,}",
        f"{row['share_of_floor']:.0%}" if full else "-",
        f"{full['mxu_occupancy']:.0%}" if full else "-",
      ]
    )
  return cells


def whole_cells(rows: list[dict[str, Any]]) -> Cells:
  """The second table, header first."""
  cells = [
    "chip|direction|ours, Mcycles|tile|splash, Mcycles|tile|splash : ours|"
    "in tiles alone".split("|")
  ]
  for row in rows:
    total = row["total"]
    cells.append(
      [
        row["chip"],
        row["direction"],
        f"{total['ours'] / 1e6:.1f}",
        total["ours_tile"],
        f"{total['splash'] / 1e6:.1f}",
        total["splash_tile"],
        f"{total['ratio']:.2f}",
        f"{row['tiles']['ratio']:.2f}",
      ]
    )
  return cells


def show(
  console: rich.console.Console, title: str, cells: Cells, markdown: bool
) -> None:
  """Prints a table."""
  if markdown:
    rule = ["---", *("---:" for _ in cells[0][1:])]
    for row in (cells[0], rule, *cells[1:]):
      print("| " + " | ".join(row) + " |")
    print()
    return
  table = rich.table.Table(title=title)
  for name in cells[0]:
    table.add_column(name, justify="right")
  for row in cells[1:]:
    table.add_row(*row)
  console.print(table)


def wide_console() -> rich.console.Console:
  """One that wide tables fit on."""
  console = rich.console.Console()
  if not console.is_terminal:
    console.width = 160
  return console


def environment() -> dict[str, str]:
  """What the figures depend on."""
  return {
    "jax": jax.__version__,
    "libtpu": importlib.metadata.version("libtpu"),
  }


@one_line_errors
def main() -> None:
  config = tyro.cli(BenchConfig, description=__doc__)
  console = wide_console()
  problem = Problem()
  results = config.compile(cases(config.chips), problem)
  tiles, whole = tile_rows(results, problem), whole_rows(results, problem)
  show(
    console,
    f"Cycles of one tile, head size {HEAD_SIZE}, bfloat16",
    tile_cells(tiles),
    config.markdown,
  )
  show(
    console,
    f"Predicted cycles, {problem.length:,} tokens, {problem.heads} heads, "
    f"block {problem.block}, {problem.local} local, stride {problem.stride}",
    whole_cells(whole),
    config.markdown,
  )
  config.write(console, problem, tiles=tiles, whole=whole)


if __name__ == "__main__":
  main()
