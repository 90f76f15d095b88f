"""Finds a needle in a haystack with sharded and with dense attention.

Trains a hybrid S2 model and the dense model of equal size on made-up text in
which a fact is hidden, from scratch and with the same examples, first short
and then long. Then asks both for facts at every depth of prompts of every
length, and draws who finds them.

python experiments/needle.py                    up to 1K tokens, on a CPU
python experiments/needle.py --preset 32k       up to 32K, on an accelerator
python experiments/needle.py --out DIR --resume continues an interrupted one
python experiments/needle.py --help             every flag

In DIR: needle.png, needle.json, and a run folder (checkpoints, metrics) each
in s2/ and dense/.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, Any, Literal

import tyro

from jaxheads.errors import UserError, one_line_errors
from jaxheads.training.command_line import chosen_preset
from jaxheads.training.config import (
  CheckpointOptions,
  EvaluationOptions,
  OptimizerOptions,
  TrainConfig,
)
from jaxheads.training.distributed import Processes
from jaxheads.training.model_options import ModelOptions, S2Options


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle:
  """What to train and what to ask."""

  copy_steps: int = 500
  """Training steps before the first needle in which a stretch of symbols is to
  be repeated: that teaches to look back."""
  copy_length: int = 64
  """Prompt length of these in tokens."""
  lengths: tuple[int, ...] = (64, 128, 256, 512, 1024)
  """Prompt lengths in tokens, in the order of the training."""
  needles: tuple[int, ...] = (1, 1, 1, 1, 1)
  """Facts hidden in a prompt at each length, at most: prompts take turns with
  fewer of them and fewer questions. The sweep hides as many as at the last
  length and asks for one."""
  steps: tuple[int, ...] = (400, 200, 200, 200, 300)
  """Training steps at each length, of which every third goes back to a shorter
  one."""
  tokens_per_step: int = 4096
  """Prompt tokens of a step, over all devices."""
  noise: Literal["random", "cycle"] = "random"
  """What the needles hide in: "random" symbols, or a "cycle" of 20."""
  ask_lengths: tuple[int, ...] = (128, 256, 512, 1024)
  """Prompt lengths to ask at; may be longer than those of the training."""
  depths: int = 10
  """Depths to ask at, evenly from the start of the prompt to its end."""
  samples: int = 20
  """Questions for each length and depth."""
  seed: int = 0
  """Seed of the initial weights and of the examples."""
  model: ModelOptions = dataclasses.field(
    default_factory=lambda: ModelOptions(
      router="none",
      num_layers=2,
      embed_dim=128,
      mlp_dim=128,
      num_heads=4,
      num_kv_heads=4,
      head_dim=32,
      tie_embeddings=True,
      s2=S2Options(stride=4, block_size=16, local_blocks=4),
    )
  )
  optimizer: OptimizerOptions = dataclasses.field(
    default_factory=lambda: OptimizerOptions(
      learning_rate=2e-3, weight_decay=0.0, b2=0.99
    )
  )
  checkpoint: CheckpointOptions = dataclasses.field(
    default_factory=CheckpointOptions
  )

  def __post_init__(self) -> None:
    for name in ("needles", "steps"):
      if len(getattr(self, name)) != len(self.lengths):
        raise UserError(
          f"`--{name}` must have one number for each of `--lengths` "
          f"({len(self.lengths)}), got {len(getattr(self, name))}"
        )
    for name in ("lengths", "needles", "steps", "ask_lengths"):
      if not getattr(self, name) or min(getattr(self, name)) < 1:
        raise UserError(
          f"`--{name.replace('_', '-')}` must be numbers of at least 1, got "
          f"{' '.join(map(str, getattr(self, name))) or 'none'}"
        )
    if self.copy_steps < 0:
      raise UserError(
        f"`--copy-steps` must not be negative, got {self.copy_steps}"
      )
    for name in ("tokens_per_step", "depths", "samples"):
      if getattr(self, name) < 1:
        raise UserError(
          f"`--{name.replace('_', '-')}` must be at least 1, got "
          f"{getattr(self, name)}"
        )


_CPU = Needle()
# Source: none, a smaller cousin of the length curricula that long-context
# models are trained with. Sized for one GPU or TPU chip; not yet run on one.
_LONG = dataclasses.replace(
  _CPU,
  lengths=(*_CPU.lengths, 2048, 4096, 8192, 16384, 32768),
  needles=(*_CPU.needles, 1, 1, 1, 1, 1),
  steps=(*_CPU.steps, 100, 100, 100, 100, 100),
  tokens_per_step=65536,
  ask_lengths=(1024, 2048, 4096, 8192, 16384, 32768),
  depths=20,
  samples=50,
  model=dataclasses.replace(
    _CPU.model,
    num_layers=4,
    embed_dim=256,
    mlp_dim=512,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    rope_theta=500_000.0,
    remat=True,
    s2=S2Options(stride=8, block_size=64, local_blocks=8, dense_layers=(1, 3)),
  ),
  optimizer=dataclasses.replace(_CPU.optimizer, learning_rate=1e-3),
)
_SMOKE = dataclasses.replace(
  _CPU,
  lengths=(32, 64),
  needles=(1, 2),
  steps=(3, 2),
  tokens_per_step=256,
  ask_lengths=(48, 64),
  depths=3,
  samples=2,
  model=dataclasses.replace(
    _CPU.model,
    embed_dim=16,
    mlp_dim=16,
    head_dim=4,
    s2=S2Options(stride=4, block_size=8, local_blocks=1),
  ),
)
PRESETS = {"cpu": _CPU, "32k": _LONG, "smoke": _SMOKE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """One call: what to do, and where."""

  preset: str = "cpu"
  """Defaults to start from: cpu, 32k or smoke."""
  out: pathlib.Path = pathlib.Path("runs/needle")
  """Folder of the results."""
  resume: bool = False
  """Continue what `--out` holds, with the same flags."""
  mesh: str | None = None
  """How devices share the work, such as data=2,fsdp=4; see train_moh.py."""
  processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(
    default_factory=Processes
  )
  needle: Annotated[Needle, tyro.conf.arg(name="")] = dataclasses.field(
    default_factory=Needle
  )


def parse(argv: list[str] | None = None) -> Command:
  """The command that the arguments make; `UserError` if they do not fit."""
  argv = sys.argv[1:] if argv is None else argv
  preset = chosen_preset(argv, PRESETS, Command.preset)
  return tyro.cli(
    Command,
    args=argv,
    default=Command(preset=preset, needle=PRESETS[preset]),
    prog="needle.py",
    description="Finds a needle in a haystack, sharded and dense.",
  )


def run(command: Command) -> dict[str, Any]:
  """Trains, asks, and writes the results; returns what needle.json holds."""
  from jaxheads.training import distributed

  with distributed.joined(command.processes):
    return train_and_draw(command)


def train_and_draw(command: Command) -> dict[str, Any]:
  """As `run`, once the processes of the job have met."""
  import jax
  import numpy as np

  from jaxheads.data import NEEDLE_VOCAB_SIZE
  from jaxheads.sharding import parse_mesh
  from jaxheads.training import RunFolder, artefacts, devices, distributed
  from jaxheads.training.console import Reporter
  from jaxheads.training.job import told
  from jaxheads.training.retrieval import plot_retrieval
  from jaxheads.training.run_folder import write_json

  needle, out = command.needle, command.out
  reporter = Reporter()
  stages = curriculum(needle)
  longest = max(*needle.lengths, *needle.ask_lengths)
  sharded = dataclasses.replace(needle.model, max_seq_len=longest + 8).build(
    NEEDLE_VOCAB_SIZE
  )
  distributed.agree(
    {**distributed.as_flags(record_of(needle)), "`--mesh`": command.mesh}
  )
  writes = jax.process_index() == 0
  if writes:
    prepare(command)
  reporter.say(f"devices    {devices.describe()}")
  reporter.say(
    f"model      {sharded.num_params:,} parameters, "
    f"{100 * sharded.visible_fraction(longest):.1f} % of keys visible at "
    f"{longest:,} tokens"
  )
  depths = [float(depth) for depth in np.linspace(0, 1, needle.depths)]
  accuracies = {}
  results: dict[str, Any] = {
    "options": record_of(needle),
    "device": devices.describe(),
    "lengths": list(needle.ask_lengths),
    "depths": depths,
    "models": {},
  }
  with told(reporter, out, resume=f"--out {out} --resume"):
    for folder, model_config in (("s2", sharded), ("dense", sharded.dense())):
      name = artefacts.label(model_config)
      accuracy, seconds = train_and_ask(
        needle,
        stages,
        model_config,
        RunFolder(out / folder),
        name=name,
        depths=depths,
        resume=command.resume,
        reporter=reporter,
        mesh_shape=parse_mesh(command.mesh, jax.device_count()),
      )
      accuracies[name] = accuracy
      results["models"][name] = {
        "num_params": model_config.num_params,
        "visible_keys_fraction": model_config.visible_fraction(longest),
        "flops_per_token": model_config.flops_per_token(longest),
        "wall_s": round(seconds, 1),
        "exact": [[float(x) for x in row] for row in accuracy],
      }
      for length, row in zip(needle.ask_lengths, accuracy, strict=True):
        reporter.say(
          f"{name:12} {length:7,} tokens: {100 * row.mean():5.1f} % exact, "
          f"worst depth {100 * row.min():5.1f} %"
        )
    if writes:
      write_json(out / "needle.json", results)
      plot_retrieval(
        accuracies,
        needle.ask_lengths,
        depths,
        out / "needle.png",
        trained_length=max(needle.lengths),
      )
    reporter.say(f"results    {out / 'needle.json'}")
    reporter.say(f"heat map   {out / 'needle.png'}")
  return results


def curriculum(needle: Needle) -> list[Any]:
  """The stages of the training.

  Raises:
    UserError: A length, of the training or of a question, is too short.
  """
  from jaxheads.data import CopyTask, NeedleTask, Stage

  stages = [Stage(CopyTask(), needle.copy_length, needle.copy_steps)]
  stages += [
    Stage(
      NeedleTask(needles=needles, questions=needles, noise=needle.noise),
      length,
      steps,
    )
    for needles, length, steps in zip(
      needle.needles, needle.lengths, needle.steps, strict=True
    )
  ]
  for length in needle.ask_lengths:
    try:
      Stage(stages[-1].task.asking_once(), length, 1)
    except UserError as error:
      raise UserError(f"`--ask-lengths`: {error}") from None
  return stages


def record_of(needle: Needle) -> dict[str, Any]:
  """The options in JSON's own types, as they are read back."""
  return json.loads(json.dumps(dataclasses.asdict(needle)))


