r"""Times routed heads against all heads: attention alone, a layer, decoding.

    python -m experiments.bench_moh                     # the README's tables
    python -m experiments.bench_moh --subjects layer --lengths 8192
    python -m experiments.bench_moh --subjects decode --kv-heads 4 \
      --group-size 4

Subjects:
- operator: attention of packed rows, with packing and unpacking, against the
  same with all heads active; beside it the platform's best dense attention.
- layer: `jaxheads.nn.MoHAttention`, causal, with RoPE.
- decode: the layer's step of one token a sequence, after so many tokens.

On CPUs "all heads" of a layer takes the same dispatch path; with `--stride`
every head has a sharded context, and it computes all heads without packing.

Variants run in turn, round after round, and ratios are taken within a round, so
that a machine whose speed drifts favours nobody. Reported are medians over the
rounds. Ideal is the ratio of active heads (operator), of FLOPs (layer) or of
bytes (decode).
"""

import dataclasses
import functools
import pathlib
import statistics
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import rich.console
import rich.table
import tyro

from experiments import _attention_cases as attention_cases
from experiments import _moh_cases as cases
from experiments._moh_cases import Sizes
from experiments._timing import (
  Calls,
  Unavailable,
  environment,
  interleave,
  write_json,
)
from jaxheads.errors import UserError, one_line_errors
from jaxheads.moh import MoHConfig

Subject = Literal["operator", "layer", "decode"]
_ON_CPU = (512, 1024, 2048, 4096)
_ON_ACCELERATOR = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
_ALL = "all heads"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
  """Times routed heads against all heads."""

  subjects: tuple[Subject, ...] = ("operator", "layer", "decode")
  """What to time."""
  lengths: tuple[int, ...] = ()
  """Tokens of a sequence; by default 512 to 4K on CPUs, else 1K to 128K."""
  active: tuple[float, ...] = (0.9, 0.75, 0.5)
  """Fractions of active heads to compare with all heads."""
  heads: int = 16
  """Query heads."""
  kv_heads: int | None = None
  """Key and value heads; as many as query heads by default."""
  head_dim: int = 64
  """Size of one head; the layer's width is heads x head_dim."""
  shared: int | None = None
  """Heads that are always on; a quarter of the heads by default."""
  group_size: int = 1
  """Heads that are picked together."""
  stride: int = 0
  """Vertical stride of sharded contexts (blocks of 64 tokens, 8 local); 0 is no
  sharding."""
  batch: int = 1
  """Sequences."""
  decode_batch: int = 8
  """Sequences of a decoding step."""
  dtype: str | None = None
  """float32 or bfloat16; by default float32 on CPUs, bfloat16 elsewhere."""
  rounds: int = 7
  """Timed runs of every variant, after one that compiles."""
  dense_limit: int = 2048
  """Longest length at which XLA's whole attention matrix is timed too."""
  json: pathlib.Path | None = None
  """Where to write the figures as JSON."""

  def __post_init__(self) -> None:
    for name in ("rounds", "heads", "head_dim", "batch", "decode_batch"):
      if getattr(self, name) < 1:
        flag = name.replace("_", "-")
        raise UserError(
          f"`--{flag}` must be at least 1, got {getattr(self, name)}."
        )
    if self.stride < 0:
      raise UserError(f"`--stride` must not be negative, got {self.stride}.")
    if self.dtype not in (None, "float32", "bfloat16"):
      raise UserError(
        f"`--dtype` must be float32 or bfloat16, got {self.dtype!r}."
      )
    if self.kv_heads is not None and (
      self.kv_heads < 1 or self.heads % self.kv_heads
    ):
      raise UserError(
        f"`--kv-heads` must divide the {self.heads} heads, got {self.kv_heads}."
      )
    for length in self.lengths:
      if length < 1:
        raise UserError(f"`--lengths` must be positive, got {length}.")

  def resolved(self) -> "BenchConfig":
    """With the defaults of this machine."""
    is_cpu = jax.default_backend() == "cpu"
    return dataclasses.replace(
      self,
      lengths=self.lengths or (_ON_CPU if is_cpu else _ON_ACCELERATOR),
      kv_heads=self.kv_heads or self.heads,
      dtype=self.dtype or ("float32" if is_cpu else "bfloat16"),
    )

  def sizes(self, subject: Subject, length: int) -> Sizes:
    """One problem."""
    assert self.kv_heads and self.dtype
    return Sizes(
      batch=self.decode_batch if subject == "decode" else self.batch,
      length=length,
      heads=self.heads,
      kv_heads=self.kv_heads,
      head_dim=self.head_dim,
      stride=self.stride,
      dtype=self.dtype,
    )

  def plan(self, active: float) -> MoHConfig:
    """The heads of a layer."""
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # About training.
        return MoHConfig.from_fraction(
          self.heads, active, shared=self.shared, group_size=self.group_size
        )
    except ValueError as error:
      raise UserError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Variant:
  """Something to time.

  Attributes:
    name: For the tables.
    moh: Which heads are active.
    make: Compiled calls, or `Unavailable`.
    ideal: Speed-up against all heads that what is computed would allow.
    kv_read: KV heads that are read, of all.
  """

  name: str
  moh: MoHConfig
  make: Callable[[], Calls]
  ideal: float = 1.0
  kv_read: float = 1.0


