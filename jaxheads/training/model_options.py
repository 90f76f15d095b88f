"""The model's part of a training run: a preset, and what to change in it."""

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from jaxheads import s2
from jaxheads.errors import UserError
from jaxheads.models import ModelConfig, presets
from jaxheads.moh import MoHConfig


def check(ok: bool, message: str) -> None:
  """Raises a `UserError` with `message` unless `ok`."""
  if not ok:
    raise UserError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class S2Options:
  """Sharded sparse attention: which layers have it, and what their heads see.

  Each head sees the last blocks, and of older blocks every `stride`-th: its
  own share, so that the heads see everything together.
  """

  stride: int | None = None
  """Shares that the past is dealt into. Default: no layer is sharded."""
  block_size: int = 64
  """Tokens of a block, a power of two."""
  local_blocks: int = 4
  """Last blocks that every head sees, the token's own among them."""
  dense_layers: tuple[int, ...] = (-1,)
  """Layers in which every head sees everything; 0 is the first layer, -1 the
  last. No number: none."""
  per_query_head: bool = False
  """Deal shares to query heads rather than to key-value heads: allows more
  shares, but a key-value head then needs several of them."""

  def contexts(self, base: ModelConfig) -> tuple[s2.Pattern | None, ...]:
    """What each layer of `base` sees.

    Raises:
      UserError: A layer that is not there.
      ValueError: Sizes that make no complete pattern.
    """
    if self.stride is None:
      return (None,) * base.num_layers
    for layer in self.dense_layers:
      check(
        -base.num_layers <= layer < base.num_layers,
        "`--model.s2.dense-layers` must be layers of this model, "
        f"{-base.num_layers} to {base.num_layers - 1}, got {layer}",
      )
    pattern = s2.strided(
      base.num_heads,
      block_size=self.block_size,
      local_blocks=self.local_blocks,
      vertical_stride=self.stride,
      num_kv_heads=base.num_kv_heads,
      per_query_head=self.per_query_head,
    )
    dense = {layer % base.num_layers for layer in self.dense_layers}
    return tuple(
      None if layer in dense else pattern for layer in range(base.num_layers)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
  """The model: a preset, and what to change in it."""

  preset: Literal[
    "tiny", "llm-s", "llm-b", "moh-llama3-8b", "moh-llama3-70b"
  ] = "tiny"
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
  execution: Annotated[
    Literal["dense", "dispatch"] | None,
    tyro.conf.arg(aliases=["--execution"]),
  ] = None
  """How routed attention is computed. Default: the faster one."""
  implementation: Annotated[
    Literal["reference", "xla", "mosaic_tpu", "triton", "mosaic_gpu"] | None,
    tyro.conf.arg(aliases=["--implementation"]),
  ] = None
  """Kernel family. Default: the best for the device."""
  s2: S2Options = S2Options()

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
    check(
      0 < self.active <= 1,
      f"`--model.active` must be in (0, 1], got {self.active}",
    )
    try:
      # The preset is built without routing and the plans are put in after,
      # so that one rule, below, decides every layer.
      base = presets.get(
        self.preset, vocab_size=vocab_size, active=1.0, **overrides
      )
      return dataclasses.replace(
        base, head_plans=self._plans(base), contexts=self.s2.contexts(base)
      )
    except (ValueError, TypeError) as error:
      raise UserError(f"model: {error}") from error

  def dense(self) -> "ModelOptions":
    """The same model with every head on, ungated and seeing everything."""
    return dataclasses.replace(self, router="none", s2=S2Options())

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
    check(
      len(values) == num_layers,
      f"`--model.{name}` takes one number or one per layer ({num_layers}), "
      f"got {len(values)}: {' '.join(map(str, values))}",
    )
    return values
