"""Counts what a device does as there are more of them, each with as much to do.

    python -m experiments.plan_weak_scaling

The training step of one model is compiled for slices of 8 to 256 chips that are
not here, all devices on the mesh axis `fsdp`, one sequence each. Reported are
FLOPs and bytes of one device, counted in the compiled programs as in `plan.py`:
what it sends, and what arrays that are gathered, added up or exchanged hold,
however the compiler does it. In a model that scales, FLOPs and the latter stay
as they are. Needs `pip install 'jaxheads[aot]'`.
"""

import dataclasses
import os
import pathlib
from typing import Any

import rich.console
import rich.table
import tyro

from experiments import plan
from experiments._timing import write_json
from experiments.bench_tpu_cycles import environment
from jaxheads.errors import UserError, one_line_errors
from jaxheads.planning.memory import TooLarge
from jaxheads.planning.plan import Plan
from jaxheads.training import ModelOptions
from pallas_kernels.aot import CompilerMissing, DoesNotCompile

# Two layers of LLaMA's shape. As wide as its 8B: of narrower ones a device of
# 256 holds less than a tile of the parameters, which this compiler does not
# gather but adds up, for twice the bytes.
MODEL = ModelOptions(
  preset="tiny",
  router="query_norm",
  num_layers=2,
  embed_dim=4096,
  mlp_dim=4096,
  num_heads=8,
  num_kv_heads=8,
  head_dim=128,
  max_seq_len=512,
  dtype="bfloat16",
  remat=True,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """Which slices, and the model."""

  topologies: tuple[str, ...] = (
    "v5e:2x4",
    "v5e:4x4",
    "v5e:4x8",
    "v5e:8x8",
    "v5e:8x16",
    "v5e:16x16",
  )
  """Slices of chips, from small to large."""
  seq: int = 512
  """Tokens of a sequence."""
  json: pathlib.Path | None = pathlib.Path(
    "experiments/results/plan_weak_scaling.json"
  )
  """Where to write the figures."""
  model: ModelOptions = dataclasses.field(default_factory=lambda: MODEL)


def exchanged(kind: str, sent: float, devices: int) -> float:
  """Bytes of the arrays that devices exchange, from what one of them sends."""
  if kind == "collective-permute":
    return sent
  # All but a device's own part, when adding up twice.
  parts = (devices - 1) / devices * (2 if kind == "all-reduce" else 1)
  return sent / parts


def row(topology: str, devices: int, found: Plan) -> dict[str, Any]:
  """What a device does on one slice."""
  payload = sum(
    exchanged(kind, sent, devices)
    for (kind, _), sent in found.sent_bytes.items()
  )
  return {
    "topology": topology,
    "devices": devices,
    "flops": found.matmul_flops + found.kernel_flops,
    "exchanged_bytes": round(payload),
    "sent_bytes": round(sum(found.sent_bytes.values())),
    "sent_bytes_by_kind": {
      f"{kind} over {axes}": round(sent)
      for (kind, axes), sent in found.sent_bytes.items()
    },
  }


def table(rows: list[dict[str, Any]]) -> rich.table.Table:
  """One line a slice; ratios are to the first."""
  drawn = rich.table.Table(
    "devices", "GFLOPs", "ratio", "MB exchanged", "ratio", "MB sent", "by"
  )
  first = rows[0]
  for each in rows:
    drawn.add_row(
      str(each["devices"]),
      f"{each['flops'] / 1e9:.2f}",
      f"{each['flops'] / first['flops']:.3f}",
      f"{each['exchanged_bytes'] / 1e6:.1f}",
      f"{each['exchanged_bytes'] / first['exchanged_bytes']:.3f}",
      f"{each['sent_bytes'] / 1e6:.1f}",
      ", ".join(
        f"{name.split()[0]} {sent / 1e6:.1f}"
        for name, sent in each["sent_bytes_by_kind"].items()
      ),
    )
  return drawn


@one_line_errors
def main() -> None:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  command = tyro.cli(Command, description=__doc__)
  console = rich.console.Console(highlight=False, soft_wrap=True)
  rows = []
  for topology in command.topologies:
    one = plan.Command(
      preset="tiny", topology=topology, seq=command.seq, model=command.model
    )
    try:
      problem = plan.resolve(one)
      found = plan.plan(one, problem)
    except (CompilerMissing, DoesNotCompile) as error:
      raise UserError(str(error)) from error
    if isinstance(found, TooLarge):
      raise UserError(f"the model does not fit on {topology}")
    rows.append(row(topology, problem.shape.size, found))
    console.print(f"{topology}: {found.compile_seconds:.0f} s")
  console.print(table(rows))
  if command.json is not None:
    write_json(
      command.json,
      {
        "environment": environment(),
        "seq": command.seq,
        "model": dataclasses.asdict(command.model),
        "rows": rows,
      },
    )
    console.print(f"wrote {command.json}")


if __name__ == "__main__":
  main()
