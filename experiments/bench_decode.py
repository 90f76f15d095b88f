r"""Times decoding with budgeted caches against the full cache, in one engine.

    python -m experiments.bench_decode                   # the README's table
    python -m experiments.bench_decode --lengths 2048 --batches 1 --rounds 3

For every prompt length and batch size, one engine a budget reads the same
prompts; then their decoding steps are timed by turns, so that a machine whose
speed drifts favours nobody. Reported are medians over the rounds, as ratios to
the full cache within a round, and beside them

- logical: tokens kept over those of the full cache;
- pages: pages really allocated over those of the full cache;
- read: bytes of keys and values that a step reads;
- pool: bytes of a pool that is just large enough, and the device's peak:
  weights, pool and the largest program's temporaries, as its compiler says.

The model's weights are random: nothing that is timed depends on them.
"""

import dataclasses
import functools
import pathlib
import statistics
from typing import Any

import numpy as np
import rich.console
import rich.table
import tyro
from flax import nnx

from experiments._timing import environment, interleave, write_json
from jaxheads.errors import UserError, one_line_errors
from jaxheads.kvcache.names import make_policy
from jaxheads.kvcache.policy import CacheShape
from jaxheads.kvcache.rows import most_pages
from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.serve.engine import Engine, EngineConfig
from jaxheads.serve.request import Request, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """Times decoding with budgeted caches against the full cache."""

  lengths: tuple[int, ...] = (2048, 8192)
  """Tokens of a prompt."""
  batches: tuple[int, ...] = (1, 8)
  """Sequences of a step."""
  budgets: tuple[float, ...] = (1.0, 0.4)
  """Fractions of the cache to keep; others are compared to the first."""
  policy: str = "task_kv"
  """What heads keep; see `jaxheads.kvcache.names.POLICIES`."""
  layers: int = 4
  """Layers of the model."""
  heads: int = 8
  """Query heads."""
  kv_heads: int = 8
  """KV heads."""
  head_dim: int = 64
  """Size of one head; the model's width is heads x head_dim."""
  dtype: str = "float32"
  """float32 or bfloat16, of model and cache."""
  page_size: int | None = None
  """Tokens of a page; the engine's choice by default."""
  steps: int = 8
  """Steps of a timed run."""
  rounds: int = 11
  """Timed runs of every budget."""
  json: pathlib.Path | None = None
  """Where to write the figures as JSON."""

  def __post_init__(self) -> None:
    for name in ("layers", "heads", "kv_heads", "head_dim", "steps", "rounds"):
      if getattr(self, name) < 1:
        flag = name.replace("_", "-")
        raise UserError(
          f"`--{flag}` must be at least 1, got {getattr(self, name)}."
        )
    for name in ("lengths", "batches"):
      if min(getattr(self, name), default=0) < 1:
        raise UserError(f"`--{name}` must be positive numbers.")
    if not self.budgets or not all(0 < x <= 1 for x in self.budgets):
      raise UserError("`--budgets` must be in (0, 1].")
    if self.dtype not in ("float32", "bfloat16"):
      raise UserError(
        f"`--dtype` must be float32 or bfloat16, got {self.dtype!r}."
      )


def main() -> None:
  run(tyro.cli(BenchConfig, description=__doc__))


def run(config: BenchConfig) -> dict[str, Any]:
  console = rich.console.Console()
  rows = []
  for length in config.lengths:
    for batch in config.batches:
      found = _measure(config, length, batch)
      console.print(_table(length, batch, found))
      rows += found
  settings = dataclasses.asdict(config)
  del settings["json"]
  figures = {"environment": environment(), "config": settings, "rows": rows}
  if config.json is not None:
    write_json(config.json, figures)
  return figures


