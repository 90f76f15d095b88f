"""Times attention with a context of its own in every head.

    python experiments/bench_attention.py                # this machine's table
    python experiments/bench_attention.py --lengths 8192 --strides 8

Ours is `jaxheads.attention.attention` with `s2.strided` patterns of vertical
stride V, in its best implementation here. Against it run dense causal
attention (`jax.nn.dot_product_attention`: XLA on CPUs, cuDNN on GPUs; splash
attention on TPUs), our own path with everything visible (V = 1), and PyTorch's
FlexAttention with the same mask where torch is installed.

Variants run in turn, round after round, and ratios are taken within a round,
so that a machine whose speed drifts favours nobody. Reported are medians over
the rounds. A speed-up is against the fastest dense variant of that length; its
ceiling is the ratio of visible pairs of a query and a key.
"""

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import jax
import rich.console
import rich.table
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import _attention_cases as attention_cases
from experiments._attention_cases import Problem
from experiments._timing import (
  Calls,
  Unavailable,
  environment,
  interleave,
  write_json,
)
from jaxheads.errors import UserError, one_line_errors

_HERE = pathlib.Path(__file__).parent
_DIRECTIONS = ("forward", "forward+backward")
_ON_CPU = (2048, 4096, 8192)
_ON_ACCELERATOR = (2048, 4096, 8192, 16384, 32768, 65536, 131072)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """Times attention with a context of its own in every head."""

  lengths: tuple[int, ...] = ()
  """Sequence lengths; by default 2K to 8K on CPUs, 2K to 128K elsewhere."""
  strides: tuple[int, ...] = (8, 16, 32)
  """Vertical strides V."""
  local_blocks: int = 8
  """Blocks of the sliding window, L."""
  block_size: int = 64
  """Tokens of a block, b; a power of two."""
  heads: int = 8
  """Query heads."""
  kv_heads: int | None = None
  """Key and value heads; as many as query heads by default."""
  head_dim: int | None = None
  """Size of one head; by default 64 on CPUs, 128 elsewhere."""
  batch: int = 1
  """Sequences."""
  dtype: str | None = None
  """float32 or bfloat16; by default float32 on CPUs, bfloat16 elsewhere."""
  rounds: int = 5
  """Timed runs of every variant, after one that compiles."""
  dense_limit_gib: float = 12.0
  """Dense attention in XLA is left out where it needs more memory."""
  break_even_length: int = 4096
  """Length of the break-even table; 0 leaves it out."""
  json: pathlib.Path | None = None
  """Where to write the figures; by default under experiments/results."""
  png: pathlib.Path | None = None
  """Where to draw them; by default under experiments/figures."""

  def __post_init__(self) -> None:
    size = self.block_size
    if size < 1 or size & (size - 1):
      raise UserError(f"`--block-size` must be a power of two, got {size}.")
    for name, values in (
      ("lengths", self.lengths),
      ("break-even-length", (self.break_even_length,)),
    ):
      for length in values:
        if length % size or length < (name == "lengths"):
          raise UserError(
            f"`--{name}` must be a positive multiple of the block size {size}, "
            f"got {length}."
          )
    for stride in self.strides:
      if stride < 2:
        raise UserError(
          f"`--strides` must be at least 2 (1 is always timed), got {stride}."
        )
    for name in ("local_blocks", "heads", "batch", "rounds"):
      if getattr(self, name) < 1:
        flag = name.replace("_", "-")
        raise UserError(
          f"`--{flag}` must be at least 1, got {getattr(self, name)}."
        )
    if self.kv_heads is not None and (
      self.kv_heads < 1 or self.heads % self.kv_heads
    ):
      raise UserError(
        f"`--kv-heads` must divide the {self.heads} heads, got {self.kv_heads}."
      )
    if self.head_dim is not None and self.head_dim < 1:
      raise UserError(f"`--head-dim` must be positive, got {self.head_dim}.")
    if self.dtype not in (None, "float32", "bfloat16"):
      raise UserError(
        f"`--dtype` must be float32 or bfloat16, got {self.dtype!r}."
      )

  def resolved(self) -> "BenchConfig":
    """With the defaults of this machine."""
    backend = jax.default_backend()
    is_cpu = backend == "cpu"
    name = f"bench_attention_{backend}"
    return dataclasses.replace(
      self,
      lengths=self.lengths or (_ON_CPU if is_cpu else _ON_ACCELERATOR),
      kv_heads=self.kv_heads or self.heads,
      head_dim=self.head_dim or (64 if is_cpu else 128),
      dtype=self.dtype or ("float32" if is_cpu else "bfloat16"),
      json=self.json or _HERE / "results" / f"{name}.json",
      png=self.png or _HERE / "figures" / f"{name}.png",
    )

  def problem(self, length: int) -> Problem:
    """The inputs of one length."""
    assert self.kv_heads and self.head_dim and self.dtype
    return Problem.make(
      batch=self.batch,
      length=length,
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      dtype=self.dtype,
      block_size=self.block_size,
      local_blocks=self.local_blocks,
    )


