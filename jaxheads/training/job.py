"""A whole job: one run, its dense baseline if asked for, and what to print."""

import contextlib
import dataclasses
import pathlib
import platform
import sys
import time
from collections.abc import Iterator

import jax

from jaxheads.data import Corpus, Tokenizer, load_corpus, load_tokenizer
from jaxheads.errors import UserError
from jaxheads.models import ModelConfig
from jaxheads.moh import explain_execution
from jaxheads.sharding import MeshShape, parse_mesh, placement
from jaxheads.training import (
  artefacts,
  console,
  devices,
  distributed,
  exchange,
  run_folder,
  signals,
)
from jaxheads.training.checkpoint import quiet_storage, storage_reason
from jaxheads.training.command_line import Request
from jaxheads.training.config import TrainConfig
from jaxheads.training.console import Reporter
from jaxheads.training.fit import Interrupted
from jaxheads.training.loop import check_sizes, train
from jaxheads.training.run_folder import RunFolder


def run_job(request: Request) -> None:
  """Does what the request asks for, with the other processes of its job.

  Raises:
    UserError: A mistake of the user, a full disk, a loss that is not finite.
    SystemExit: After a signal; status 0 for SIGTERM, 130 for Ctrl-C.
  """
  if request.compile_cache is not None:
    jax.config.update("jax_compilation_cache_dir", request.compile_cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  with distributed.joined(request.processes):
    if distributed.num_processes() > 1:
      request = _agreed(request)
    reporter = Reporter()
    path = request.run.path
    with told(reporter, path, resume=f"--resume {path}"):
      _run(request, reporter)


def _agreed(request: Request) -> Request:
  """The request, if all processes have the same; in process 0's folder.

  The default folder's name holds the time.
  """
  distributed.agree(
    {
      **distributed.as_flags(request.config.to_dict()),
      "`--mesh`": request.mesh,
      "`--resume`": request.resume,
      "the number of devices of a process": jax.local_device_count(),
      "their kind": jax.local_devices()[0].device_kind,
      "Python": platform.python_version(),
      **run_folder.versions(),
    }
  )
  path = distributed.from_first(lambda: str(request.run.path.absolute()))
  return dataclasses.replace(request, run=RunFolder(pathlib.Path(path)))


@contextlib.contextmanager
def told(
  reporter: Reporter, folder: pathlib.Path, *, resume: str
) -> Iterator[None]:
  """A script's work: how long it took, or in one line why it ended early.

  Args:
    reporter: Prints.
    folder: Where the script writes.
    resume: Flags with which it continues.
  Raises:
    UserError: A mistake of the user, a full disk, a loss that is not finite.
    SystemExit: After a signal; status 0 for SIGTERM, 130 for Ctrl-C.
  """
  started = time.monotonic()
  quiet_storage()
  signals.exit_on_sigterm()
  try:
    yield
  except Interrupted as stop:
    what = f"saved at step {stop.step}" if stop.step else "nothing to save yet"
    reporter.say(f"{stop.signal_name}: {what}; continue with {resume}")
    sys.exit(0 if stop.signal_name == "SIGTERM" else 130)
  except OSError as error:
    reason = storage_reason(error)
    if reason is None:
      raise
    raise UserError(
      f"{error.filename or folder} could not be written: {reason}; "
      f"what is saved is intact: continue with `{resume}`"
    ) from error
  reporter.say(f"done in {console.clock(time.monotonic() - started)}")


def _run(request: Request, reporter: Reporter) -> None:
  config, run = request.config, request.run
  tokenizer = load_tokenizer(config.tokenizer)
  model_config = config.model.build(tokenizer.vocab_size)
  mesh_shape = parse_mesh(request.mesh, jax.device_count())
  # Before the text is read.
  mesh = check_sizes(config, model_config, mesh_shape)
  reporter.say(f"devices    {devices.describe()}")
  if mesh_shape.size > 1:
    reporter.say(f"mesh       {mesh_shape}")
  if mesh_shape.context > 1:
    layers = exchange.of_model(
      model_config,
      mesh_shape,
      batch_size=config.batch_size,
      seq_len=config.seq_len,
    )
    reporter.say(f"context    {exchange.describe(layers)}")
  reporter.say(f"model      {_describe_model(model_config, config.seq_len)}")
  reporter.say(f"cost       {_describe_cost(model_config, config.seq_len)}")
  if any(model_config.head_plans):
    execution = _describe_execution(model_config, config.seq_len)
    reporter.say(f"execution  {execution}")
  shards = placement.head_shards(mesh, model_config)
  if shards > 1:
    placed = placement.place_on(mesh, model_config, config.seq_len)
    balance = placement.report(placed, shards, config.seq_len)
    reporter.say(f"placement  {balance}")
  corpus = load_corpus(
    config.data,
    tokenizer=tokenizer,
    validation_fraction=config.validation_fraction,
  )
  reporter.say(f"data       {_describe_corpus(corpus)}")
  reporter.say(
    f"training   {config.steps} steps of {config.batch_size} x "
    f"{config.seq_len} tokens, seed {config.seed}"
  )
  reporter.say(f"run folder {run.path}")
  summaries = [
    _train_one(
      config,
      model_config,
      run,
      request.resume,
      corpus,
      tokenizer,
      reporter,
      mesh_shape,
    )
  ]
  if config.baseline:
    summaries.append(
      _train_one(
        dataclasses.replace(
          config,
          baseline=False,
          model=config.model.dense(),
        ),
        model_config.dense(),
        run.baseline,
        distributed.from_first(
          lambda: request.resume and run.baseline.holds_run
        ),
        corpus,
        tokenizer,
        reporter,
        mesh_shape,
      )
    )
  if jax.process_index() != 0:
    return
  if config.baseline:
    artefacts.draw_losses(run)  # Now with both curves.
    reporter.table(
      console.comparison_table(
        {summary["label"]: summary for summary in summaries}
      )
    )
  else:
    reporter.say(
      f"validation {summaries[0]['validation_loss']:.4f} nats/token, "
      f"{summaries[0]['validation_bits_per_byte']:.4f} bits/byte"
    )
  if run.sample_file.exists():
    reporter.say("sample")
    for line in run.sample_file.read_text(encoding="utf-8").splitlines():
      reporter.say(f"  | {line}")
  reporter.say("artefacts")
  for name, path in (
    ("checkpoints", run.checkpoints),
    ("metrics", run.metrics_file),
    ("tensorboard", run.path / "tensorboard"),
    ("loss curves", run.figures / "loss.png"),
    ("head load", run.figures / "head_load.png"),
    ("contexts", run.figures / "contexts.png"),
    ("sample", run.sample_file),
    ("summary", run.summary_file),
    ("dense run", run.baseline.path),
  ):
    if path.exists():
      reporter.say(f"  {name:12} {path}")


def _train_one(
  config: TrainConfig,
  model_config: ModelConfig,
  run: RunFolder,
  resume: bool,
  corpus: Corpus,
  tokenizer: Tokenizer,
  reporter: Reporter,
  mesh_shape: MeshShape,
) -> dict:
  if jax.process_index() == 0:
    if not resume:
      run.create(config, model_config)
    else:
      _note_changes(run, config, model_config, reporter)
  run.check_shared()
  return train(
    config,
    model_config,
    run,
    corpus=corpus,
    tokenizer=tokenizer,
    reporter=reporter,
    resume=resume,
    mesh_shape=mesh_shape,
  )


def _note_changes(
  run: RunFolder,
  config: TrainConfig,
  model_config: ModelConfig,
  reporter: Reporter,
) -> None:
  """Says what a resumed run changes, and records it."""
  before, model_before = run.read_config()
  if model_before != model_config:
    raise UserError(
      f"{str(run.path)!r} holds a run of another model; resume it without "
      "model flags, or start a new run"
    )
  if before == config:
    return
  old, new = _flat(before.to_dict()), _flat(config.to_dict())
  changes = [
    f"{name} {old[name]} -> {new[name]}"
    for name in new
    if old[name] != new[name]
  ]
  reporter.say(f"changed    {', '.join(changes)}")
  run.record(config, model_config)


def _flat(values: dict, prefix: str = "") -> dict:
  flat = {}
  for name, value in values.items():
    if isinstance(value, dict):
      flat.update(_flat(value, f"{prefix}{name}."))
    else:
      flat[f"{prefix}{name}"] = value
  return flat


def _describe_model(config: ModelConfig, seq_len: int) -> str:
  share = 100 * config.active_heads / config.total_heads
  return (
    f"{artefacts.label(config)}: {config.num_layers} layers, D "
    f"{config.embed_dim}, {config.num_heads} heads of {config.head_dim} "
    f"({config.num_kv_heads} key-value), "
    f"{console.quantity(config.num_params)} parameters, {share:.1f} % of heads "
    f"active, {100 * config.visible_fraction(seq_len):.1f} % of keys visible"
  )


def _describe_cost(config: ModelConfig, seq_len: int) -> str:
  cost = artefacts.costs(config, seq_len=seq_len)

  def less(name: str) -> str:
    return f"{100 * cost[f'{name}_saved_fraction']:.1f} % less"

  return (
    f"{console.quantity(cost['flops_per_token'])} FLOPs/token, "
    f"{less('flops')} than plain attention; decoding after {seq_len} tokens "
    f"reads {console.quantity(cost['kv_read_bytes_per_token'])} bytes of keys "
    f"and values, {less('kv_read')}, and writes "
    f"{console.quantity(cost['kv_write_bytes_per_token'])}"
  )


def _describe_execution(config: ModelConfig, seq_len: int) -> str:
  """What the routed layers do, and why."""
  kinds = {
    (plan.learns_from_all_heads, context is not None)
    for plan, context in zip(config.head_plans, config.contexts, strict=True)
    if plan is not None
  }
  choices = {
    explain_execution(
      seq_len,
      execution=config.execution,
      has_pattern=has_pattern,
      all_heads_for="`straight_through='dense'`" if learns_from_all else None,
    )
    for learns_from_all, has_pattern in kinds
  }
  told = "; ".join(
    f"{choice.execution}, because {choice.why}" for choice in sorted(choices)
  )
  if any(choice.execution == "dense" for choice in choices):
    told += ". Dense computes every head: those that are off save no FLOPs"
  return told


def _describe_corpus(corpus: Corpus) -> str:
  return (
    f"{corpus.name}: {corpus.train_bytes / 1e6:.1f} MB to train on, "
    f"{corpus.validation_bytes / 1e6:.1f} MB to validate on"
  )