def _measure(
  config: BenchConfig, length: int, batch: int
) -> list[dict[str, Any]]:
  """One row for each budget."""
  # One run to warm up, and one step that only begins.
  answer = (config.rounds + 1) * config.steps + batch + 8
  model = _model(config, length + answer)
  engines = {
    str(budget): _fill(config, model, budget, length, answer, batch)
    for budget in config.budgets
  }
  sequences = {name: engine.snapshot() for name, engine in engines.items()}
  pages = {name: engine.stats().pages_used for name, engine in engines.items()}

  def step(engine: Engine) -> None:
    for _ in range(config.steps):
      engine.step()
    engine.wait()  # The device is a turn behind.

  times, reasons = interleave(
    {name: functools.partial(step, engine) for name, engine in engines.items()},
    config.rounds,
  )
  if reasons:
    raise UserError(f"A budget cannot be timed: {reasons}.")
  first = str(config.budgets[0])
  rows = []
  for name, engine in engines.items():
    memory = engine.memory
    page_bytes = memory.pool // (engine.stats().pages_total + 1)
    ratios = [a / b for a, b in zip(times[first], times[name], strict=True)]
    milliseconds = statistics.median(times[name]) / config.steps
    rows.append(
      {
        "length": length,
        "batch": batch,
        "budget": float(name),
        "logical": statistics.mean(s["kept_fraction"] for s in sequences[name]),
        "pages": pages[name],
        "pages_ratio": pages[name] / pages[first],
        "read_bytes": pages[name] * page_bytes,
        "pool_bytes": memory.pool,
        "peak_bytes": sum(memory),
        "step_ms": milliseconds,
        "tokens_per_second": 1e3 * batch / milliseconds,
        "speedup": statistics.median(ratios),
        "speedups": ratios,
      }
    )
  return rows


def _model(config: BenchConfig, max_seq_len: int) -> DecoderLM:
  width = config.heads * config.head_dim
  sizes = ModelConfig(
    vocab_size=512,
    num_layers=config.layers,
    embed_dim=width,
    mlp_dim=round(8 * width / 3),  # As LLaMA's.
    num_heads=config.heads,
    num_kv_heads=config.kv_heads,
    head_dim=config.head_dim,
    max_seq_len=max_seq_len,
    head_plans=(None,) * config.layers,
    dtype=config.dtype,
    param_dtype=config.dtype,
  )
  return DecoderLM(sizes, rngs=nnx.Rngs(0))


def _fill(
  config: BenchConfig,
  model: DecoderLM,
  budget: float,
  length: int,
  answer: int,
  batch: int,
) -> Engine:
  """An engine that has read its prompts, in a pool that just holds them."""
  policy = make_policy(config.policy)
  sizes = EngineConfig(max_batch=batch, page_size=config.page_size)
  page_size = sizes.resolve_page_size(model.config)
  shape = CacheShape(config.layers, config.kv_heads)
  plan = policy.plan(length, budget, shape)
  (most,) = most_pages(
    plan.lengths,
    plan.rings,
    first=length,
    count=answer,
    page_size=page_size,
    drops=lambda position: policy.drops(position, page_size, shape),
  )
  # Newcomers leave a page for each row that grows.
  spare = (batch + 1) * plan.lengths.size
  engine = Engine(
    model,
    policy=policy,
    budget=budget,
    config=dataclasses.replace(sizes, num_pages=1 + batch * int(most) + spare),
  )
  rng = np.random.default_rng(0)
  for index in range(batch):
    tokens = rng.integers(0, model.config.vocab_size, length)
    engine.submit(
      Request(
        id=str(index),
        prompt=tuple(tokens.tolist()),
        params=SamplingParams(max_tokens=answer, temperature=0),
      )
    )
  while len(engine.snapshot()) < batch:
    engine.step()
  return engine


def _table(
  length: int, batch: int, rows: list[dict[str, Any]]
) -> rich.table.Table:
  table = rich.table.Table(
    title=f"prompts of {length:,} tokens, batch {batch}", title_justify="left"
  )
  for name in (
    "budget",
    "logical",
    "pages",
    "read/step",
    "pool",
    "peak",
    "step",
    "tokens/s",
    "speedup",
  ):
    table.add_column(name, justify="right")
  for row in rows:
    table.add_row(
      f"{row['budget']:.0%}",
      f"{row['logical']:.3f}",
      f"{row['pages_ratio']:.3f}",
      *(
        f"{row[name] / 2**20:,.0f} MiB"
        for name in ("read_bytes", "pool_bytes", "peak_bytes")
      ),
      f"{row['step_ms']:.1f} ms",
      f"{row['tokens_per_second']:.1f}",
      f"{row['speedup']:.2f}x",
    )
  return table


if __name__ == "__main__":
  one_line_errors(main)()
