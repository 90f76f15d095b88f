"""What a decoder language model is made of: sizes, and a head plan a layer."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

from jaxheads.moh import MoHConfig

_SIZES = (
  "vocab_size",
  "num_layers",
  "embed_dim",
  "mlp_dim",
  "num_heads",
  "num_kv_heads",
  "head_dim",
  "max_seq_len",
)
_DTYPES = ("float32", "bfloat16", "float16")
Execution = Literal["dense", "dispatch"]
Implementation = Literal["reference", "xla"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes, numerics and head plans of a `DecoderLM`.

  Hashable, and equal to itself after `to_dict`, JSON and `from_dict`.

  Raises:
    ValueError: Sizes that do not fit together; the message names the argument.
    TypeError: A size that is no integer, a plan that is no `MoHConfig`.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int  # D: width of the residual stream.
  mlp_dim: int  # F: width inside the SwiGLU.
  num_heads: int  # N: query heads of a layer, active or not.
  num_kv_heads: int  # K: each serves N / K consecutive query heads.
  head_dim: int  # H: even, RoPE turns pairs of features.
  max_seq_len: int  # In tokens; longer sequences are refused.
  # One per layer; None: every head on and ungated.
  head_plans: tuple[MoHConfig | None, ...]
  tie_embeddings: bool = False  # One table reads tokens in and scores them out.
  rope_theta: float = 10_000.0
  norm_eps: float = 1e-5
  dtype: str = "float32"  # Of activations and matrix products.
  param_dtype: str = "float32"  # Of the stored parameters.
  remat: bool = False  # Recompute each layer in the backward pass.
  execution: Execution | None = None  # As in `moh.moh_attention`.
  implementation: Implementation | None = None  # As in `moh.moh_attention`.

  def __post_init__(self) -> None:
    for name in _SIZES:
      size = getattr(self, name)
      if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(
          f"`{name}` must be an integer, got {size!r} ({type(size).__name__})."
        )
      if size < 1:
        raise ValueError(f"`{name}` must be at least 1, got {size}.")
    if self.num_heads % self.num_kv_heads:
      raise ValueError(
        "`num_kv_heads` must divide `num_heads` "
        f"({self.num_heads}), got {self.num_kv_heads}."
      )
    if self.head_dim % 2:
      raise ValueError(
        "`head_dim` must be even, because RoPE turns pairs of features; got "
        f"{self.head_dim}. Take {self.head_dim + 1}."
      )
    # A list, as JSON gives it, would leave the config unhashable.
    object.__setattr__(self, "head_plans", tuple(self.head_plans))
    if len(self.head_plans) != self.num_layers:
      raise ValueError(
        f"`head_plans` must hold one plan for each of the {self.num_layers} "
        f"layers (`num_layers`), got {len(self.head_plans)}. Use None for a "
        "layer with every head on."
      )
    for layer, plan in enumerate(self.head_plans):
      if plan is None:
        continue
      if not isinstance(plan, MoHConfig):
        raise TypeError(
          f"`head_plans[{layer}]` must be a MoHConfig or None, got "
          f"{type(plan).__name__}."
        )
      if plan.num_heads != self.num_heads:
        raise ValueError(
          f"`head_plans[{layer}].num_heads` must equal `num_heads` "
          f"({self.num_heads}), got {plan.num_heads}."
        )
    for name in ("rope_theta", "norm_eps"):
      number = getattr(self, name)
      if not (math.isfinite(number) and number > 0):
        raise ValueError(f"`{name}` must be positive, got {number}.")
    for name, allowed in (
      ("dtype", _DTYPES),
      ("param_dtype", _DTYPES),
      ("execution", (None, *get_args(Execution))),
      ("implementation", (None, *get_args(Implementation))),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(
          f"`{name}` must be one of {', '.join(map(repr, allowed))}; got "
          f"{getattr(self, name)!r}."
        )

  @property
  def total_heads(self) -> int:
    """Query heads, summed over the layers."""
    return self.num_layers * self.num_heads

  @property
  def active_heads(self) -> int:
    """Query heads that one token uses, summed over the layers."""
    return sum(self._active(plan) for plan in self.head_plans)

  @property
  def runs(self) -> tuple[tuple[MoHConfig | None, int], ...]:
    """Consecutive layers of equal plan, as (plan, number of layers)."""
    runs: list[tuple[MoHConfig | None, int]] = []
    for plan in self.head_plans:
      if runs and runs[-1][0] == plan:
        runs[-1] = (plan, runs[-1][1] + 1)
      else:
        runs.append((plan, 1))
    return tuple(runs)

  @property
  def num_params(self) -> int:
    """Parameters of the model, exactly."""
    D, N, K, H = (
      self.embed_dim,
      self.num_heads,
      self.num_kv_heads,
      self.head_dim,
    )
    tables = 1 if self.tie_embeddings else 2
    attention = 2 * D * N * H + 2 * D * K * H  # Query and out, key and value.
    layer = attention + 3 * D * self.mlp_dim + 2 * D  # And two norms.
    return (
      tables * self.vocab_size * D
      + D  # The last norm.
      + self.num_layers * layer
      + sum(self._router_params(plan) for plan in self.head_plans)
    )

  def flops_per_token(self, seq_len: int) -> float:
    """Forward FLOPs of one token, averaged over a causal sequence.

    Two per multiply-accumulate; a token sees (seq_len + 1) / 2 keys on
    average. Heads that a token does not use count as free, as in the dispatch
    execution; the dense one computes them all. Embedding lookup, norms,
    softmax and activations are left out, the output vocabulary is in.

    Args:
      seq_len: Tokens per sequence, at least 1.
    Source:
      MoH, https://arxiv.org/abs/2410.11842: the linear terms of its layer.
    """
    if seq_len < 1:
      raise ValueError(f"`seq_len` must be at least 1, got {seq_len}.")
    D, N, K, H = (
      self.embed_dim,
      self.num_heads,
      self.num_kv_heads,
      self.head_dim,
    )
    context = (seq_len + 1) / 2
    total = 2.0 * D * self.vocab_size
    for plan in self.head_plans:
      active = self._active(plan)
      by_query = (
        plan is not None and plan.router == "query_norm" and plan.top_k > 0
      )
      # The query-norm router ranks heads by their queries: it needs them all.
      total += 2 * D * (N if by_query else active) * H
      total += 4 * D * K * H
      total += 4 * active * H * context
      total += 2 * active * H * D
      total += 6 * D * self.mlp_dim
      total += 2 * self._router_params(plan)
      if plan is not None and by_query:
        total += 2 * plan.num_routed * H
    return total

  def dense(self) -> "ModelConfig":
    """The matched baseline: the same model with every head on and ungated."""
    return dataclasses.replace(self, head_plans=(None,) * self.num_layers)

  def to_dict(self) -> dict[str, Any]:
    """A dict of JSON types; `from_dict` is its inverse."""
    fields = dataclasses.asdict(self)
    fields["head_plans"] = list(fields["head_plans"])
    return fields

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
    """The config whose `to_dict` gave `fields`.

    Raises:
      ValueError: A field is missing, or unknown to this version.
    """
    plans = tuple(
      None
      if plan is None
      else _build(MoHConfig, plan, where=f"head_plans[{layer}].")
      for layer, plan in enumerate(fields.get("head_plans", ()))
    )
    return _build(cls, {**fields, "head_plans": plans}, where="")

  def _active(self, plan: MoHConfig | None) -> int:
    return self.num_heads if plan is None else plan.num_active

  def _router_params(self, plan: MoHConfig | None) -> int:
    """Parameters of one layer's router: W_r, W_h and W_s, where they exist."""
    if plan is None or plan.router == "query_norm":
      return 0
    columns = plan.num_shared if plan.num_shared > 1 else 0
    if plan.top_k:
      columns += plan.num_routed + (2 if plan.num_shared else 0)
    return self.embed_dim * columns


def _build(cls: Any, fields: Mapping[str, Any], *, where: str) -> Any:
  """`cls(**fields)`, where a wrong key gets an error that names it."""
  known = {field.name: field for field in dataclasses.fields(cls)}
  for name in fields:
    if name not in known:
      raise ValueError(
        f"`{where}{name}` is no field of {cls.__name__}; "
        f"known are {', '.join(sorted(known))}."
      )
  for name, field in known.items():
    required = (
      field.default is dataclasses.MISSING
      and field.default_factory is dataclasses.MISSING
    )
    if required and name not in fields:
      raise ValueError(f"`{where}{name}` is missing from the config.")
  return cls(**fields)
