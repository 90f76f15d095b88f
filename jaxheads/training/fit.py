"""The training loop itself: step after step until done, whatever the data."""

import collections
import math
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxheads.errors import UserError
from jaxheads.models import ModelConfig
from jaxheads.training import devices, distributed, optimizer, signals
from jaxheads.training.checkpoint import (
  Checkpointer,
  restore_newest,
  saved_steps,
)
from jaxheads.training.config import TrainConfig
from jaxheads.training.console import Reporter
from jaxheads.training.metrics import MetricsWriter, read_metrics
from jaxheads.training.run_folder import RunFolder
from jaxheads.training.step import (
  Batch,
  Metrics,
  TrainState,
  init_state,
  make_train_step,
)

# Processes of one job agree on a stop this often; alone, at every step.
_AGREE_EVERY_STEPS = 16


class Batches(Protocol):
  """Batches to learn from, without end, with a position that can be saved."""

  def __next__(self) -> Batch:
    """This process's rows of the next batch."""

  def get_state(self) -> dict[str, Any]:
    """The position, as JSON can hold it."""

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position from `get_state`."""

  def close(self) -> None:
    """Ends what runs in the background."""


class Measured(Protocol):
  """What a validation found; as text, what a person reads of it."""

  @property
  def loss(self) -> float:
    """Mean nats per token: the lowest is the best checkpoint."""

  def scalars(self) -> dict[str, float]:
    """Further figures for the metrics, by name."""


class Validator(Protocol):
  """Measures a state."""

  def __call__(
    self, state: TrainState, *, should_stop: Callable[[], bool]
  ) -> Measured | None:
    """The figures; None if `should_stop` became true on the way."""


ValidatorT = TypeVar("ValidatorT", bound=Validator)


class Interrupted(Exception):
  """A signal ended the run early; all of it up to `step` is saved."""

  def __init__(self, signal_name: str, step: int) -> None:
    super().__init__(f"{signal_name}: saved at step {step}")
    self.signal_name = signal_name
    self.step = step


def fit(
  config: TrainConfig,
  model_config: ModelConfig,
  run: RunFolder,
  *,
  name: str,
  reporter: Reporter,
  build_model: Callable[[nnx.Rngs], nnx.Module],
  make_data: Callable[[nnx.GraphDef[Any], Mesh], tuple[Batches, ValidatorT]],
  resume: bool,
  mesh: Mesh,
  stop: signals.StopRequest,
) -> tuple[nnx.GraphDef[Any], TrainState, ValidatorT]:
  """All steps that are left of a run.

  Args:
    config: Steps, optimizer, intervals and seed. `batch_size` x `seq_len` are
      the tokens of a step, for the rate; how they are cut is the data's.
    model_config: Recorded in every checkpoint.
    run: Where metrics and checkpoints go; made by the caller.
    name: What the progress display calls the run.
    reporter: Shows progress.
    build_model: (rngs) to a module with `token_nats`, see `DecoderLM`; its
      load-balance loss, if any, is an `AuxLoss`.
    make_data: (graph of the model, mesh) to the batches to learn from and
      what measures a state.
    resume: Continue from the newest checkpoint in `run`, or from the start if
      there is none.
    mesh: Of `jaxheads.sharding.make_mesh`.
    stop: Set when the run is to end early.

  Returns:
    Graph and state of the model after the last step, and the validator.

  Raises:
    UserError: The checkpoint is of another model, the disk is full, or the
      loss is not finite.
    Interrupted: `stop` was set before the last step; the state is saved.
  """
  # Model and optimizer.
  schedule = optimizer.schedule(config.optimizer, config.steps)
  transform = optimizer.build(config.optimizer, config.steps)
  graphdef, state = init_state(
    build_model, transform, seed=config.seed, mesh=mesh
  )
  train_step = make_train_step(
    graphdef,
    transform,
    aux_weight=config.optimizer.aux_weight,
    accumulate=config.optimizer.accumulate,
    schedule=schedule,
    like=state,
  )

  loader, evaluator = make_data(graphdef, mesh)

  # Where the last run ended.
  step = 0
  if resume:
    restored = restore_newest(
      run.checkpoints, state, model_config=model_config, say=reporter.say
    )
    if restored is None:
      reporter.say(f"{name}: no checkpoint yet, starting from step 0")
    else:
      if restored.step > config.steps:
        raise UserError(
          f"`--steps` must be at least {restored.step}, the steps that "
          f"{str(run.path)!r} has done already, got {config.steps}"
        )
      step, state = restored.step, restored.state
      loader.set_state(restored.record["data"])
      reporter.say(f"{name}: continuing after step {step}")
  log = _Log(run, config, resume_step=step if resume else None)
  checkpointer = Checkpointer(run.checkpoints, keep=config.checkpoint.keep)
  saved = distributed.from_first(
    lambda: max(saved_steps(run.checkpoints), default=0)
  )

  def save() -> None:
    nonlocal saved
    saved = step
    checkpointer.save(
      step,
      state,
      record={
        "model": model_config.to_dict(),
        "data": loader.get_state(),
        "seed": config.seed,
      },
      validation_loss=log.validated.get(step),
    )

  progress = reporter.progress(label=name, steps=config.steps, done=step)
  try:
    with progress:
      while True:
        # What is due after `step` steps.
        last = step == config.steps
        if step and (last or step % config.evaluation.every == 0):
          log.flush(progress.update)
          if step not in log.validated:
            evaluation = evaluator(state, should_stop=lambda: _agree(stop, 0))
            if evaluation is not None:
              log.validation(step, evaluation)
              reporter.say(
                f"{name}  step {step}/{config.steps}  validation: {evaluation}"
              )
        due = last or step % config.checkpoint.every == 0
        stopping = _agree(stop, 0 if last else step)
        if step > saved and (due or stopping):
          log.flush(progress.update)
          save()
        if stopping:
          checkpointer.wait()
          raise Interrupted(stop.name or "SIGTERM", step)
        if last:
          break

        # One step; the numbers of the one before are fetched meanwhile.
        batch = devices.put_batch(mesh, next(loader))
        state, metrics = train_step(state, batch)
        step += 1
        log.flush(progress.update)
        log.pending = (step, metrics)
    checkpointer.wait()
  except _NotFinite as error:
    checkpointer.wait()
    raise UserError(_explain(error, run)) from None
  finally:
    checkpointer.close()
    log.close()
    loader.close()
  return graphdef, state, evaluator


class _NotFinite(Exception):
  """A step whose numbers are useless; the message says which."""


class _Log:
  """Metrics on their way from the devices to the files, one step late."""

  def __init__(
    self, run: RunFolder, config: TrainConfig, *, resume_step: int | None
  ) -> None:
    self._config = config
    self._run = run
    self._writer = None
    if jax.process_index() == 0:
      self._writer = MetricsWriter(run.path, resume_step=resume_step)
    self.pending: tuple[int, Metrics] | None = None
    # When the last steps ended; the rate is their mean.
    self._ends: collections.deque[float] = collections.deque(maxlen=21)
    # Step to validation loss. The file knows it, so that a run that was
    # stopped between two records repeats none and leaves none out.
    self.validated: dict[int, float] = {}
    if resume_step is not None:
      self.validated = dict(
        distributed.from_first(lambda: _validations(run, resume_step))
      )

  def flush(self, show: Callable[[int, float, float], None]) -> None:
    """Writes the pending step; waits until the devices have finished it.

    Raises:
      _NotFinite: The step's loss or gradient is not.
    """
    if self.pending is None:
      return
    step, metrics = self.pending
    self.pending = None
    values = {name: float(value) for name, value in metrics.items()}
    self._ends.append(time.perf_counter())
    rate = 0.0
    if len(self._ends) > 1:
      tokens = self._config.batch_size * self._config.seq_len
      seconds = self._ends[-1] - self._ends[0]
      rate = tokens * (len(self._ends) - 1) / seconds
    for name in ("loss", "aux_loss", "grad_norm"):
      if not math.isfinite(values[name]):
        raise _NotFinite(f"{name} is {values[name]} at step {step}")
    if self._writer is not None and (
      step % self._config.log_every == 0 or step == self._config.steps
    ):
      self._writer.write(step, **values, tokens_per_s=rate)
    show(step, values["loss"], rate)

  def validation(self, step: int, evaluation: Measured) -> None:
    """Writes a validation record."""
    self.validated[step] = evaluation.loss
    if self._writer is not None:
      self._writer.write(
        step, validation_loss=evaluation.loss, **evaluation.scalars()
      )
    self._ends.clear()  # The time went into validation, not into steps.

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()


def _validations(run: RunFolder, until: int) -> list[tuple[int, float]]:
  """Step and validation loss, as far as a run has recorded them."""
  if not run.metrics_file.exists():
    return []
  return [
    (record["step"], record["validation_loss"])
    for record in read_metrics(run.metrics_file)
    if "validation_loss" in record and record["step"] <= until
  ]


def _explain(error: _NotFinite, run: RunFolder) -> str:
  steps = saved_steps(run.checkpoints)
  kept = (
    f"the last good checkpoint is step {steps[-1]} in {run.path}"
    if steps
    else "no checkpoint was due before it"
  )
  return (
    f"the training stopped: {error}; {kept}; try a lower "
    "`--optimizer.learning-rate` or more `--optimizer.warmup-steps`"
  )


def _agree(stop: signals.StopRequest, step: int) -> bool:
  """Whether to stop, the same answer in every process of the job."""
  if distributed.num_processes() > 1 and step % _AGREE_EVERY_STEPS:
    return False
  return any(distributed.everyone(bool(stop)))
