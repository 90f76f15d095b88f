"""From cells to answers: the table, the five claims, and the figures."""

import json
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments._kv_eval_cells import Cell
from experiments._kv_eval_stats import (
  Interval,
  overlap_gap,
  paired_difference,
  proportion,
)
from jaxheads.training import figures

MODES = {
  "aware": "query-aware: cut after the question",
  "agnostic": "query-agnostic: cut before the question",
}
_RANDOM = tuple(f"task_kv random {seed}" for seed in range(3))
# What is claimed to be better, and than what; several methods are averaged.
_PAIRS = (
  (
    "1. Task-KV beats SnapKV at equal pages",
    ("task_kv by pages",),
    ("snapkv by pages",),
  ),
  ("2. farthest heads beat random ones", ("task_kv",), _RANDOM),
  ("2. random heads beat nearest ones", _RANDOM, ("task_kv nearest",)),
  ("2. farthest heads beat nearest ones", ("task_kv",), ("task_kv nearest",)),
  (
    "2. farthest heads beat the longest vectors",
    ("task_kv",),
    ("task_kv vnorm",),
  ),
  ("2. farthest heads beat a static list", ("task_kv",), ("task_kv static",)),
  ("2. full heads beat none", ("task_kv",), ("task_kv no full",)),
  (
    "3. middle tokens beat more recent ones",
    ("task_kv",),
    ("task_kv no middle",),
  ),
  ('5. "wo" beats "value" space', ("task_kv wo",), ("task_kv",)),
)
_OVERLAP = "4. tasks differ in their full heads"
_SHOWN = {
  "full": "full cache",
  "streaming": "StreamingLLM",
  "snapkv": "SnapKV",
  "ada_snapkv": "AdaKV",
  "ada_expected": "AdaKV, expected",
  "static_heads": "static heads",
  "task_kv": "Task-KV",
  "kvzip": "KVzip-style",
}
_COLOURS = (
  "#222222",
  "#E69F00",
  "#0072B2",
  "#56B4E9",
  "#009E73",
  "#CC79A7",
  "#D55E00",
  "#6E6E6E",
)
_MARKERS = ("", "v", "o", "s", "^", "D", "P", "x")
_FAINT = "#6E6E6E"

# Of each seed's model: {mode: {task: {(method, budget): cell}}, "sets": ...}.
Found = Sequence[dict[str, Any]]


def summary(
  found: Found, *, enough: float, page_size: int, record: dict[str, Any]
) -> dict[str, Any]:
  """What kv_eval.json holds.

  Args:
    found: Of each model, see `ask_all` of `kv_eval.py`.
    enough: Share of exact answers with the full cache that a task needs to
      judge methods.
    page_size: Of the pages that were counted.
    record: Put in front.
  """
  judged = {mode: _judged(found, mode, enough) for mode in MODES}
  result: dict[str, Any] = {
    **record,
    "page_size": page_size,
    "generated_tokens": "appended, by every method",
    "full_cache": {
      mode: {
        task: [
          _rounded(_all_exact(model[mode][task]["full", 1.0]))
          for model in found
        ]
        for task in found[0][mode]
      }
      for mode in MODES
    },
    "judged": {
      mode: [f"seed {number}: {task}" for number, task in judged[mode]]
      for mode in MODES
    },
    "budgets": {},
    "methods": {},
    "tasks": {},
    "claims": [],
  }
  for mode, pairs in judged.items():
    cells = [found[number][mode][task] for number, task in pairs]
    if not cells:
      continue
    budgets = sorted({budget for _, budget in cells[0]}, reverse=True)
    names = list(dict.fromkeys(name for name, _ in cells[0]))
    result["budgets"][mode] = budgets
    result["methods"][mode] = {
      name: {
        "exact": [
          _rounded(_pooled([cell[name, budget].exact for cell in cells]))
          for budget in budgets
        ],
        **{
          field: [
            round(
              float(
                np.mean([_mean(cell[name, budget], field) for cell in cells])
              ),
              4,
            )
            for budget in budgets
          ]
          for field in ("tokens", "kept", "paged")
        },
      }
      for name in names
    }
    result["tasks"][mode] = {
      name: {
        f"seed {number}: {task}": [
          _rounded(_all_exact(cell[name, budget])) for budget in budgets
        ]
        for (number, task), cell in zip(pairs, cells, strict=True)
      }
      for name in names
    }
    result["claims"] += _claims(mode, cells, budgets)
    sets = [
      {
        task: found[number]["sets"][mode][task]
        for own, task in pairs
        if own == number
      }
      for number in dict.fromkeys(number for number, _ in pairs)
    ]
    result["claims"] += _overlaps(mode, sets)
  return result


