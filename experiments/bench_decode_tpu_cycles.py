"""Counts TPU cycles of a decoding step over pages of one head, without a TPU.

    python -m experiments.bench_decode_tpu_cycles                # all chips
    python -m experiments.bench_decode_tpu_cycles --chips v5e

Our kernel is compiled with the real TPU compiler, whose final schedule says how
many cycles each part of it takes (see `bench_tpu_cycles.py`); a row of the
cache then costs what its turns run, and the copies take what the chip's memory
bandwidth lets through. Both overlap as in the kernel: copies of later turns
start before a turn computes, and a turn waits for its own. Reported are cycles
of one layer's step by budget, page size and dtype of pages, against

- the floor: bytes of the live pages at full bandwidth;
- live pages: the cost at a budget over that of the full cache, over the same
  ratio of pages, which would be 1;
- JAX's stock paged attention, given each KV head as a sequence of its own, and
  with pages of all heads, which keep what any head keeps.

What one cannot see here: latency of memory, and stalls of the schedule. Needs
`pip install 'jaxheads[aot]'`.
"""

import dataclasses
import pathlib
from typing import Any

import tyro

from experiments._decode_cycle_cases import (
  Case,
  Problem,
  compile_case,
  row_lengths,
)
from experiments._decode_cycle_costs import cost, live_pages
from experiments.bench_tpu_cycles import (
  Cells,
  CycleConfig,
  show,
  wide_console,
)
from jaxheads.errors import one_line_errors
from pallas_kernels.aot.bundles import Schedule

BUDGETS = (1.0, 0.6, 0.4, 0.2)
PAGE_SIZES = (32, 64, 128, 256)
QUANTISED = ("int8", "float8_e4m3fn", "float8_e5m2")
PAGE_SIZE = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(CycleConfig):
  """Counts TPU cycles of a decoding step."""

  json: pathlib.Path | None = pathlib.Path(
    "experiments/results/bench_decode_tpu_cycles.json"
  )
  """Where to write the figures as JSON."""


def cases(chips: tuple[str, ...]) -> list[Case]:
  """Everything to compile."""
  found = []
  for chip in chips:
    found += [Case(chip, "ours", "bfloat16", page) for page in PAGE_SIZES]
    found += [Case(chip, "ours", dtype, PAGE_SIZE) for dtype in QUANTISED]
    found += [
      Case(chip, kernel, "bfloat16", PAGE_SIZE)
      for kernel in ("stock, virtual", "stock, all heads")
    ]
  return found


def rows_of(
  results: dict[Case, list[Schedule] | str], problem: Problem
) -> list[dict[str, Any]]:
  """A row a case, budget and distribution over the heads."""
  rows = []
  for case, found in results.items():
    if isinstance(found, str):
      rows.append({**dataclasses.asdict(case), "absent": found})
      continue
    (schedule,) = found
    whole = None
    for budget in BUDGETS:
      for heads in ("even", "uneven"):
        if budget == 1.0 and heads == "uneven":
          continue
        lengths = row_lengths(problem, budget, heads)
        spent = cost(case, schedule, problem, lengths)
        pages = live_pages(case, problem, lengths)
        whole = whole or (spent.cycles, pages)
        relative = spent.cycles / whole[0]
        rows.append(
          {
            **dataclasses.asdict(case),
            "budget": budget,
            "heads": heads,
            "live_pages": pages,
            "cycles": round(spent.cycles),
            "core_cycles": round(spent.busy),
            "copy_cycles": round(spent.copying),
            "floor_cycles": round(spent.floor),
            "share_of_bandwidth": round(spent.floor / spent.cycles, 3),
            "speedup": round(1 / relative, 3),
            "over_live_pages": round(relative / (pages / whole[1]), 3),
          }
        )
  return rows


def cells(rows: list[dict[str, Any]]) -> Cells:
  """The table, header first."""
  table = [
    "chip|kernel|pages of|page|budget|Kcycles|copies|core|of bandwidth|"
    "faster than full|cost : live pages".split("|")
  ]
  for row in rows:
    start = [row["chip"], row["kernel"], row["dtype"], str(row["page_size"])]
    if "absent" in row:
      table.append([*start, row["absent"][:40], *"-" * 6])
      continue
    table.append(
      [
        *start,
        f"{row['budget']:.0%} {row['heads']}",
        f"{row['cycles'] / 1e3:.0f}",
        f"{row['copy_cycles'] / 1e3:.0f}",
        f"{row['core_cycles'] / 1e3:.0f}",
        f"{row['share_of_bandwidth']:.0%}",
        f"{row['speedup']:.2f}x",
        f"{row['over_live_pages']:.2f}",
      ]
    )
  return table


@one_line_errors
def main() -> None:
  config = tyro.cli(BenchConfig, description=__doc__)
  console = wide_console()
  problem = Problem()
  results = config.compile(cases(config.chips), problem, compile_case)
  rows = rows_of(results, problem)
  show(
    console,
    f"One layer's step: {problem.batch} sequences of {problem.length:,} tokens,"
    f" {problem.kv_heads} KV heads, {problem.groups} query heads each",
    cells(rows),
    config.markdown,
  )
  config.write(console, problem, rows=rows)


if __name__ == "__main__":
  main()
