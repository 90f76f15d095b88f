"""What an implementation of head attention is given."""

import dataclasses
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, Int

from pallas_kernels.head_attention.contexts import HeadContexts
from pallas_kernels.head_attention.tiling import Tiling


class Operands(NamedTuple):
  """The arrays."""

  q: Float[Array, "B T N H"]
  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K Hv"]
  q_segment_ids: Int[Array, "B T"] | None  # Both or neither.
  kv_segment_ids: Int[Array, "B S"] | None
  q_offset: Int[Array, ""]  # Position of the first query, if not static.


@dataclasses.dataclass(frozen=True)
class Settings:
  """The static part; hashable.

  Attributes:
    pattern: What each head sees.
    scale: Multiplies the logits.
    logits_soft_cap: c in c tanh(logits / c), or None.
    q_offset: Position of the first query among the keys; None if it is traced
      and stands in `Operands.q_offset`.
    tiling: Tile sizes; None lets the implementation choose.
    interpret: For `pallas_call`.
  """

  pattern: HeadContexts
  scale: float
  logits_soft_cap: float | None
  q_offset: int | None
  tiling: Tiling | None
  interpret: Any = False


class Implementation(Protocol):
  """A module with these three functions."""

  def refusal(self, settings: Settings, operands: Operands) -> str | None:
    """Why these inputs are not covered, with the way out; None if they are."""

  def forward(
    self, settings: Settings, operands: Operands
  ) -> tuple[Float[Array, "B T N Hv"], Float[Array, "B N T"]]:
    """Output in q's dtype, and float32 log-sum-exp (-inf for empty rows)."""

  def backward(
    self,
    settings: Settings,
    operands: Operands,
    out: Float[Array, "B T N Hv"],
    lse: Float[Array, "B N T"],
    d_out: Float[Array, "B T N Hv"],
    d_lse: Float[Array, "B N T"],
  ) -> tuple[
    Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K Hv"]
  ]:
    """Gradients of q, k and v in their dtypes; rows with lse -inf give 0."""
