"""What a decoder language model is made of: sizes, and what each layer does."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from jaxheads import flops, head_order
from jaxheads.moh import MoHConfig, router_size
from jaxheads.moh._execution import Execution, Implementation
from jaxheads.s2 import Pattern

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


class Run(NamedTuple):
  """Consecutive layers that are alike."""

  plan: MoHConfig | None
  context: Pattern | None
  head_order: head_order.HeadOrder | None
  num_layers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """Sizes, numerics, head plans and contexts of a `DecoderLM`.

  Hashable, and equal to itself after `to_dict`, JSON and `from_dict`.

  Raises:
    ValueError: Sizes that do not fit together; the message names the argument.
    TypeError: A size that is no integer, a plan that is no `MoHConfig`, a
      context that is no `Pattern`.
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
  # As in `moh.moh_attention`; not of layers that have a context and no plan.
  execution: Execution | None = None
  # As in `moh.moh_attention` and, where there is a context, in `attention`.
  implementation: Implementation | None = None
  # One per layer, which keys each head sees; None: all earlier ones. Empty:
  # None for every layer.
  contexts: tuple[Pattern | None, ...] = ()
  # One per layer, the head at each place where heads are stored; None: their
  # own order. Empty: None for every layer. Plans, contexts and all that the
  # model tells of heads number them in their own order; caches, and policies
  # of caches, as they are stored. See `jaxheads.sharding.placement`.
  head_orders: tuple[head_order.HeadOrder | None, ...] = ()

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
    if not self.contexts:
      object.__setattr__(self, "contexts", (None,) * self.num_layers)
    self._check_layers("head_plans", MoHConfig, "every head on")
    self._check_layers("contexts", Pattern, "every key visible")
    for layer, context in enumerate(self.contexts):
      if context is None:
        continue
      if not context.is_causal:
        raise ValueError(
          f"`contexts[{layer}]` must be causal: a decoder never looks ahead."
        )
      kv_heads = context.num_kv_heads
      if kv_heads is not None and kv_heads != self.num_kv_heads:
        raise ValueError(
          f"`contexts[{layer}].num_kv_heads` must equal `num_kv_heads` "
          f"({self.num_kv_heads}) or be None, got {kv_heads}."
        )
      try:
        context.check_lengths(self.max_seq_len, self.max_seq_len)
      except ValueError as error:
        raise ValueError(
          f"`contexts[{layer}]` must reach `max_seq_len` "
          f"({self.max_seq_len}): {error}"
        ) from error
    self._check_head_orders()
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

  def _check_layers(
    self, name: str, kind: type[MoHConfig] | type[Pattern], otherwise: str
  ) -> None:
    """One `kind` or None for each layer, each for this number of heads."""
    # A list, as JSON gives it, would leave the config unhashable.
    object.__setattr__(self, name, tuple(getattr(self, name)))
    values = getattr(self, name)
    if len(values) != self.num_layers:
      raise ValueError(
        f"`{name}` must hold one entry for each of the {self.num_layers} "
        f"layers (`num_layers`), got {len(values)}. Use None for a layer with "
        f"{otherwise}."
      )
    for layer, value in enumerate(values):
      if value is None:
        continue
      if not isinstance(value, kind):
        raise TypeError(
          f"`{name}[{layer}]` must be a {kind.__name__} or None, got "
          f"{type(value).__name__}."
        )
      if value.num_heads != self.num_heads:
        raise ValueError(
          f"`{name}[{layer}].num_heads` must equal `num_heads` "
          f"({self.num_heads}), got {value.num_heads}."
        )

  def _check_head_orders(self) -> None:
    """One form for each meaning: heads in their own order are None, or ()."""
    if self.head_orders and len(self.head_orders) != self.num_layers:
      raise ValueError(
        "`head_orders` must hold one entry for each of the "
        f"{self.num_layers} layers (`num_layers`) or none, got "
        f"{len(self.head_orders)}."
      )
    orders = tuple(
      head_order.checked(
        order,
        self.num_heads,
        self.num_kv_heads,
        name=f"head_orders[{layer}]",
      )
      for layer, order in enumerate(self.head_orders)
    )
    object.__setattr__(self, "head_orders", orders if any(orders) else ())

  @property
  def stored_contexts(self) -> tuple[Pattern | None, ...]:
    """The contexts, with a rule for each place where heads are stored."""
    if not self.head_orders:
      return self.contexts
    return tuple(
      context and context.reordered(order)
      for context, order in zip(self.contexts, self.head_orders, strict=True)
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
  def runs(self) -> tuple[Run, ...]:
    """Consecutive layers of equal plan, context and order of heads."""
    runs: list[Run] = []
    orders = self.head_orders or (None,) * self.num_layers
    for alike in zip(self.head_plans, self.contexts, orders, strict=True):
      if runs and runs[-1][:-1] == alike:
        runs[-1] = runs[-1]._replace(num_layers=runs[-1].num_layers + 1)
      else:
        runs.append(Run(*alike, num_layers=1))
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

  def visible_fraction(self, seq_len: int) -> float:
    """Visible (query, key) pairs over those of a model without contexts.

    Args:
      seq_len: Tokens per sequence, at least 1.
    """
    return sum(self.densities(seq_len)) / self.num_layers

  def densities(self, seq_len: int) -> list[float]:
    """Visible share of the causal pairs of a query and a key, by layer."""
    if seq_len < 1:
      raise ValueError(f"`seq_len` must be at least 1, got {seq_len}.")
    of_context = {
      context: 1.0 if context is None else context.density(seq_len)
      for context in set(self.contexts)
    }
    return [of_context[context] for context in self.contexts]

  def flops_per_token(self, seq_len: int) -> float:
    """Forward FLOPs of one token, averaged over a causal sequence.

    Heads that a token does not use count as free, as in the dispatch
    execution; the dense one computes them all. See `jaxheads.flops.prefill`.

    Args:
      seq_len: Tokens per sequence, at least 1.
    """
    return flops.prefill(self, seq_len).total_flops

  def dense(self) -> "ModelConfig":
    """The matched baseline: every head on, ungated, and seeing everything."""
    nothing = (None,) * self.num_layers
    return dataclasses.replace(
      self, head_plans=nothing, contexts=nothing, head_orders=()
    )

  def to_dict(self) -> dict[str, Any]:
    """A dict of JSON types; `from_dict` is its inverse."""
    fields = {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
    }
    fields["head_plans"] = [
      None if plan is None else dataclasses.asdict(plan)
      for plan in self.head_plans
    ]
    fields["contexts"] = [
      None if context is None else context.to_dict()
      for context in self.contexts
    ]
    return fields

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "ModelConfig":
    """The config whose `to_dict` gave `fields`.

    Fields that have a default may be missing, as `contexts` and `head_orders`
    are in what version 0.1.0 wrote.

    Raises:
      ValueError: A field is missing, or unknown to this version.
    """
    plans = tuple(
      None
      if plan is None
      else _build(MoHConfig, plan, where=f"head_plans[{layer}].")
      for layer, plan in enumerate(fields.get("head_plans", ()))
    )
    contexts = tuple(
      None if context is None else Pattern.from_dict(context)
      for context in fields.get("contexts", ())
    )
    fields = {**fields, "head_plans": plans, "contexts": contexts}
    return _build(cls, fields, where="")

  def _active(self, plan: MoHConfig | None) -> int:
    return self.num_heads if plan is None else plan.num_active

  def _router_params(self, plan: MoHConfig | None) -> int:
    """Parameters of one layer's router."""
    return 0 if plan is None else router_size(plan, self.embed_dim)


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
