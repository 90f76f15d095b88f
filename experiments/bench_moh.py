"""Times one attention layer: routed heads against all heads.

    python experiments/bench_moh.py                  # the README's table
    python experiments/bench_moh.py --lengths 8192 --active 0.25 --json out.json

Every variant is the same layer (`jaxheads.nn.MoHAttention`, causal, RoPE): the
baseline picks all routed heads through the same dispatch path, "dense" is all
heads through the whole attention matrix. With `--stride` every head has a
sharded context, and the baseline computes all heads without packing them.

Variants run in turn, round after round, and ratios are taken within a round, so
that a machine whose speed drifts favours nobody. Reported are medians over the
rounds.
"""

import dataclasses
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import rich.console
import rich.table
import tyro
from flax import nnx

from jaxheads import s2
from jaxheads.errors import UserError, one_line_errors
from jaxheads.moh import MoHConfig
from jaxheads.nn import MoHAttention, auxiliary_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """Times one attention layer: routed heads against all heads."""

  lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
  """Sequence lengths, in tokens."""
  active: tuple[float, ...] = (0.75, 0.5)
  """Fractions of active heads to compare with all heads."""
  heads: int = 16
  """Query heads."""
  kv_heads: int = 16
  """Key and value heads."""
  head_dim: int = 64
  """Size of one head; the layer's width is heads x head_dim."""
  shared: int | None = None
  """Heads that are always on; a quarter of the heads by default."""
  stride: int = 0
  """Vertical stride of sharded contexts (blocks of 64 tokens, 8 local); 0 is no
  sharding."""
  batch: int = 1
  """Sequences."""
  dtype: str = "float32"
  """Of the computation: float32 or bfloat16."""
  rounds: int = 7
  """Timed runs of every variant, after one that compiles."""
  dense_limit: int = 2048
  """Longest length at which the whole attention matrix is timed too."""
  json: pathlib.Path | None = None
  """Where to write the figures as JSON."""

  def __post_init__(self) -> None:
    if self.rounds < 1:
      raise UserError(f"`--rounds` must be at least 1, got {self.rounds}.")
    if self.stride < 0:
      raise UserError(f"`--stride` must not be negative, got {self.stride}.")
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(
        f"`--dtype` must be float32 or bfloat16, got {self.dtype!r}."
      )
    for length in self.lengths:
      if length < 1:
        raise UserError(f"`--lengths` must be positive, got {length}.")


@dataclasses.dataclass(frozen=True)
class Variant:
  """A layer to time."""

  name: str
  execution: str
  moh: MoHConfig


Run = Callable[[], Any]


def variants(config: BenchConfig, length: int) -> list[Variant]:
  """The baseline first, then what is compared with it."""

  def heads(active: float) -> MoHConfig:
    try:
      return MoHConfig.from_fraction(config.heads, active, shared=config.shared)
    except ValueError as error:
      raise UserError(str(error)) from None

  # The faster way to compute all heads.
  execution = "dense" if config.stride else "dispatch"
  listed = [Variant("all heads", execution, heads(1.0))]
  for active in config.active:
    moh = heads(active)
    listed.append(Variant(f"{moh.active_fraction:.0%}", "dispatch", moh))
  if length <= config.dense_limit and not config.stride:
    listed.append(Variant("dense", "dense", heads(1.0)))
  return listed


def make_runs(
  config: BenchConfig, length: int, variant: Variant
) -> dict[str, Run]:
  """Compiled forward, and forward plus backward, of one variant."""
  dtype = jnp.dtype(config.dtype)
  width = config.heads * config.head_dim
  try:
    layer = MoHAttention(
      config.heads,
      width,
      num_kv_heads=config.kv_heads,
      moh=variant.moh,
      pattern=pattern_of(config),
      rope_theta=10_000.0,
      use_bias=False,
      dtype=dtype,
      execution=variant.execution,
      rngs=nnx.Rngs(0),
    )
  except ValueError as error:
    raise UserError(str(error)) from None
  x = jax.random.normal(jax.random.key(1), (config.batch, length, width), dtype)
  parts: Any = nnx.split(layer, nnx.Param, ...)
  graph, params, rest = parts

  def forward(params: Any, x: jax.Array, rest: Any) -> jax.Array:
    return nnx.merge(graph, params, rest, copy=True)(x, is_causal=True)

  def loss(params: Any, x: jax.Array, rest: Any) -> jax.Array:
    merged = nnx.merge(graph, params, rest, copy=True)
    out = merged(x, is_causal=True).astype(jnp.float32)
    return jnp.mean(out * out) + 0.01 * auxiliary_loss(merged)

  jit_forward = jax.jit(forward)
  jit_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  return {
    "forward": lambda: jit_forward(params, x, rest),
    "forward+backward": lambda: jit_gradient(params, x, rest),
  }