@dataclasses.dataclass(frozen=True)
class Variant:
  """Something to time.

  Attributes:
    name: For the tables.
    stride: V of the mask; 1 is dense causal attention.
    make: Compiled calls, or `Unavailable`.
    is_ours: Not a baseline.
  """

  name: str
  stride: int
  make: Callable[[], Calls]
  is_ours: bool = False


def variants(
  config: BenchConfig, problem: Problem, strides: tuple[int, ...]
) -> list[Variant]:
  """Dense ones first; `strides` are what else of ours to time."""
  listed = [
    Variant(
      "dense, jax.nn",
      1,
      functools.partial(
        attention_cases.dense, problem, limit_gib=config.dense_limit_gib
      ),
    )
  ]
  if jax.default_backend() == "tpu":
    listed.append(
      Variant(
        "dense, splash", 1, functools.partial(attention_cases.splash, problem)
      )
    )
  for stride in (1, *strides):
    listed.append(
      Variant(
        f"ours, V={stride}",
        stride,
        functools.partial(attention_cases.ours, problem, stride),
        is_ours=True,
      )
    )
  for stride in strides:
    listed.append(
      Variant(
        f"FlexAttention, V={stride}",
        stride,
        functools.partial(attention_cases.flex, problem, stride),
      )
    )
  return listed