def variants(
  config: BenchConfig, subject: Subject, length: int
) -> list[Variant]:
  """The baseline first, then what is compared with it."""
  sizes = config.sizes(subject, length)
  makers = {"operator": _operator, "layer": _layer, "decode": _decode}
  make = makers[subject]
  everything = config.plan(1.0)
  listed = [make(_ALL, sizes, everything)]
  for active in config.active:
    moh = config.plan(active)
    listed.append(make(f"{moh.active_fraction:.0%}", sizes, moh))
  if subject == "operator":
    listed.append(
      Variant(
        "not packed",
        everything,
        functools.partial(cases.whole_operator, sizes),
      )
    )
  if config.stride:
    return listed
  if subject == "layer" and length <= config.dense_limit:
    dense = functools.partial(cases.whole_layer, sizes, everything, "dense")
    listed.append(Variant("dense", everything, dense))
  if subject == "operator":
    # Logits, weights and their gradients, up to the longest length allowed.
    limit = 16 * config.batch * config.heads * config.dense_limit**2 / 2**30
    problem = sizes.problem()
    for name, dense in (
      (
        "dense, jax.nn",
        functools.partial(attention_cases.dense, problem, limit_gib=limit),
      ),
      ("dense, splash", functools.partial(attention_cases.splash, problem)),
    ):
      listed.append(Variant(name, everything, dense))
  return listed


def _operator(name: str, sizes: Sizes, moh: MoHConfig) -> Variant:
  make = functools.partial(cases.packed_operator, sizes, moh)
  return Variant(name, moh, make, 1 / moh.active_fraction)


def _layer(name: str, sizes: Sizes, moh: MoHConfig) -> Variant:
  # The faster way to compute all heads.
  execution = "dense" if sizes.stride and name == _ALL else "dispatch"
  make = functools.partial(cases.whole_layer, sizes, moh, execution)
  flops = functools.partial(cases.layer_flops, sizes)
  return Variant(name, moh, make, flops(sizes.heads) / flops(moh.num_active))


def _decode(name: str, sizes: Sizes, moh: MoHConfig) -> Variant:
  make = functools.partial(cases.decode_step, sizes, moh)
  read = cases.read_fraction(sizes, moh)
  moved = functools.partial(cases.decode_bytes, sizes)
  return Variant(name, moh, make, moved(1.0) / moved(read), read)


def measure(
  config: BenchConfig, subject: Subject, length: int
) -> list[dict[str, Any]]:
  """One row for each direction and variant."""
  listed = variants(config, subject, length)
  made: dict[str, Calls] = {}
  for variant in listed:
    try:
      made[variant.name] = variant.make()
    except Unavailable:
      continue
  rows = []
  for direction in made[_ALL]:
    times, failed = interleave(
      {name: calls[direction] for name, calls in made.items()}, config.rounds
    )
    for variant in listed:
      if variant.name not in made:
        continue
      row: dict[str, Any] = {
        "subject": subject,
        "length": length,
        "direction": direction,
        "variant": variant.name,
        "active_heads": variant.moh.num_active,
        "shared_heads": variant.moh.num_shared,
        "ideal_speedup": variant.ideal,
        "kv_read": variant.kv_read,
      }
      if variant.name in failed:
        rows.append(row | {"absent": failed[variant.name]})
        continue
      mine = times[variant.name]
      row |= {"median_ms": statistics.median(mine), "min_ms": min(mine)}
      if _ALL in times:
        row["speedup"] = statistics.median(
          b / t for b, t in zip(times[_ALL], mine, strict=True)
        )
      rows.append(row)
  return rows


def table(rows: list[dict[str, Any]], subject: Subject) -> rich.table.Table:
  """The rows of a subject, for people."""
  result = rich.table.Table(title=f"{subject}, against all heads active")
  names = ["tokens", "direction", "heads", "median", "speed-up", "ideal"]
  if subject == "decode":
    names.append("KV heads read")
  for name in names:
    result.add_column(name, justify="right")
  for row in rows:
    if row["subject"] != subject:
      continue
    cells = [f"{row['length']:,}", row["direction"], row["variant"]]
    if "absent" in row:
      result.add_row(*cells, row["absent"])
      continue
    cells.append(f"{row['median_ms']:.1f} ms")
    cells.append(f"{row['speedup']:.2f}x" if "speedup" in row else "")
    is_routed = row["variant"].endswith("%")
    cells.append(f"{row['ideal_speedup']:.2f}x" if is_routed else "")
    if subject == "decode":
      cells.append(f"{row['kv_read']:.0%}")
    result.add_row(*cells)
  return result


@one_line_errors
def main() -> None:
  config = tyro.cli(BenchConfig, description=__doc__).resolved()
  console = rich.console.Console()
  facts = environment()
  console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
  rows = []
  for subject in config.subjects:
    for length in config.lengths:
      rows += measure(config, subject, length)
    console.print(table(rows, subject))
  if config.json is not None:
    settings = dataclasses.asdict(config) | {"json": None}
    write_json(
      config.json, {"environment": facts, "settings": settings, "rows": rows}
    )
    console.print(f"wrote {config.json}")


if __name__ == "__main__":
  main()
