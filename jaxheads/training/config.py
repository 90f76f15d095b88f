"""What a training run is: frozen dataclasses that are flags, files and records.

The same values are the command-line flags (`--optimizer.learning-rate`), the
keys of a config file (`optimizer: {learning_rate: ...}`) and the `train` part
of a run's `config.json`.
"""

import dataclasses
from typing import Any

from jaxheads.training.model_options import ModelOptions, check


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
  """AdamW with a linear warm-up, a cosine decay and gradient clipping."""

  learning_rate: float = 3e-3
  """Highest learning rate, reached after the warm-up."""
  warmup_steps: int = 50
  """Steps of linear warm-up from zero."""
  final_fraction: float = 0.1
  """Learning rate at the last step, as a fraction of the highest."""
  weight_decay: float = 0.1
  """Decoupled weight decay, on matrices only."""
  b1: float = 0.9
  """Decay of the mean of gradients."""
  b2: float = 0.95
  """Decay of the mean of squared gradients."""
  clip_norm: float = 1.0
  """Largest global gradient norm; 0 turns clipping off."""
  accumulate: int = 1
  """Split each batch into this many parts and add their gradients: less memory,
  same result."""
  aux_weight: float = 0.01
  """Weight of the load-balance loss."""

  def __post_init__(self) -> None:
    check(
      self.learning_rate > 0,
      f"`--optimizer.learning-rate` must be positive, got {self.learning_rate}",
    )
    for name in ("warmup_steps", "weight_decay", "clip_norm", "aux_weight"):
      check(
        getattr(self, name) >= 0,
        f"`--optimizer.{name.replace('_', '-')}` must not be negative, "
        f"got {getattr(self, name)}",
      )
    for name in ("b1", "b2", "final_fraction"):
      check(
        0 <= getattr(self, name) <= 1,
        f"`--optimizer.{name.replace('_', '-')}` must be in [0, 1], "
        f"got {getattr(self, name)}",
      )
    check(
      self.accumulate >= 1,
      f"`--optimizer.accumulate` must be at least 1, got {self.accumulate}",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
  """Validation: the same batches every time."""

  every: int = 100
  """Steps between validations; the last step is always validated."""
  batches: int = 20
  """Validation batches; 0 means the whole split."""
  sample_tokens: int = 200
  """Tokens in the sample written at the end; 0 writes none."""
  prompt: str = "def "
  """What the sample continues."""

  def __post_init__(self) -> None:
    check(
      self.every >= 1,
      f"`--evaluation.every` must be at least 1, got {self.every}",
    )
    for name in ("batches", "sample_tokens"):
      check(
        getattr(self, name) >= 0,
        f"`--evaluation.{name.replace('_', '-')}` must not be negative, "
        f"got {getattr(self, name)}",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
  """When to save, and how much to keep."""

  every: int = 100
  """Steps between checkpoints; the last step is always saved."""
  keep: int = 2
  """Newest checkpoints to keep; the best one is kept besides."""

  def __post_init__(self) -> None:
    for name in ("every", "keep"):
      check(
        getattr(self, name) >= 1,
        f"`--checkpoint.{name}` must be at least 1, got {getattr(self, name)}",
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """A whole training run, and all that its numbers depend on."""

  data: str | None = None
  """Text to learn from: a file, a folder, or hf:NAME[:CONFIG]. Default: the
  source of Python's standard library, which every machine has."""
  tokenizer: str = "bytes"
  """"bytes", or the path of a Hugging Face tokenizers JSON file."""
  validation_fraction: float = 0.05
  """Part of the text kept for validation."""
  seq_len: int = 256
  """Tokens per sequence."""
  batch_size: int = 8
  """Sequences per step, over all devices."""
  steps: int = 500
  """Optimizer steps."""
  seed: int = 0
  """Seed of the initial weights and of the data order."""
  log_every: int = 1
  """Steps between records in metrics.jsonl."""
  baseline: bool = False
  """Also train the matched dense model (every head on, seeing everything) and
  compare."""
  model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
  optimizer: OptimizerOptions = OptimizerOptions()
  evaluation: EvaluationOptions = EvaluationOptions()
  checkpoint: CheckpointOptions = CheckpointOptions()

  def __post_init__(self) -> None:
    for name in ("seq_len", "batch_size", "steps", "log_every"):
      check(
        getattr(self, name) >= 1,
        f"`--{name.replace('_', '-')}` must be at least 1, got "
        f"{getattr(self, name)}",
      )
    check(
      0 < self.validation_fraction < 1,
      "`--validation-fraction` must be between 0 and 1, got "
      f"{self.validation_fraction}",
    )
    check(
      self.batch_size % self.optimizer.accumulate == 0,
      f"`--batch-size` must be a multiple of `--optimizer.accumulate` "
      f"({self.optimizer.accumulate}), got {self.batch_size}",
    )

  def to_dict(self) -> dict[str, Any]:
    """JSON-able; `configfile.from_dict` reads it back."""
    return dataclasses.asdict(self)
