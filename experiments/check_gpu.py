"""Checks the GPU kernels of head attention on the GPU here, then tunes them.

    python experiments/check_gpu.py                      # about ten minutes
    python experiments/check_gpu.py --minutes 0          # the checks only
    python experiments/check_gpu.py --json results/gpu.json

First every implementation against the float32 reference over a grid of
patterns, shapes and dtypes: output, log-sum-exp, gradients, and the same bits
twice. float32 must agree to 1e-5 (gradients 2e-5) of the tensor's largest
value; bfloat16 may be off by at most twice (gradients three times) what dense
attention of the same precision is. Then a few tile sizes per head size, timed
in turn, until the minutes are over. The exit status is 1 if a check failed.
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

from jaxheads.errors import UserError, one_line_errors
from pallas_kernels.head_attention import head_attention
from pallas_kernels.head_attention.contexts import (
  HeadContexts,
  Rule,
  Strided,
  Table,
)
from pallas_kernels.head_attention.tiling import Tiling

NAMES = ("out", "lse", "dq", "dk", "dv")
# Relative to the tensor's largest value, for float32.
LIMITS = {"out": 1e-5, "lse": 1e-5, "dq": 2e-5, "dk": 2e-5, "dv": 2e-5}
# How much worse than dense attention of the same precision.
FACTORS = {"out": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckConfig:
  """Checks the GPU kernels of head attention, then tunes them."""

  implementations: tuple[str, ...] = ("triton", "mosaic_gpu")
  """Which ones."""
  minutes: float = 9.0
  """Stop tuning after this long, checks included; 0 for the checks only."""
  length: int = 32768
  """Tokens of the problem that is timed."""
  rounds: int = 5
  """Timed runs of every tile size, after one that compiles."""
  json: pathlib.Path | None = None
  """Where to write the figures as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One problem of the grid."""

  name: str
  rules: tuple[Rule, ...]
  dtype: str = "float32"
  block: int = 64
  T: int = 1000
  S: int | None = None
  K: int = 2
  H: int = 64
  is_causal: bool = True
  cap: float | None = None
  has_segments: bool = False


def shards(heads: int, stride: int, local: int = 2) -> tuple[Strided, ...]:
  """Neighbouring heads share a residue in pairs."""
  return tuple(
    Strided(local=local, stride=stride, residue=head // 2 % stride)
    for head in range(heads)
  )


def cases() -> list[Case]:
  """The grid."""
  keep = np.random.default_rng(0).random((16, 16)) < 0.4
  table = Table.from_mask(keep)
  other = Table.from_mask(keep.T)
  window = (Strided(local=3, sinks=1),) * 4
  grid = [
    Case(name="strided", rules=shards(4, 4)),
    Case(name="whole tiles", rules=shards(4, 4), T=2048),
    Case(name="heads of 96", rules=shards(4, 4), H=96),
    Case(name="heads of 128", rules=shards(8, 4), H=128),
    Case(name="heads of 256", rules=shards(4, 4), H=256),
    Case(name="blocks of 16", rules=shards(4, 8), block=16),
    Case(name="blocks of 256", rules=shards(4, 2, 1), block=256),
    Case(name="dense", rules=shards(4, 1, 1)),
    Case(name="last queries", rules=shards(4, 4), T=300, S=1500),
    Case(name="soft cap", rules=shards(4, 4), cap=10.0),
    Case(name="segments", rules=shards(4, 4), has_segments=True),
    Case(name="sinks", rules=window),
    Case(name="tables", rules=(table, table), K=1),
    Case(name="not causal", rules=(table, other), K=1, is_causal=False),
  ]
  return [
    dataclasses.replace(case, dtype=dtype)
    for dtype in ("float32", "bfloat16")
    for case in grid
  ]


def run(
  case: Case, arrays: tuple[jax.Array, ...], implementation: str
) -> dict[str, np.ndarray]:
  """Output, log-sum-exp and gradients."""
  q, k, v, weights, q_segment_ids, kv_segment_ids = arrays
  options: dict[str, Any] = {}
  if case.has_segments:
    options = dict(q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids)

  def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    out, lse = head_attention(
      q,
      k,
      v,
      pattern=HeadContexts(case.block, case.rules, case.is_causal),
      logits_soft_cap=case.cap,
      return_lse=True,
      implementation=implementation,
      **options,
    )
    seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
    wide = out.astype(jnp.float32)
    return (wide * weights).sum() + jnp.sin(seen).sum(), (wide, seen)

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (_, (out, lse)), grads = jax.jit(grad)(q, k, v)
  values = (out, lse, *grads)
  return {
    name: np.asarray(value.astype(jnp.float32), np.float64)
    for name, value in zip(NAMES, values, strict=True)
  }


def make_arrays(case: Case) -> tuple[jax.Array, ...]:
  """Operands, the loss's weights, and segment ids."""
  keys = jax.random.split(jax.random.key(1), 6)
  S, N, dtype = case.S or case.T, len(case.rules), jnp.dtype(case.dtype)
  return (
    jax.random.normal(keys[0], (2, case.T, N, case.H), dtype),
    jax.random.normal(keys[1], (2, S, case.K, case.H), dtype),
    jax.random.normal(keys[2], (2, S, case.K, case.H), dtype),
    jax.random.normal(keys[3], (2, case.T, N, case.H)),
    jnp.sort(jax.random.randint(keys[4], (2, case.T), 0, 3)),
    jnp.sort(jax.random.randint(keys[5], (2, S), 0, 3)),
  )


