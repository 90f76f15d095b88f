"""Plans a run on TPUs that are not here: does it fit, and what bounds it?

    python -m experiments.plan --preset moh-llama3-8b --topology v5e:16x16 \
      --mesh fsdp=256 --batch 256 --seq 8192
    python -m experiments.plan --what decode --topology v6e:2x4 \
      --mesh heads=8 --batch 32 --seq 8192

The real program (a training step, the reading of prompts, or the next token) is
compiled by the TPU compiler for that slice. Memory is the compiler's own
account; what devices send each other and compute is counted in the compiled
program, loops as often as they run. The roofline is that over the chip's
published speeds: a bound from below, nothing was run. Needs
`pip install 'jaxheads[aot]'`; a model of 8 billion parameters takes two minutes
and 6 GB.
"""

import dataclasses
import os
import pathlib
import sys
from typing import Any

import rich.console
import tyro

from experiments._timing import write_json
from experiments.bench_tpu_cycles import environment
from jaxheads.errors import UserError, one_line_errors
from jaxheads.models import ModelConfig
from jaxheads.models import presets as model_presets
from jaxheads.planning import chips
from jaxheads.planning.chips import Topology
from jaxheads.planning.memory import TooLarge
from jaxheads.planning.plan import Plan, What, make_plan, to_dict
from jaxheads.sharding import MeshShape, parse_mesh
from jaxheads.training import ModelOptions, OptimizerOptions, presets
from jaxheads.training.command_line import chosen_preset
from jaxheads.training.console import quantity
from pallas_kernels.aot import CompilerMissing, DoesNotCompile

_GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """What to plan, and for which chips."""

  topology: str = "v5e:16x16"
  """Chips, such as v5e:16x16, v6e:8x8 or v5p:4x4x4."""
  preset: str = "moh-llama3-8b"
  """Training run to start from: its model and optimizer."""
  mesh: str | None = None
  """Devices along each axis, such as data=2,fsdp=32,heads=4. Default: all on
  fsdp."""
  batch: int | None = None
  """Sequences of a step, on all devices together. Default: one a device that
  has sequences of its own."""
  seq: int | None = None
  """Tokens of a sequence; of a cache when decoding. Default: the preset's."""
  what: What = "train"
  """A training step, reading prompts into a cache, or the next token."""
  json: pathlib.Path | None = None
  """Where to write all figures."""
  model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
  optimizer: OptimizerOptions = dataclasses.field(
    default_factory=OptimizerOptions
  )

  def __post_init__(self) -> None:
    for name in ("batch", "seq"):
      number = getattr(self, name)
      if number is not None and number < 1:
        raise UserError(f"`--{name}` must be at least 1, got {number}")


def parse(argv: list[str] | None = None) -> Command:
  """The command that the arguments make; `UserError` if they do not fit."""
  argv = sys.argv[1:] if argv is None else argv
  name = chosen_preset(argv, presets.PRESETS, Command.preset)
  preset = presets.get(name)
  return tyro.cli(
    Command,
    args=argv,
    default=Command(
      preset=name,
      seq=preset.seq_len,
      model=preset.model,
      optimizer=preset.optimizer,
    ),
    prog="plan.py",
    description=__doc__,
  )


@dataclasses.dataclass(frozen=True)
class Problem:
  """A checked command.

  Attributes:
    config: The model; its longest sequence is at least `seq_len`.
    topology, shape: Where it runs.
    batch_size, seq_len: Sequences of a step, and their tokens.
  """

  config: ModelConfig
  topology: Topology
  shape: MeshShape
  batch_size: int
  seq_len: int


def resolve(command: Command) -> Problem:
  """All defaults filled in; `UserError` if something does not exist."""
  topology = chips.find(command.topology)
  shape = parse_mesh(command.mesh, len(topology.devices))
  own = model_presets.get(command.model.preset)
  seq_len = command.seq or own.max_seq_len
  options = command.model
  longest = options.max_seq_len or own.max_seq_len
  if seq_len > longest:
    options = dataclasses.replace(options, max_seq_len=seq_len)
  batch_size = command.batch or shape.data * shape.fsdp
  return Problem(
    options.build(own.vocab_size), topology, shape, batch_size, seq_len
  )


