"""What a training run is: frozen dataclasses that are flags, files and records.

The same values are the command-line flags (`--optimizer.learning-rate`), the
keys of a config file (`optimizer: {learning_rate: ...}`) and the `train` part
of a run's `config.json`.
"""

import dataclasses
from typing import Any, Literal

from jaxheads.errors import UserError
from jaxheads.models import ModelConfig, presets
from jaxheads.moh import MoHConfig


def _check(ok: bool, message: str) -> None:
  if not ok:
    raise UserError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
  """The model: a preset, and what to change in it."""

  preset: Literal["tiny", "llm-s", "llm-b"] = "tiny"
  """Architecture to start from."""
  active: float = 0.75
  """Fraction of the heads that each token uses, in every layer."""
  shared: tuple[int, ...] = ()
  """Heads that are always on: one number, or one per layer. Default: a quarter
  of the heads."""
  top_k: tuple[int, ...] = ()
  """Routed heads that each token picks: one number, or one per layer.
  Default: what `active` leaves after the shared heads."""
  router: Literal["two_stage", "query_norm", "none"] = "two_stage"
  """How heads are picked; "none" is plain multi-head attention."""
  gates: Literal["scaled", "paper"] = "scaled"
  """Gates of the two-stage router: the released code's, or the paper's."""
  straight_through: Literal["selected", "dense"] = "selected"
  """Which heads the query-norm router sends gradients to."""
  group_size: int = 1
  """Pick whole groups of this many neighbouring heads."""
  num_layers: int | None = None
  """Layers."""
  embed_dim: int | None = None
  """Width of the residual stream (D)."""
  mlp_dim: int | None = None
  """Width of the feed-forward layer (F)."""
  num_heads: int | None = None
  """Query heads per layer (N)."""
  num_kv_heads: int | None = None
  """Key-value heads per layer (K); divides the query heads."""
  head_dim: int | None = None
  """Size of one head (H)."""
  max_seq_len: int | None = None
  """Longest sequence the model takes, in tokens."""
  tie_embeddings: bool | None = None
  """Use the token embedding as the output layer too."""
  rope_theta: float | None = None
  """Base of the rotary position frequencies."""
  dtype: Literal["float32", "bfloat16"] | None = None
  """Type of activations; parameters stay float32."""
  remat: bool | None = None
  """Recompute activations in the backward pass: less memory, more time."""
  execution: Literal["dense", "dispatch"] | None = None
  """How routed attention is computed. Default: the faster one."""
  implementation: Literal["reference", "xla"] | None = None
  """Kernel family. Default: the best for the device."""

  def build(self, vocab_size: int) -> ModelConfig:
    """The full model config; `UserError` if the numbers do not fit together."""
    changed = (
      "num_layers embed_dim mlp_dim num_heads num_kv_heads head_dim "
      "max_seq_len tie_embeddings rope_theta dtype remat execution "
      "implementation"
    ).split()
    overrides = {
      name: getattr(self, name)
      for name in changed
      if getattr(self, name) is not None
    }
    _check(
      0 < self.active <= 1,
      f"`--model.active` must be in (0, 1], got {self.active}",
    )
    try:
      # The preset is built without routing and the plans are put in after,
      # so that one rule, below, decides every layer.
      base = presets.get(
        self.preset, vocab_size=vocab_size, active=1.0, **overrides
      )
      return dataclasses.replace(base, head_plans=self._plans(base))
    except (ValueError, TypeError) as error:
      raise UserError(f"model: {error}") from error

  def _plans(self, base: ModelConfig) -> tuple[MoHConfig | None, ...]:
    shared = self._per_layer("shared", self.shared, base.num_layers)
    top_k = self._per_layer("top-k", self.top_k, base.num_layers)
    if self.router == "none":
      return (None,) * base.num_layers
    plans = []
    for layer_shared, layer_top_k in zip(shared, top_k, strict=True):
      fields: dict[str, Any] = dict(
        router=self.router,
        straight_through=self.straight_through,
        group_size=self.group_size,
      )
      if self.router == "two_stage":
        fields["gates"] = self.gates
      plan = (
        MoHConfig.from_fraction(
          base.num_heads, self.active, shared=layer_shared, **fields
        )
        if layer_top_k is None
        else MoHConfig(
          num_heads=base.num_heads,
          num_shared=(
            MoHConfig.from_fraction(base.num_heads, self.active).num_shared
            if layer_shared is None
            else layer_shared
          ),
          top_k=layer_top_k,
          **fields,
        )
      )
      plans.append(plan)
    return tuple(plans)

  @staticmethod
  def _per_layer(
    name: str, values: tuple[int, ...], num_layers: int
  ) -> tuple[int | None, ...]:
    if not values:
      return (None,) * num_layers
    if len(values) == 1:
      return values * num_layers
    _check(
      len(values) == num_layers,
      f"`--model.{name}` takes one number or one per layer ({num_layers}), "
      f"got {len(values)}: {' '.join(map(str, values))}",
    )
    return values


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
    _check(
      self.learning_rate > 0,
      f"`--optimizer.learning-rate` must be positive, got {self.learning_rate}",
    )
    for name in ("warmup_steps", "weight_decay", "clip_norm", "aux_weight"):
      _check(
        getattr(self, name) >= 0,
        f"`--optimizer.{name.replace('_', '-')}` must not be negative, "
        f"got {getattr(self, name)}",
      )
    for name in ("b1", "b2", "final_fraction"):
      _check(
        0 <= getattr(self, name) <= 1,
        f"`--optimizer.{name.replace('_', '-')}` must be in [0, 1], "
        f"got {getattr(self, name)}",
      )
    _check(
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
    _check(
      self.every >= 1,
      f"`--evaluation.every` must be at least 1, got {self.every}",
    )
    for name in ("batches", "sample_tokens"):
      _check(
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
      _check(
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
  """Also train the matched dense model (every head on) and compare."""
  model: ModelOptions = ModelOptions()
  optimizer: OptimizerOptions = OptimizerOptions()
  evaluation: EvaluationOptions = EvaluationOptions()
  checkpoint: CheckpointOptions = CheckpointOptions()

  def __post_init__(self) -> None:
    for name in ("seq_len", "batch_size", "steps", "log_every"):
      _check(
        getattr(self, name) >= 1,
        f"`--{name.replace('_', '-')}` must be at least 1, got "
        f"{getattr(self, name)}",
      )
    _check(
      0 < self.validation_fraction < 1,
      "`--validation-fraction` must be between 0 and 1, got "
      f"{self.validation_fraction}",
    )
    _check(
      self.batch_size % self.optimizer.accumulate == 0,
      f"`--batch-size` must be a multiple of `--optimizer.accumulate` "
      f"({self.optimizer.accumulate}), got {self.batch_size}",
    )

  def to_dict(self) -> dict[str, Any]:
    """JSON-able; `configfile.from_dict` reads it back."""
    return dataclasses.asdict(self)
