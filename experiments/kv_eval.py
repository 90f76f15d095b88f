"""Asks a small model for facts while its cache is cut down, by every method.

Trains a model on eleven made-up tasks of long contexts (kept in --out, and
continued or reused from there), then lets every cache policy keep 20 to 100 %
of what it has read, and counts exact answers: with the cut after the question
(query-aware) and before it (query-agnostic). Says what that tells about
Task-KV: five claims, each with a 95 % interval of paired differences.

python -m experiments.kv_eval                   on a CPU, about an hour
python -m experiments.kv_eval --preset smoke    seconds, learns nothing
python -m experiments.kv_eval --preset long     1K tokens, on an accelerator
python -m experiments.kv_eval --help            every flag

In DIR: kv_eval.json, kv_eval.md, kv_eval_budgets.png, kv_eval_claims.png, and
a run folder for each seed.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from typing import Annotated, Any

import tyro

from experiments._kv_eval_methods import Settings
from jaxheads.errors import UserError, one_line_errors
from jaxheads.training.command_line import chosen_preset
from jaxheads.training.config import (
  CheckpointOptions,
  EvaluationOptions,
  OptimizerOptions,
  TrainConfig,
)
from jaxheads.training.model_options import ModelOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVEval:
  """What to train and what to ask."""

  length: int = 128
  """Tokens of a prompt that is asked, question included."""
  lengths: tuple[int, ...] = (64, 128)
  """Prompt lengths of the training, in this order: at the first one stretches
  to copy and a few needles, then all tasks that fit."""
  steps: tuple[int, ...] = (4000, 9000)
  """Training steps at each length, of which every third goes back to a shorter
  one."""
  tokens_per_step: int = 1024
  """Prompt tokens of a step, over all devices."""
  budgets: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.3, 0.2)
  """Shares of the full cache to keep."""
  samples: int = 200
  """Prompts for each task."""
  rows: int = 100
  """Prompts at a time; divides the samples."""
  seeds: tuple[int, ...] = (0,)
  """Seeds of the initial weights and of the training examples: one model
  each."""
  page_size: int = 8
  """Tokens of a page, where pages are counted."""
  enough: float = 0.8
  """Exact answers that a task needs with the full cache to judge methods."""
  tasks: tuple[str, ...] = ()
  """Tasks that are asked, by name. Default: all eleven."""
  settings: Settings = dataclasses.field(default_factory=Settings)
  model: ModelOptions = dataclasses.field(
    default_factory=lambda: ModelOptions(
      router="none",
      num_layers=2,
      embed_dim=128,
      mlp_dim=128,
      num_heads=8,
      num_kv_heads=8,
      head_dim=16,
      tie_embeddings=True,
    )
  )
  optimizer: OptimizerOptions = dataclasses.field(
    default_factory=lambda: OptimizerOptions(
      learning_rate=3e-3, weight_decay=0.0, b2=0.99
    )
  )
  checkpoint: CheckpointOptions = dataclasses.field(
    default_factory=lambda: CheckpointOptions(every=500)
  )

  def __post_init__(self) -> None:
    if len(self.steps) != len(self.lengths):
      raise UserError(
        f"`--steps` must have one number for each of `--lengths` "
        f"({len(self.lengths)}), got {len(self.steps)}"
      )
    for name in ("lengths", "steps", "budgets", "seeds"):
      if not getattr(self, name):
        raise UserError(f"`--{name}` must hold at least one number")
    for name in ("length", "tokens_per_step", "samples", "rows", "page_size"):
      if getattr(self, name) < 1:
        raise UserError(
          f"`--{name.replace('_', '-')}` must be at least 1, got "
          f"{getattr(self, name)}"
        )
    if 1.0 not in self.budgets:
      raise UserError("`--budgets` must hold 1, the full cache")
    if min((*self.lengths, *self.steps)) < 1:
      raise UserError("`--lengths` and `--steps` must be at least 1")
    if self.samples % self.rows:
      raise UserError(
        f"`--samples` must be a multiple of `--rows` ({self.rows}), got "
        f"{self.samples}"
      )
    for budget in self.budgets:
      if not 0 < budget <= 1:
        raise UserError(f"`--budgets` must be in (0, 1], got {budget}")


_CPU = KVEval()
# Source: section 5 of the project's notes on Task-KV. Sized for one GPU or TPU
# chip; not yet run on one.
_LONG = dataclasses.replace(
  _CPU,
  length=1024,
  lengths=(64, 128, 256, 512, 1024),
  steps=(3000, 2000, 2000, 2000, 2000),
  tokens_per_step=65536,
  samples=500,
  seeds=(0, 1, 2),
  page_size=64,
  settings=Settings(window=16, sinks=4, recent=32, top=64),
  model=dataclasses.replace(
    _CPU.model,
    num_layers=4,
    embed_dim=256,
    mlp_dim=512,
    num_heads=16,
    num_kv_heads=8,
    head_dim=32,
  ),
  optimizer=dataclasses.replace(_CPU.optimizer, learning_rate=1e-3),
)
_SMOKE = dataclasses.replace(
  _CPU,
  lengths=(64, 128),
  steps=(2, 2),
  tokens_per_step=256,
  budgets=(1.0, 0.4),
  samples=4,
  rows=4,
  enough=0.0,
  tasks=("niah_single", "induction"),
  model=dataclasses.replace(
    _CPU.model,
    embed_dim=16,
    mlp_dim=16,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
  ),
)
PRESETS = {"cpu": _CPU, "long": _LONG, "smoke": _SMOKE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """One call: what to do, and where."""

  preset: str = "cpu"
  """Defaults to start from: cpu, long or smoke."""
  out: pathlib.Path = pathlib.Path("runs/kv_eval")
  """Folder of the results and of the trained models."""
  ask_only: bool = False
  """Ask the newest checkpoints, finished or not, and train nothing."""
  mesh: str | None = None
  """How devices share the work, such as data=2,fsdp=4; see train_moh.py."""
  evaluation: Annotated[KVEval, tyro.conf.arg(name="")] = dataclasses.field(
    default_factory=KVEval
  )


def parse(argv: list[str] | None = None) -> Command:
  """The command that the arguments make; `UserError` if they do not fit."""
  argv = sys.argv[1:] if argv is None else argv
  preset = chosen_preset(argv, PRESETS, Command.preset)
  return tyro.cli(
    Command,
    args=argv,
    default=Command(preset=preset, evaluation=PRESETS[preset]),
    prog="kv_eval.py",
    description="Asks for facts while the cache is cut down.",
  )


def run(command: Command) -> dict[str, Any]:
  """Trains, asks, and writes the results; returns what kv_eval.json holds."""
  import jax

  from experiments import _kv_eval_report as report
  from jaxheads.sharding import parse_mesh
  from jaxheads.training import RunFolder, devices
  from jaxheads.training.console import Reporter
  from jaxheads.training.job import told
  from jaxheads.training.run_folder import write_json

  evaluation, out = command.evaluation, command.out
  reporter = Reporter()
  reporter.say(f"devices    {devices.describe()}")
  found, trained_steps = [], []
  started = time.monotonic()
  with told(reporter, out, resume=f"--out {out}"):
    for seed in evaluation.seeds:
      model, steps = train(
        evaluation,
        RunFolder(out / f"seed{seed}"),
        seed,
        reporter,
        ask_only=command.ask_only,
        mesh_shape=parse_mesh(command.mesh, jax.device_count()),
      )
      trained_steps.append(steps)
      trained = time.monotonic()
      found.append(ask_all(evaluation, model, reporter))
      reporter.say(f"seed {seed}: asked for {time.monotonic() - trained:.0f} s")
    results = report.summary(
      found,
      enough=evaluation.enough,
      page_size=evaluation.page_size,
      record={
        "options": dataclasses.asdict(evaluation),
        "device": devices.describe(),
        "trained_steps": trained_steps,
        "wall_s": round(time.monotonic() - started, 1),
      },
    )
    write_json(out / "kv_eval.json", results)
    text = report.as_markdown(results)
    (out / "kv_eval.md").write_text(text, encoding="utf-8")
    report.plot_budgets(results, out / "kv_eval_budgets.png")
    report.plot_claims(results, out / "kv_eval_claims.png")
    reporter.say(text)
    reporter.say(f"results    {out}")
  return results


def curriculum(evaluation: KVEval) -> list[Any]:
  """The stages of the training: from copying to everything at once."""
  from jaxheads.data import (
    CopyTask,
    MixedTask,
    NeedleTask,
    Stage,
    Task,
    retrieval_tasks,
  )

  # Many questions about one context teach more than one question.
  few = NeedleTask(needles=4, questions=3)
  stages = []
  for number, (length, steps) in enumerate(
    zip(evaluation.lengths, evaluation.steps, strict=True)
  ):
    tasks: tuple[Task, ...] = (CopyTask(), few, CopyTask())
    if number:
      many, long = (length - 20) // 16, (length - 30) // 20
      needles = NeedleTask(needles=many, questions=many)
      pairs = NeedleTask(needles=long, questions=long, key_tokens=4)
      fitting = (
        task
        for task in retrieval_tasks(length).values()
        if task.min_length() <= length
      )
      tasks = (needles, pairs, CopyTask(), needles, pairs, *fitting)
    stages.append(Stage(MixedTask(tasks), length, steps))
  return stages


def train(
  evaluation: KVEval,
  folder: Any,
  seed: int,
  reporter: Any,
  *,
  ask_only: bool,
  mesh_shape: Any,
) -> tuple[Any, int]:
  """The model of a seed and its steps: trained, continued, or as it was left.

  Raises:
    UserError: The folder holds another model, or none and `ask_only`.
  """
  import jax
  from flax import nnx

  from jaxheads.data import NEEDLE_VOCAB_SIZE
  from jaxheads.models import DecoderLM
  from jaxheads.training import devices, fit, signals
  from jaxheads.training.checkpoint import saved_steps
  from jaxheads.training.retrieval import retrieval_data

  stages = curriculum(evaluation)
  longest = max(*evaluation.lengths, 2 * evaluation.length)
  options = dataclasses.replace(evaluation.model, max_seq_len=2 * longest)
  model_config = options.build(NEEDLE_VOCAB_SIZE)
  steps = sum(evaluation.steps)
  trained_length = max(evaluation.lengths)
  config = TrainConfig(
    seq_len=trained_length,
    batch_size=max(1, evaluation.tokens_per_step // trained_length),
    steps=steps,
    seed=seed,
    model=options,
    optimizer=evaluation.optimizer,
    evaluation=EvaluationOptions(every=max(1, steps // 12)),
    checkpoint=evaluation.checkpoint,
  )

  resume = folder.holds_run
  newest = max(saved_steps(folder.checkpoints), default=0)
  if ask_only and not newest:
    raise UserError(f"`--ask-only`: {str(folder.path)!r} holds no checkpoint")
  if resume:
    before, _ = folder.read_config()
    if before != config:
      raise UserError(
        f"{str(folder.path)!r} holds a model of other settings; choose "
        "another `--out`"
      )
  else:
    folder.create(config, model_config)
  if ask_only:
    # With nothing left to do, the loop gives back what it finds.
    config = dataclasses.replace(config, steps=newest)
  mesh = devices.model_mesh(mesh_shape, model_config)
  with signals.stop_on_signals() as stop, jax.set_mesh(mesh):
    graphdef, state, _ = fit(
      config,
      model_config,
      folder,
      name=f"seed {seed}",
      reporter=reporter,
      build_model=lambda rngs: DecoderLM(model_config, rngs=rngs),
      make_data=retrieval_data(
        stages,
        tokens_per_step=evaluation.tokens_per_step,
        seed=seed,
        tokens_per_batch=8 * evaluation.tokens_per_step,
        samples=96,
      ),
      resume=resume,
      mesh=mesh,
      stop=stop,
    )
    variables = devices.on_one_device(mesh, (state.params, state.rest))
    return nnx.merge(graphdef, *variables), int(state.step)


def ask_all(evaluation: KVEval, model: Any, reporter: Any) -> dict[str, Any]:
  """Cells of every task, "aware" and "agnostic", and heads that were full."""
  from experiments._kv_eval_cells import Question, ask, head_gates
  from experiments._kv_eval_methods import methods
  from experiments._kv_eval_model import Reader
  from jaxheads.data import retrieval_tasks

  reader = Reader(model)
  length, settings = evaluation.length, evaluation.settings
  tasks = retrieval_tasks(length)
  unknown = set(evaluation.tasks) - set(tasks)
  if unknown:
    raise UserError(
      f"`--tasks` must be some of {', '.join(tasks)}, got "
      f"{', '.join(sorted(unknown))}"
    )
  tasks = {name: tasks[name] for name in evaluation.tasks or tasks}
  policies = methods(
    settings,
    length=length,
    theta=model.config.rope_theta,
    gates=head_gates(reader, list(tasks.values()), length, settings),
  )
  everything = {"full": policies.pop("full")}
  found: dict[str, Any] = {
    "one_token": {
      name for name, task in tasks.items() if task.answer_tokens(length) == 1
    },
  }
  for mode in ("aware", "agnostic"):
    found[mode], sets = {}, {}
    for name, task in tasks.items():
      asked = functools.partial(
        ask,
        reader,
        Question(
          task=task,
          length=length,
          aware=mode == "aware",
          samples=evaluation.samples,
          rows=evaluation.rows,
        ),
        budgets=evaluation.budgets,
        page_size=evaluation.page_size,
        sinks=settings.sinks,
      )
      cells, _ = asked(everything)
      answered = cells["full", 1.0].exact.mean()
      reporter.say(f"{name:16} {mode:9} {100 * answered:5.1f} % with all")
      one_token = mode == "aware" and name in found["one_token"]
      if answered >= evaluation.enough and not one_token:
        more, own = asked(
          policies,
          by_pages=("task_kv", "snapkv"),
          sets_of=("task_kv",),
          reference=True,
        )
        cells |= more
        sets[name] = own["task_kv"]
      found[mode][name] = cells
    found["sets"] = {**found.get("sets", {}), mode: sets}
  return found


@one_line_errors
def main() -> None:
  run(parse())


if __name__ == "__main__":
  main()