def prepare(command: Command) -> None:
  """Makes the folder, or checks that it holds the same experiment."""
  from jaxheads.training.run_folder import write_json

  record = command.out / "options.json"
  options = record_of(command.needle)
  if record.exists():
    if not command.resume:
      raise UserError(
        f"`--out` {str(command.out)!r} already holds an experiment; continue "
        "it with `--resume`, or choose another folder"
      )
    before = json.loads(record.read_text(encoding="utf-8"))
    changed = [name for name in options if before.get(name) != options[name]]
    if changed:
      raise UserError(
        f"`--resume` needs the flags of before, but changed are: "
        f"{', '.join(changed)}"
      )
    return
  if command.resume:
    raise UserError(f"`--resume`: {str(command.out)!r} holds no experiment")
  try:
    command.out.mkdir(parents=True, exist_ok=True)
    write_json(record, options)
  except OSError as error:
    raise UserError(
      f"`--out` {str(command.out)!r} cannot be written: {error.strerror}; "
      "choose another folder"
    ) from error


def train_and_ask(
  needle: Needle,
  stages: list[Any],
  model_config: Any,
  folder: Any,
  *,
  name: str,
  depths: list[float],
  resume: bool,
  reporter: Any,
  mesh_shape: Any,
) -> tuple[Any, float]:
  """Exact answers [lengths, depths] of one model, and the seconds it took."""
  import time

  import jax

  from jaxheads.models import DecoderLM
  from jaxheads.sharding.placement import place_on
  from jaxheads.training import devices, distributed, fit, signals
  from jaxheads.training.retrieval import retrieval_data

  longest = max(needle.lengths)
  steps = needle.copy_steps + sum(needle.steps)
  config = TrainConfig(
    seq_len=longest,
    batch_size=max(1, needle.tokens_per_step // longest),
    steps=steps,
    seed=needle.seed,
    model=needle.model,
    optimizer=needle.optimizer,
    evaluation=EvaluationOptions(every=max(1, steps // 10)),
    checkpoint=needle.checkpoint,
  )

  started = time.monotonic()
  resume = distributed.from_first(lambda: resume and folder.holds_run)
  if not resume and jax.process_index() == 0:
    folder.create(config, model_config)
  folder.check_shared()
  mesh = devices.model_mesh(mesh_shape, model_config)
  model_config = place_on(mesh, model_config, longest)
  with signals.stop_on_signals() as stop, jax.set_mesh(mesh):
    _, state, retrieval = fit(
      config,
      model_config,
      folder,
      name=name,
      reporter=reporter,
      build_model=lambda rngs: DecoderLM(model_config, rngs=rngs),
      make_data=retrieval_data(
        stages,
        tokens_per_step=needle.tokens_per_step,
        seed=needle.seed,
        tokens_per_batch=4 * needle.tokens_per_step,
        samples=50,
      ),
      resume=resume,
      mesh=mesh,
      stop=stop,
    )
    accuracy = retrieval.sweep(
      state,
      stages[-1].task,
      needle.ask_lengths,
      depths,
      samples=needle.samples,
    )
  return accuracy, time.monotonic() - started


@one_line_errors
def main() -> None:
  run(parse())


if __name__ == "__main__":
  main()
