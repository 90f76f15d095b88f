"""Checks the GPU kernels of attention on the GPU here, then times them.

    python experiments/check_gpu.py                      # about ten minutes
    python experiments/check_gpu.py --minutes 0          # the checks only
    python experiments/check_gpu.py --json results/gpu.json

First every implementation of head and of routed attention against the float32
reference over a grid of patterns, shapes and dtypes: output, log-sum-exp,
gradients, and the same bits twice. float32 must agree to 1e-5 (gradients 2e-5)
of the tensor's largest value; bfloat16 may be off by at most twice (gradients
three times) what dense attention of the same precision is. Then routed
attention, timed by how many heads a token picks, and a few tile sizes of head
attention per head size, each in turn, until the minutes are over. The exit
status is 1 if a check failed.
"""

import dataclasses
import functools
import json
import pathlib
import platform
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tyro

from experiments._gpu_cases import (
  Case,
  head_cases,
  routed_cases,
  shards,
)
from jaxheads.errors import UserError, one_line_errors
from pallas_kernels.head_attention import head_attention
from pallas_kernels.head_attention.contexts import HeadContexts
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.packing import gather_rows, pack
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import default_tiling

# Relative to the tensor's largest value, for float32.
LIMITS = {"out": 1e-5, "lse": 1e-5, "dq": 2e-5, "dk": 2e-5, "dv": 2e-5}
# How much worse than dense attention of the same precision.
FACTORS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
  """Checks the GPU kernels of attention, then times them."""

  implementations: tuple[str, ...] = ("triton", "mosaic_gpu")
  """Which ones."""
  minutes: float = 9.0
  """Stop timing after this long, checks included; 0 for the checks only."""
  length: int = 32768
  """Tokens of the problem that is timed."""
  rounds: int = 5
  """Timed runs of every tile size, after one that compiles."""
  json: pathlib.Path | None = None
  """Where to write the figures as JSON."""


def check(case: Case, implementation: str) -> dict[str, Any]:
  """One row: the errors, what they may be, and whether they are."""
  row: dict[str, Any] = {
    "implementation": implementation,
    "operation": case.operation,
    "case": case.name,
    "dtype": case.dtype,
  }
  arrays = case.arrays()
  try:
    actual = case.run(arrays, implementation)
  except NotImplementedError as error:
    return row | {"verdict": "not covered", "why": str(error)}
  except Exception as error:  # The grid goes on; the row says what happened.
    return row | {"verdict": "FAILED", "why": repr(error)[:500]}
  again = case.run(arrays, implementation)
  exact = case.run(arrays, "reference")
  limits = {
    name: LIMITS[name] * float(np.abs(values).max())
    for name, values in exact.items()
  }
  if case.dtype != "float32":
    rounded = case.dense(arrays)
    for name, factor in FACTORS.items():
      theirs = np.abs(rounded[name] - exact[name]).max()
      limits[name] = factor * float(theirs)
    if "lse" in limits:
      # Sums of products of bfloat16 numbers, in float32: rounded alike.
      limits["lse"] = 1e-4 * float(np.abs(exact["lse"]).max())
  errors = {
    name: float(np.abs(actual[name] - exact[name]).max()) for name in exact
  }
  same = all(np.array_equal(actual[name], again[name]) for name in exact)
  good = same and all(errors[name] <= limits[name] for name in exact)
  return row | {
    "verdict": "ok" if good else "FAILED",
    "errors": errors,
    "limits": limits,
    "is_deterministic": same,
  }


TILINGS = {
  "triton": (
    (128, 128),
    (128, 64),
    (64, 128),
    (64, 64),
    (128, 32),
    (64, 32),
    (32, 64),
  ),
  # Hopper's, then Blackwell's: the others' are not covered.
  "mosaic_gpu": ((128, 64), (128, 128), (256, 64), (256, 128)),
}


def tune(
  config: CheckConfig, H: int, implementation: str, deadline: float
) -> list[dict[str, Any]]:
  """Median times of a few tile sizes, forward and backward, in bfloat16."""
  N, K, T = 16, 4, config.length
  pattern = HeadContexts(64, tuple(shards(N, 16, 8)))
  keys = jax.random.split(jax.random.key(2), 4)
  q, weights = (
    jax.random.normal(key, (1, T, N, H), jnp.bfloat16) for key in keys[:2]
  )
  k, v = (
    jax.random.normal(key, (1, T, K, H), jnp.bfloat16) for key in keys[2:]
  )
  runs: dict[tuple[str, tuple[int, int] | None], Any] = {}
  for tiles in (None, *TILINGS[implementation]):
    if time.monotonic() > deadline:
      break
    tiling = tiles and Tiling(block_q=tiles[0], block_kv=tiles[1])

    def attend(
      q: jax.Array, k: jax.Array, v: jax.Array, tiling: Any = tiling
    ) -> jax.Array:
      return head_attention(
        q,
        k,
        v,
        pattern=pattern,
        tiling=tiling,
        implementation=implementation,
      )

    def pull(*operands: jax.Array, attend: Any = attend) -> Any:
      return jax.vjp(attend, *operands)[1](weights)

    functions: dict[str, Any] = {"forward": attend, "both": pull}
    for direction, function in functions.items():
      compiled = jax.jit(function)
      try:
        jax.block_until_ready(compiled(q, k, v))
      except Exception:  # Does not fit, or is not covered: not a candidate.
        continue
      runs[direction, tiles] = functools.partial(compiled, q, k, v)
  times = medians(runs, config.rounds)
  return [
    {
      "implementation": implementation,
      "head_size": H,
      "direction": direction,
      "block_q": None if tiles is None else tiles[0],
      "block_kv": None if tiles is None else tiles[1],
      "median_ms": times[direction, tiles],
    }
    for direction, tiles in runs
  ]