def as_markdown(results: dict[str, Any]) -> str:
  """The claims and the tables, for people."""
  lines = ["## Claims", ""]
  lines += ["| claim | cut | budget | difference (95 %) | answer |"]
  lines += ["| --- | --- | --- | --- | --- |"]
  for claim in results["claims"]:
    mean, low, high = claim["difference"]
    lines.append(
      f"| {claim['claim']} | {claim['mode']} | {claim['budget']} | "
      f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) | "
      f"{claim['answer']} |"
    )
  for mode, title in MODES.items():
    budgets = results["budgets"].get(mode)
    lines += ["", f"## Exact answers (%), {title}", ""]
    if not budgets:
      lines += ["No task is answered well enough with the full cache."]
      continue
    lines += ["Mean over: " + ", ".join(results["judged"][mode]) + ".", ""]
    lines += ["| method | " + " | ".join(f"{b:g}" for b in budgets) + " |"]
    lines += ["| --- |" + " --- |" * len(budgets)]
    for name, row in results["methods"][mode].items():
      cells = [
        f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        for mean, low, high in row["exact"]
      ]
      lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Tokens kept, and pages, over those of the full cache:", ""]
    lines += ["| method | " + " | ".join(f"{b:g}" for b in budgets) + " |"]
    lines += ["| --- |" + " --- |" * len(budgets)]
    for name, row in results["methods"][mode].items():
      cells = [
        f"{kept:.3f}, {paged:.3f}"
        for kept, paged in zip(row["kept"], row["paged"], strict=True)
      ]
      lines.append(f"| {name} | " + " | ".join(cells) + " |")
  lines += ["", "## Full cache, exact answers (%)", ""]
  lines += ["| task | " + " | ".join(MODES) + " |", "| --- | --- | --- |"]
  for task in results["full_cache"]["aware"]:
    shown = [
      ", ".join(
        f"{100 * seed[0]:.1f}" for seed in results["full_cache"][mode][task]
      )
      for mode in MODES
    ]
    lines.append(f"| {task} | " + " | ".join(shown) + " |")
  return "\n".join(lines) + "\n"