def interleave(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
  """Milliseconds of every run in every round."""
  for run in runs.values():
    jax.block_until_ready(run())
  times: dict[str, list[float]] = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      times[name].append((time.perf_counter() - start) * 1e3)
  return times


def pattern_of(config: BenchConfig) -> s2.Pattern | None:
  """What each head sees; None is everything."""
  if not config.stride:
    return None
  return s2.strided(
    config.heads,
    num_kv_heads=config.kv_heads,
    local_blocks=8,
    vertical_stride=config.stride,
  )


def ideal_ratio(config: BenchConfig, length: int, moh: MoHConfig) -> float:
  """All heads over active heads, in FLOPs of the whole layer."""
  pattern = pattern_of(config)
  visible = (length + 1) / 2 * (pattern.density(length) if pattern else 1)

  def flops(heads: int) -> float:  # Per token and head size, 2 per MAC.
    width = config.heads * config.head_dim
    per_head = 4 * width + 4 * visible  # Q and O; logits and values.
    return heads * per_head + config.kv_heads * 4 * width

  return flops(config.heads) / flops(moh.num_active)


def measure(config: BenchConfig) -> list[dict[str, Any]]:
  """One row for each length, direction and variant."""
  rows = []
  for length in config.lengths:
    listed = variants(config, length)
    runs = {v.name: make_runs(config, length, v) for v in listed}
    for direction in ("forward", "forward+backward"):
      times = interleave(
        {name: run[direction] for name, run in runs.items()}, config.rounds
      )
      base = times[listed[0].name]
      for variant in listed:
        ratios = [b / t for b, t in zip(base, times[variant.name], strict=True)]
        rows.append(
          {
            "length": length,
            "direction": direction,
            "variant": variant.name,
            "execution": variant.execution,
            "active_heads": variant.moh.num_active,
            "shared_heads": variant.moh.num_shared,
            "median_ms": statistics.median(times[variant.name]),
            "min_ms": min(times[variant.name]),
            "speedup": statistics.median(ratios),
            "ideal_speedup": ideal_ratio(config, length, variant.moh),
          }
        )
  return rows


def environment() -> dict[str, Any]:
  """What the figures depend on."""
  device = jax.devices()[0]
  return {
    "jax": jax.__version__,
    "python": platform.python_version(),
    "platform": device.platform,
    "device": device.device_kind,
    "cpus": os.cpu_count(),
  }


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
  """The rows, for people."""
  result = rich.table.Table(title="One layer, against all heads active")
  for name in ("length", "direction", "heads", "median", "speed-up", "ideal"):
    result.add_column(name, justify="right")
  for row in rows:
    ideal = f"{row['ideal_speedup']:.2f}x"
    result.add_row(
      f"{row['length']:,}",
      row["direction"],
      row["variant"],
      f"{row['median_ms']:.1f} ms",
      f"{row['speedup']:.2f}x",
      "" if row["active_heads"] == rows[0]["active_heads"] else ideal,
    )
  return result


@one_line_errors
def main() -> None:
  config = tyro.cli(BenchConfig, description=__doc__)
  console = rich.console.Console()
  facts = environment()
  console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
  rows = measure(config)
  console.print(table(rows))
  if config.json is not None:
    settings = dataclasses.asdict(config) | {"json": None}
    config.json.parent.mkdir(parents=True, exist_ok=True)
    config.json.write_text(
      json.dumps(
        {"environment": facts, "settings": settings, "rows": rows}, indent=2
      )
      + "\n"
    )
    console.print(f"wrote {config.json}")


if __name__ == "__main__":
  main()