def plan(command: Command, problem: Problem) -> Plan | TooLarge:
  """Compiles and counts."""
  return make_plan(
    problem.config,
    problem.topology,
    problem.shape,
    what=command.what,
    batch_size=problem.batch_size,
    seq_len=problem.seq_len,
    options=command.optimizer,
  )


def record(
  command: Command, problem: Problem, found: Plan | TooLarge
) -> dict[str, Any]:
  """What the JSON file holds."""
  return {
    "environment": environment(),
    "what": command.what,
    "preset": command.preset,
    "parameters": problem.config.num_params,
    "topology": problem.topology.name,
    "devices": len(problem.topology.devices),
    "hbm_bytes": problem.topology.hbm_bytes,
    "mesh": str(problem.shape),
    "batch": problem.batch_size,
    "seq": problem.seq_len,
    **to_dict(found),
    "model": problem.config.to_dict(),
    "optimizer": dataclasses.asdict(command.optimizer),
  }


def show(
  command: Command,
  problem: Problem,
  found: Plan | TooLarge,
  console: rich.console.Console,
) -> None:
  """Prints a plan."""
  topology = problem.topology
  console.print(
    f"{command.what}: {command.preset}, "
    f"{quantity(problem.config.num_params)} parameters, {problem.batch_size} "
    f"x {problem.seq_len} tokens, on {len(topology.devices)} devices of "
    f"{topology.name}, mesh {problem.shape}"
  )
  if isinstance(found, TooLarge):
    console.print(
      f"does NOT fit: a device needs {_gib(found.used)}, it has "
      f"{_gib(found.limit)}"
    )
    for name, size in found.arguments.items():
      console.print(f"  {name:16} {_gib(size):>12}")
    rest = found.used - sum(found.arguments.values())
    console.print(f"  {'all else':16} {_gib(rest):>12}")
    return
  total = found.memory.total
  console.print(
    f"fits: a device needs {_gib(total)} of {_gib(topology.hbm_bytes)}"
  )
  for name, size in found.memory.by_category().items():
    console.print(f"  {name:16} {_gib(size):>12}")
  console.print("one device sends in a step")
  for (kind, axes), sent in found.sent_bytes.items():
    console.print(f"  {kind + ' over ' + axes:28} {sent / 1e9:9.3f} GB")
  if not found.sent_bytes:
    console.print("  nothing")
  console.print("FLOPs")
  devices = len(topology.devices)
  for name, number in (
    ("the model's own, a device's share", found.model_flops / devices),
    ("matrix products, one device", found.matmul_flops),
    ("attention kernels, one device", found.kernel_flops),
    ("XLA's count (loops once)", found.xla_flops),
  ):
    console.print(f"  {name:34} {quantity(number):>8}")
  bounds = found.roofline
  console.print("a step takes at least")
  for name, seconds in dataclasses.asdict(bounds).items():
    mark = "  <- the bound" if name == bounds.bound else ""
    console.print(f"  {name:16} {seconds * 1e3:9.1f} ms{mark}")
  share = found.model_flops / devices / topology.flops_per_s / bounds.seconds
  tokens = problem.batch_size * (
    1 if command.what == "decode" else problem.seq_len
  )
  console.print(
    f"so at most {quantity(tokens / bounds.seconds)} tokens/s, "
    f"{share:.0%} of the peak in the model's own FLOPs"
  )
  for loop in found.unknown_loops:
    console.print(f"counted once, turns not known: loop {loop}")


def _gib(number: float) -> str:
  if number < _GIB / 10:
    return f"{number / 2**20:.1f} MiB"
  return f"{number / _GIB:.2f} GiB"


@one_line_errors
def main() -> None:
  # Only its compiler is asked for; a chip that is here stays free.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  command = parse()
  console = rich.console.Console(highlight=False, soft_wrap=True)
  try:
    problem = resolve(command)
    found = plan(command, problem)
  except (CompilerMissing, DoesNotCompile) as error:
    raise UserError(str(error)) from error
  show(command, problem, found, console)
  if command.json is not None:
    write_json(command.json, record(command, problem, found))
    console.print(f"wrote {command.json}")
  if isinstance(found, TooLarge):
    sys.exit(1)


if __name__ == "__main__":
  main()