def plot_budgets(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
  """Exact answers over the budget, a panel for each time of the cut."""
  figure = Figure(figsize=(9.5, 4.2), dpi=150, layout="constrained")
  panels = figure.subplots(1, 2, sharey=True)
  for axes, (mode, title) in zip(panels, MODES.items(), strict=True):
    budgets = results["budgets"].get(mode, [])
    rows = results["methods"].get(mode, {})
    for (name, label), colour, marker in zip(
      _SHOWN.items(), _COLOURS, _MARKERS, strict=True
    ):
      if name not in rows:
        continue
      exact = 100 * np.array(rows[name]["exact"])
      axes.fill_between(
        budgets, exact[:, 1], exact[:, 2], color=colour, alpha=0.12, linewidth=0
      )
      axes.plot(
        budgets,
        exact[:, 0],
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.5,
        linestyle="--" if name in ("full", "kvzip") else "-",
        label=label,
      )
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("budget (share of the full cache)", fontsize=9)
    axes.set_xlim(1.02, 0.18)
    axes.set_ylim(-2, 102)
    _plain(axes)
  panels[0].set_ylabel("exact answers (%), mean of tasks", fontsize=9)
  handles: dict[str, Any] = {}
  for axes in panels:
    handles |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
  if handles:
    panels[1].legend(
      handles.values(),
      handles.keys(),
      frameon=False,
      fontsize=8,
      loc="center left",
      bbox_to_anchor=(1.01, 0.5),
    )
  figures.save(figure, path)


def plot_claims(results: dict[str, Any], path: str | os.PathLike[str]) -> None:
  """Differences in exact answers that are claimed, over budgets below 1."""
  claims = [
    claim
    for claim in results["claims"]
    if claim["budget"] == "below 1" and claim["claim"] != _OVERLAP
  ]
  names = list(dict.fromkeys(claim["claim"] for claim in claims))
  figure = Figure(
    figsize=(8, 1.3 + 0.36 * max(1, len(names))), dpi=150, layout="constrained"
  )
  axes = figure.subplots()
  axes.axvline(0, color=_FAINT, linewidth=0.8)
  for (mode, title), colour, marker, shift in zip(
    MODES.items(), ("#0072B2", "#D55E00"), "os", (-0.13, 0.13), strict=True
  ):
    own = [claim for claim in claims if claim["mode"] == mode]
    if not own:
      continue
    rows = [names.index(claim["claim"]) + shift for claim in own]
    mean, low, high = 100 * np.array([claim["difference"] for claim in own]).T
    axes.errorbar(
      mean,
      rows,
      xerr=[mean - low, high - mean],
      fmt=marker,
      color=colour,
      markersize=4.5,
      linewidth=1.4,
      label=title,
    )
  axes.set_yticks(range(len(names)), names)
  axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
  axes.set_xlabel(
    "difference in exact answers (points), 95 % interval; right of 0: it holds",
    fontsize=9,
  )
  if claims:
    axes.legend(
      frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(-0.4, 1.0)
    )
  _plain(axes, grid="x")
  figures.save(figure, path)


def _judged(found: Found, mode: str, enough: float) -> list[tuple[int, str]]:
  """(model, task) that methods are judged by."""
  return [
    (number, task)
    for number, model in enumerate(found)
    for task, cells in model[mode].items()
    if cells["full", 1.0].exact.mean() >= enough
    # Of the only token of an answer the prompt decides, before the cut.
    and not (mode == "aware" and task in model["one_token"])
  ]


def _claims(
  mode: str, cells: list[dict[tuple[str, float], Cell]], budgets: list[float]
) -> list[dict[str, Any]]:
  cut = [budget for budget in budgets if budget < 1]
  rows = []
  for claim, first, second in _PAIRS:
    for shown, chosen in (("below 1", cut), *((b, [b]) for b in cut)):
      difference = paired_difference(
        [_average(cell, first, chosen) for cell in cells],
        [_average(cell, second, chosen) for cell in cells],
      )
      rows.append(
        {
          "claim": claim,
          "mode": mode,
          "budget": shown,
          "difference": _rounded(difference),
          "answer": difference.verdict(),
        }
      )
  return rows


def _overlaps(
  mode: str, sets: list[dict[str, np.ndarray]]
) -> list[dict[str, Any]]:
  rows = []
  for number, own in enumerate(sets):
    seen = all(len(task) > 1 and task.any() for task in own.values())
    if len(own) < 2 or not seen:
      continue
    gap, within, across = overlap_gap(own)
    rows.append(
      {
        "claim": _OVERLAP,
        "mode": mode,
        "budget": "below 1",
        "model": number,
        "within_tasks": round(within, 4),
        "across_tasks": round(across, 4),
        "difference": _rounded(gap),
        "answer": gap.verdict(),
      }
    )
  return rows


def _average(
  cells: dict[tuple[str, float], Cell],
  names: Sequence[str],
  budgets: Sequence[float],
) -> Float[np.ndarray, " samples"]:
  """Exact answers of each prompt, over methods and budgets."""
  return np.mean(
    [cells[name, budget].exact for name in names for budget in budgets], axis=0
  )


def _pooled(exact: list[np.ndarray]) -> Interval:
  """Mean over tasks."""
  return paired_difference(exact, [np.zeros(len(cell)) for cell in exact])


def _all_exact(cell: Cell) -> Interval:
  return proportion(int(cell.exact.sum()), len(cell.exact))


def _mean(cell: Cell, field: str) -> float:
  return float(np.mean(getattr(cell, field)))


def _rounded(interval: Interval) -> list[float]:
  return json.loads(json.dumps([round(float(x), 4) for x in interval]))


def _plain(axes: Axes, grid: Literal["x", "y"] = "y") -> None:
  axes.grid(axis=grid, color="#E6E6E6", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(labelsize=8.5)