def time_routed(config: CheckConfig, deadline: float) -> list[dict[str, Any]]:
  """Median times of routed heads by active fraction, with all heads beside.

  In bfloat16, with sharded contexts and with all of the past visible.
  """
  N, K, H, T = 16, 4, 128, config.length
  keys = jax.random.split(jax.random.key(3), 5)
  q, weights = (
    jax.random.normal(key, (1, T, N, H), jnp.bfloat16) for key in keys[:2]
  )
  k, v = (
    jax.random.normal(key, (1, T, K, H), jnp.bfloat16) for key in keys[2:4]
  )
  order = jax.random.uniform(keys[4], (1, T, N)).argsort(axis=-1)
  runs: dict[tuple[str, int | None, str], Any] = {}
  for context, rules in (
    ("strided", shards(N, 16, 8)),
    ("dense", shards(N, 1, 1)),
  ):
    pattern = HeadContexts(64, rules)
    for active in (None, 4, 8, 12, 16):
      if time.monotonic() > deadline:
        break
      options: dict[str, Any] = dict(pattern=pattern, implementation="triton")
      attend: Any = functools.partial(head_attention, **options)
      rows, d_rows = q, weights
      if active is not None:
        tiling = default_tiling(T, T, active / N)
        packing = pack(
          order < active, num_active=active, block_rows=tiling.block_q
        )
        rows, d_rows = gather_rows(q, packing), gather_rows(weights, packing)
        attend = functools.partial(
          _attend_packed, tiling=tiling, packing=packing, **options
        )

      def pull(*operands: jax.Array, attend: Any = attend) -> Any:
        *operands_, d_out = operands
        return jax.vjp(attend, *operands_)[1](d_out)

      forward = jax.jit(attend), (rows, k, v)
      both = jax.jit(pull), (rows, k, v, d_rows)
      for direction, (function, operands) in (
        ("forward", forward),
        ("both", both),
      ):
        jax.block_until_ready(function(*operands))
        runs[context, active, direction] = functools.partial(
          function, *operands
        )
  times = medians(runs, config.rounds)
  return [
    {
      "operation": "head_attention" if active is None else "routed_attention",
      "implementation": "triton",
      "context": context,
      "active_heads": N if active is None else active,
      "heads": N,
      "head_size": H,
      "direction": direction,
      "median_ms": times[context, active, direction],
    }
    for context, active, direction in runs
  ]


def _attend_packed(
  rows: jax.Array, k: jax.Array, v: jax.Array, *, packing: Any, **options: Any
) -> jax.Array:
  return routed_attention(rows, k, v, packing, **options)


def medians(runs: dict[Any, Any], rounds: int) -> dict[Any, float]:
  """Milliseconds of functions without arguments, timed in turn."""
  times: dict[Any, list[float]] = {key: [] for key in runs}
  for _ in range(rounds):
    for key, function in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[key].append((time.perf_counter() - start) * 1e3)
  return {key: statistics.median(values) for key, values in times.items()}


def show(console: rich.console.Console, rows: list[dict[str, Any]]) -> None:
  """The checks, for people."""
  table = rich.table.Table(title="Against the float32 reference")
  columns = ("operation", "implementation", "case", "dtype", "verdict")
  for name in (*columns, "error / limit"):
    table.add_column(name)
  for row in rows:
    worst = row.get("why", "")
    if "errors" in row:
      ratios = {
        name: error / max(row["limits"][name], 1e-30)
        for name, error in row["errors"].items()
      }
      name = max(ratios, key=lambda name: ratios[name])
      worst = f"{ratios[name]:.2f} ({name})"
      if not row["is_deterministic"]:
        worst += ", other bits the second time"
    table.add_row(*(row[name] for name in columns), worst)
  console.print(table)


@one_line_errors
def main() -> None:
  config = tyro.cli(CheckConfig, description=__doc__)
  if jax.default_backend() != "gpu":
    raise UserError(
      f"This script needs a GPU; JAX runs on {jax.default_backend()!r} here. "
      'Install `jax[cuda13]` on a machine that has one, or see "interpreting" '
      "in tests/pallas_kernels/head_attention/test_triton.py."
    )
  console = rich.console.Console()
  device = jax.devices()[0]
  facts = {
    "jax": jax.__version__,
    "python": platform.python_version(),
    "device": device.device_kind,
  }
  console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
  deadline = time.monotonic() + 60 * config.minutes
  cases: list[Case] = [*head_cases(), *routed_cases()]
  checks = [
    check(case, implementation)
    for implementation in config.implementations
    for case in cases
  ]
  show(console, checks)
  routed: list[dict[str, Any]] = []
  if "triton" in config.implementations and time.monotonic() < deadline:
    routed = time_routed(config, deadline)
  for row in routed:
    console.print(row)
  tiles: list[dict[str, Any]] = []
  for H in (128, 64, 256):
    for implementation in config.implementations:
      if time.monotonic() < deadline:
        tiles += tune(config, H, implementation, deadline)
  for row in sorted(
    tiles,
    key=lambda row: (
      row["implementation"],
      row["head_size"],
      row["direction"],
      row["median_ms"],
    ),
  ):
    console.print(row)
  if config.json is not None:
    config.json.parent.mkdir(parents=True, exist_ok=True)
    results = {
      "environment": facts,
      "checks": checks,
      "routed": routed,
      "tiles": tiles,
    }
    config.json.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"wrote {config.json}")
  if any(row["verdict"] == "FAILED" for row in checks):
    sys.exit(1)


if __name__ == "__main__":
  main()