def measure(
  config: BenchConfig, length: int, strides: tuple[int, ...]
) -> list[dict[str, Any]]:
  """One row for each direction and variant."""
  problem = config.problem(length)
  listed = variants(config, problem, strides)
  pairs = {s: problem.visible_pairs(s) for s in (1, *strides)}
  made: dict[str, Calls] = {}
  absent: dict[str, str] = {}
  for variant in listed:
    try:
      made[variant.name] = variant.make()
    except Unavailable as reason:
      absent[variant.name] = str(reason)
  rows = []
  for direction in _DIRECTIONS:
    calls = {name: both[direction] for name, both in made.items()}
    times, failed = interleave(calls, config.rounds)
    medians = {name: statistics.median(t) for name, t in times.items()}
    dense = [v.name for v in listed if v.stride == 1 and v.name in medians]
    best = min(dense, key=lambda name: medians[name], default=None)
    for variant in listed:
      row: dict[str, Any] = {
        "length": length,
        "direction": direction,
        "variant": variant.name,
        "stride": variant.stride,
        "is_ours": variant.is_ours,
        "visible_pairs": pairs[variant.stride],
        "density": pairs[variant.stride] / pairs[1],
        "ceiling": pairs[1] / pairs[variant.stride],
      }
      if variant.name not in times:
        why = absent.get(variant.name) or failed[variant.name]
        rows.append(row | {"absent": why})
        continue
      mine = times[variant.name]
      row |= {"median_ms": medians[variant.name], "min_ms": min(mine)}
      if best is not None:
        ratio = statistics.median(
          b / t for b, t in zip(times[best], mine, strict=True)
        )
        row |= {
          "best_dense": best,
          "speedup": ratio,
          "of_ceiling": ratio / row["ceiling"],
        }
      rows.append(row)
  return rows


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Time against visible pairs wherever a length doubles."""
  ours = {
    (row["direction"], row["stride"], row["length"]): row
    for row in rows
    if row["is_ours"] and "median_ms" in row
  }
  return [
    {
      "direction": direction,
      "stride": stride,
      "length": length,
      "time_ratio": longer["median_ms"] / row["median_ms"],
      "pairs_ratio": longer["visible_pairs"] / row["visible_pairs"],
    }
    for (direction, stride, length), row in ours.items()
    if (longer := ours.get((direction, stride, 2 * length)))
  ]


def break_even(config: BenchConfig) -> list[dict[str, Any]]:
  """From almost everything visible to little: when are shards worth it?"""
  length = config.break_even_length
  listed = [
    row
    for row in measure(config, length, (2, 3, 4, 6, 8, 16))
    if not row["variant"].startswith("FlexAttention")
  ]
  return sorted(listed, key=lambda row: (row["direction"], -row["density"]))


def table(rows: list[dict[str, Any]], title: str) -> rich.table.Table:
  """The rows, for people."""
  result = rich.table.Table(title=title)
  for name in (
    "length",
    "direction",
    "variant",
    "density",
    "median",
    "speed-up",
    "ceiling",
    "reached",
  ):
    result.add_column(name, justify="right")
  for row in rows:
    cells = [f"{row['length']:,}", row["direction"], row["variant"]]
    cells.append(f"{row['density']:.1%}")
    if "absent" in row:
      result.add_row(*cells, "-")
      continue
    cells.append(f"{row['median_ms']:.1f} ms")
    if "speedup" in row:
      cells.append(f"{row['speedup']:.2f}x")
      cells.append(f"{row['ceiling']:.2f}x")
      cells.append(f"{row['of_ceiling']:.0%}")
    result.add_row(*cells)
  return result


def growth_table(rows: list[dict[str, Any]]) -> rich.table.Table:
  """Doubled lengths, for people."""
  result = rich.table.Table(title="Twice the length")
  for name in ("from", "direction", "V", "time", "visible pairs", "off by"):
    result.add_column(name, justify="right")
  for row in rows:
    result.add_row(
      f"{row['length']:,}",
      row["direction"],
      str(row["stride"]),
      f"{row['time_ratio']:.2f}x",
      f"{row['pairs_ratio']:.2f}x",
      f"{row['time_ratio'] / row['pairs_ratio'] - 1:+.0%}",
    )
  return result


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
  """Time over length, a line a variant; on a canvas of its own."""
  figure = Figure(figsize=(11, 4.5), layout="constrained")
  FigureCanvasAgg(figure)
  for index, direction in enumerate(_DIRECTIONS):
    axes = figure.add_subplot(1, 2, index + 1)
    for name in dict.fromkeys(row["variant"] for row in rows):
      points = [
        (row["length"], row["median_ms"])
        for row in rows
        if row["variant"] == name
        and row["direction"] == direction
        and "median_ms" in row
      ]
      if points:
        style = "o-" if name.startswith("ours") else "s--"
        axes.plot(*zip(*points, strict=True), style, label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["length"] for row in rows})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("median, ms")
    axes.set_title(direction)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


@one_line_errors
def main() -> None:
  config = tyro.cli(BenchConfig, description=__doc__).resolved()
  console = rich.console.Console()
  facts = environment()
  console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
  rows = []
  for length in config.lengths:
    rows += measure(config, length, config.strides)
  title = f"Attention, L={config.local_blocks}, b={config.block_size}"
  console.print(table(rows, title))
  for row in rows:
    if "absent" in row and row["direction"] == _DIRECTIONS[-1]:
      where = f"{row['variant']}, {row['length']:,} tokens"
      console.print(f"{where}: {row['absent']}")
  doubled = growth(rows)
  if doubled:
    console.print(growth_table(doubled))
  even = break_even(config) if config.break_even_length else []
  if even:
    console.print(table(even, "Break-even"))
  assert config.json is not None and config.png is not None
  settings = dataclasses.asdict(config) | {"json": None, "png": None}
  write_json(
    config.json,
    {
      "environment": facts,
      "settings": settings,
      "rows": rows,
      "doubled": doubled,
      "break_even": even,
    },
  )
  draw(rows, config.png)
  console.print(f"wrote {config.json} and {config.png}")


if __name__ == "__main__":
  main()