def dense(case: Case, arrays: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
  """The whole attention matrix in the operands' own precision."""
  q, k, v, weights, q_segment_ids, kv_segment_ids = arrays
  T, S, N = case.T, k.shape[1], q.shape[2]
  queries = np.arange(T)[:, None] + S - T
  keys = np.arange(S)[None]
  masks = []
  for rule in case.rules:
    mask = rule.keep(queries // case.block, keys // case.block)
    masks.append(mask & (keys <= queries) if case.is_causal else mask)
  mask = jnp.asarray(np.stack(masks))[None]
  if case.has_segments:
    same = q_segment_ids[:, :, None] == kv_segment_ids[:, None]
    mask = mask & same[:, None]

  def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    wide_k = jnp.repeat(k, N // case.K, axis=2)
    wide_v = jnp.repeat(v, N // case.K, axis=2)
    logits = jnp.einsum(
      "btnh,bsnh->bnts", q, wide_k, preferred_element_type=jnp.float32
    )
    logits *= case.H**-0.5
    if case.cap is not None:
      logits = case.cap * jnp.tanh(logits / case.cap)
    logits = jnp.where(mask, logits, -1e30)
    kept = jnp.where(mask, jax.nn.softmax(logits, axis=-1), 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", kept.astype(v.dtype), wide_v)
    empty = ~mask.any(-1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    seen = jnp.where(empty, 0.0, lse).swapaxes(1, 2)  # [B, T, N]
    wide = out.astype(jnp.float32)
    return (wide * weights).sum() + jnp.sin(seen).sum(), (wide, seen)

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  (_, (out, lse)), grads = jax.jit(grad)(q, k, v)
  return {
    name: np.asarray(value.astype(jnp.float32), np.float64)
    for name, value in zip(NAMES, (out, lse, *grads), strict=True)
  }


def check(case: Case, implementation: str) -> dict[str, Any]:
  """One row: the errors, what they may be, and whether they are."""
  row: dict[str, Any] = {
    "implementation": implementation,
    "case": case.name,
    "dtype": case.dtype,
  }
  arrays = make_arrays(case)
  try:
    actual = run(case, arrays, implementation)
  except NotImplementedError as error:
    return row | {"verdict": "not covered", "why": str(error)}
  except Exception as error:  # The grid goes on; the row says what happened.
    return row | {"verdict": "FAILED", "why": repr(error)[:500]}
  again = run(case, arrays, implementation)
  exact = run(case, arrays, "reference")
  limits = {
    name: LIMITS[name] * float(np.abs(exact[name]).max()) for name in NAMES
  }
  if case.dtype != "float32":
    rounded = dense(case, arrays)
    for name, factor in FACTORS.items():
      theirs = np.abs(rounded[name] - exact[name]).max()
      limits[name] = factor * float(theirs)
    # Sums of products of bfloat16 numbers, in float32: rounded alike.
    limits["lse"] = 1e-4 * float(np.abs(exact["lse"]).max())
  errors = {
    name: float(np.abs(actual[name] - exact[name]).max()) for name in NAMES
  }
  same = all(np.array_equal(actual[name], again[name]) for name in NAMES)
  good = same and all(errors[name] <= limits[name] for name in NAMES)
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
  times: dict[Any, list[float]] = {key: [] for key in runs}
  for _ in range(config.rounds):
    for key, function in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      times[key].append((time.perf_counter() - start) * 1e3)
  return [
    {
      "implementation": implementation,
      "head_size": H,
      "direction": direction,
      "block_q": None if tiles is None else tiles[0],
      "block_kv": None if tiles is None else tiles[1],
      "median_ms": statistics.median(times[direction, tiles]),
    }
    for direction, tiles in runs
  ]


def show(console: rich.console.Console, rows: list[dict[str, Any]]) -> None:
  """The checks, for people."""
  table = rich.table.Table(title="Against the float32 reference")
  for name in ("implementation", "case", "dtype", "verdict", "error / limit"):
    table.add_column(name)
  for row in rows:
    worst = row.get("why", "")
    if "errors" in row:
      ratios = {
        name: row["errors"][name] / max(row["limits"][name], 1e-30)
        for name in NAMES
      }
      name = max(ratios, key=lambda name: ratios[name])
      worst = f"{ratios[name]:.2f} ({name})"
      if not row["is_deterministic"]:
        worst += ", other bits the second time"
    table.add_row(
      row["implementation"], row["case"], row["dtype"], row["verdict"], worst
    )
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
  checks = [
    check(case, implementation)
    for implementation in config.implementations
    for case in cases()
  ]
  show(console, checks)
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
    results = {"environment": facts, "checks": checks, "tiles": tiles}
    config.json.write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"wrote {config.json}")
  if any(row["verdict"] == "FAILED" for row in checks):
    sys.exit(1)


if __name__ == "__main__":
  main()
