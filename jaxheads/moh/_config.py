"""What a mixture-of-head layer is: which heads are always on, which compete."""

import dataclasses
import math
import warnings
from typing import Literal, Self

RouterKind = Literal["two_stage", "query_norm"]
GateForm = Literal["scaled", "paper"]
StraightThrough = Literal["selected", "dense"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoHConfig:
  """Heads of one mixture-of-head (MoH) attention layer.

  Heads `0 .. num_shared - 1` answer every token; each token also picks `top_k`
  of the remaining `num_routed` heads. With `top_k = 0` nothing is routed and
  the heads are only weighted; that needs `num_shared = num_heads`.

  Attributes:
    num_heads: Query heads of the layer.
    num_shared: Heads that are always on; the first ones, by position.
    top_k: Routed heads that each token picks.
    router: "two_stage" learns three bias-free maps of the layer's input.
      "query_norm" has no parameters: the heads with the largest query norms
      win. It suits the continued training of a model that has no router.
    gates: Weights of the two-stage router. "scaled" is the released code's
      form, where neutral routers give gates of exactly 1; "paper" is Eq. 5-6,
      neither rescaled nor renormalised.
    straight_through: Gradient of the query-norm router's binary gates: to the
      selected heads only, or to all ("dense", which computes every head). Two
      routed heads get none: their norms, divided by their deviation, differ by
      a constant.
    group_size: Heads are picked in whole groups of this many consecutive
      heads. With grouped queries set it to `num_heads // num_kv_heads`:
      otherwise nearly every KV head is read by some query head.

  Raises:
    ValueError: The counts do not add up; the message names the argument.

  Source:
    MoH, https://arxiv.org/abs/2410.11842, sections 3.2-3.3 and 4.4. Differs:
    group-constrained selection, and top_k = 0 or num_shared = 0 or 1 anywhere.
  """

  num_heads: int
  num_shared: int
  top_k: int
  router: RouterKind = "two_stage"
  gates: GateForm = "scaled"
  straight_through: StraightThrough = "selected"
  group_size: int = 1

  def __post_init__(self) -> None:
    _check_choice("router", self.router, ("two_stage", "query_norm"))
    _check_choice("gates", self.gates, ("scaled", "paper"))
    _check_choice(
      "straight_through", self.straight_through, ("selected", "dense")
    )
    if self.num_heads < 1:
      raise ValueError(f"`num_heads` must be at least 1, got {self.num_heads}.")
    if not 0 <= self.num_shared <= self.num_heads:
      raise ValueError(
        f"`num_shared` must be in [0, `num_heads` = {self.num_heads}], "
        f"got {self.num_shared}."
      )
    if not 0 <= self.top_k <= self.num_routed:
      raise ValueError(
        "`top_k` must be in [0, `num_heads` - `num_shared` = "
        f"{self.num_routed}], got {self.top_k}."
      )
    if self.top_k == 0 and self.num_routed:
      raise ValueError(
        "`top_k` = 0 needs `num_shared` = `num_heads` "
        f"({self.num_heads}), got `num_shared` = {self.num_shared}: "
        f"{self.num_routed} heads would never be used."
      )
    if self.group_size < 1:
      raise ValueError(
        f"`group_size` must be at least 1, got {self.group_size}."
      )
    for name in ("num_heads", "num_shared", "top_k"):
      if getattr(self, name) % self.group_size:
        raise ValueError(
          f"`{name}` must be a multiple of `group_size` "
          f"({self.group_size}), got {getattr(self, name)}."
        )
    if self._selection_has_no_task_gradient:
      warnings.warn(
        f"`top_k` = {self.top_k} with `gates` = 'scaled' picks a single "
        "choice whose total weight is a constant: the router's "
        "selection gets no gradient from the task, only from the "
        "load-balance loss. Use `gates='paper'` or a larger `top_k`.",
        UserWarning,
        stacklevel=3,
      )

  @classmethod
  def from_fraction(
    cls,
    num_heads: int,
    active: float,
    *,
    shared: int | None = None,
    group_size: int = 1,
    router: RouterKind = "two_stage",
    gates: GateForm = "scaled",
    straight_through: StraightThrough = "selected",
  ) -> Self:
    """The layer whose tokens use a fraction `active` of the heads.

    Args:
      num_heads: Query heads of the layer.
      active: Wanted fraction of active heads, in (0, 1]; rounded to the
        nearest number of whole groups, at least one.
      shared: Heads that are always on. `None` means a quarter of the heads,
        at least one group, at most half of the active ones.
      group_size: See the class; as are `router`, `gates`, `straight_through`.

    Returns:
      The configuration; with `active = 1` every routed head is picked.

    Raises:
      ValueError: `active` is out of range, or fewer than `shared` heads.
    """
    if not 0.0 < active <= 1.0:
      raise ValueError(f"`active` must be in (0, 1], got {active}.")
    if num_heads % group_size:
      raise ValueError(
        f"`num_heads` must be a multiple of `group_size` ({group_size}), "
        f"got {num_heads}."
      )
    groups = num_heads // group_size
    active_groups = max(1, math.floor(active * groups + 0.5))
    num_active = active_groups * group_size
    if shared is None:
      shared = min(max(1, groups // 4), active_groups // 2) * group_size
    if shared > num_active:
      raise ValueError(
        f"`shared` must be at most the {num_active} active heads "
        f"(`active` = {active} of {num_heads}), got {shared}."
      )
    if shared == num_active < num_heads:
      raise ValueError(
        f"`shared` = {shared} leaves no active head to route "
        f"(`active` = {active} of {num_heads} heads): lower `shared`."
      )
    return cls(
      num_heads=num_heads,
      num_shared=shared,
      top_k=num_active - shared,
      router=router,
      gates=gates,
      straight_through=straight_through,
      group_size=group_size,
    )

  @property
  def num_routed(self) -> int:
    """Heads that compete: all that are not shared."""
    return self.num_heads - self.num_shared

  @property
  def num_active(self) -> int:
    """Heads that each token uses."""
    return self.num_shared + self.top_k

  @property
  def active_fraction(self) -> float:
    """Active heads over all heads."""
    return self.num_active / self.num_heads

  @property
  def routes(self) -> bool:
    """Whether tokens pick heads at all."""
    return self.top_k > 0

  @property
  def learns_from_all_heads(self) -> bool:
    """Whether heads that are off get gradients: all must be computed."""
    return self.router == "query_norm" and self.straight_through == "dense"

  @property
  def _selection_has_no_task_gradient(self) -> bool:
    return (
      self.routes
      and self.top_k == self.group_size
      and self.router == "two_stage"
      and self.gates == "scaled"
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    listed = ", ".join(repr(choice) for choice in choices)
    raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")
