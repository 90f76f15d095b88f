"""Training of a language model on text, and what it leaves behind."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxheads.data import Corpus, Loader, Tokenizer, make_loader
from jaxheads.errors import UserError
from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.sharding import MeshShape
from jaxheads.sharding.placement import place_on
from jaxheads.training import (
  artefacts,
  devices,
  distributed,
  exchange,
  signals,
)
from jaxheads.training.config import TrainConfig
from jaxheads.training.console import Reporter
from jaxheads.training.evaluation import Evaluator
from jaxheads.training.fit import Interrupted, fit
from jaxheads.training.run_folder import RunFolder


def train(
  config: TrainConfig,
  model_config: ModelConfig,
  run: RunFolder,
  *,
  corpus: Corpus,
  tokenizer: Tokenizer,
  reporter: Reporter,
  build_model: Callable[..., nnx.Module] = DecoderLM,
  resume: bool = False,
  mesh_shape: MeshShape | None = None,
) -> dict[str, Any]:
  """Trains one model on all devices and returns its final figures.

  Everything the numbers depend on is in `config`, `model_config` and the
  corpus; a resumed run continues bit for bit where the last checkpoint was (on
  another mesh or number of processes, up to rounding).

  Args:
    config: Steps, batches, optimizer and intervals; its `model` and
      `baseline` parts are not read.
    model_config: Handed to `build_model`, its heads placed so that the devices
      that share them have equal work.
    run: Where the artefacts go; made by the caller.
    corpus, tokenizer: What to learn from.
    reporter: Shows progress.
    build_model: (model_config, rngs=...) to a module with `token_nats`; its
      load-balance loss, if any, is an `AuxLoss`.
    resume: Continue from the newest checkpoint in `run`, or from the start if
      there is none.
    mesh_shape: How the devices share the work; `None` is `parse_mesh(None)`.

  Returns:
    What summary.json holds.

  Raises:
    UserError: The sizes do not fit, the processes have other texts, the
      checkpoint is of another model, the disk is full, or the loss is not
      finite.
    Interrupted: SIGTERM or Ctrl-C came; the state is saved.
  """
  mesh = check_sizes(config, model_config, mesh_shape)
  placed_config = place_on(mesh, model_config, config.seq_len)
  if distributed.num_processes() > 1:
    distributed.agree(
      {
        "the training text": distributed.fingerprint(corpus.train),
        "the validation text": distributed.fingerprint(corpus.validation),
      }
    )

  def make_data(
    graphdef: nnx.GraphDef[Any], mesh: Mesh
  ) -> tuple[Loader, Evaluator]:
    loader = make_loader(
      corpus.train,
      seq_len=config.seq_len,
      batch_size=config.batch_size,
      seed=config.seed,
      rows=devices.rows_of_process(mesh, config.batch_size),
      name="the training text",
    )
    return loader, Evaluator(
      graphdef,
      corpus,
      tokenizer,
      seq_len=config.seq_len,
      batch_size=config.batch_size,
      num_batches=config.evaluation.batches,
      mesh=mesh,
    )

  with signals.stop_on_signals() as stop:
    with jax.set_mesh(mesh):
      graphdef, state, evaluator = fit(
        config,
        placed_config,
        run,
        name=artefacts.label(model_config),
        reporter=reporter,
        build_model=lambda rngs: build_model(placed_config, rngs=rngs),
        make_data=make_data,
        resume=resume,
        mesh=mesh,
        stop=stop,
      )
    summary: dict[str, Any] = {}
    variables = devices.on_one_device(mesh, (state.params, state.rest))
    if jax.process_index() == 0:
      model = nnx.merge(graphdef, *variables)
      summary = artefacts.write_all(
        run, model, config, model_config, evaluator, tokenizer
      )
    if stop:
      raise Interrupted(stop.name or "SIGTERM", config.steps)
  return summary


def check_sizes(
  config: TrainConfig, model_config: ModelConfig, shape: MeshShape | None
) -> Mesh:
  """The mesh of all devices, if all sizes fit it; `UserError` otherwise."""
  if config.seq_len > model_config.max_seq_len:
    raise UserError(
      f"`--seq-len` must be at most the model's `max_seq_len` "
      f"({model_config.max_seq_len}), got {config.seq_len}; lower it or raise "
      "`--model.max-seq-len`"
    )
  mesh = devices.model_mesh(shape, model_config)
  devices.check_batch_size(
    config.batch_size, mesh, accumulate=config.optimizer.accumulate
  )
  sizes = MeshShape(**dict(mesh.shape))
  if sizes.context > 1:  # Heads and sequences split, or an error says why not.
    exchange.of_model(
      model_config,
      sizes,
      batch_size=config.batch_size,
      seq_len=config.seq_len,
    )
  return mesh
