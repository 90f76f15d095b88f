"""What an implementation of routed attention is given."""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.head_attention import operands as head_operands
from pallas_kernels.head_attention.contexts import HeadContexts, Rule, Strided
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  TableHeads,
  split_heads,
)
from pallas_kernels.packing import Packing
from pallas_kernels.routed_attention.tiling import Tiling
from pallas_kernels.value_checks import check_values

# Blocks where there is no pattern to name them.
_BLOCK = 128
# Tokens that windows and positions stay below.
FARTHEST = 2**29
# Position of a row that holds no query.
UNUSED = -(2**30)


Runs = tuple[StridedHeads | TableHeads, ...]


class Operands(NamedTuple):
  """The arrays."""

  q: Float[Array, "rows H"]
  k: Float[Array, "B S K H"]
  v: Float[Array, "B S K H"]
  packing: Packing
  q_offset: Int[Array, ""]  # Position of token 0 among the keys.
  mask: Bool[Array, "#B #N #T S"] | None
  q_segment_ids: Int[Array, "B T"] | None  # Both or neither.
  kv_segment_ids: Int[Array, "B S"] | None


def of_heads(operands: Operands) -> head_operands.Operands:
  """Shapes and dtypes of head attention whose heads have all rows each."""
  rows, size = operands.q.shape
  shape = (operands.k.shape[0], rows, operands.packing.num_heads, size)
  return head_operands.Operands(
    q=jax.ShapeDtypeStruct(shape, operands.q.dtype),  # type: ignore[arg-type]
    k=operands.k,
    v=operands.v,
    q_segment_ids=operands.q_segment_ids,
    kv_segment_ids=operands.kv_segment_ids,
    q_offset=operands.q_offset,
  )


@dataclasses.dataclass(frozen=True)
class Settings:
  """The static part; hashable.

  Attributes:
    pattern: What each head sees; None is all keys.
    is_causal: Whether keys after the query are hidden if there is no pattern.
    scale: Multiplies the logits.
    tiling: Tile sizes.
    interpret: For `pallas_call`.
  """

  pattern: HeadContexts | None
  is_causal: bool
  scale: float
  tiling: Tiling
  interpret: Any = False

  @property
  def block(self) -> int:
    """Tokens of a block of the pattern."""
    return _BLOCK if self.pattern is None else self.pattern.block_size

  def rules(self, num_heads: int) -> tuple[Rule, ...]:
    """One a head; without a pattern, all of the past."""
    if self.pattern is None:
      rules: tuple[Rule, ...] = (Strided(local=1, stride=1),) * num_heads
    else:
      rules = self.pattern.rules
    return tuple(_bounded(rule, FARTHEST // self.block) for rule in rules)

  def runs(self, num_heads: int, *, looks_up_sinks: bool = True) -> Runs:
    """The heads, in runs whose visits have one form.

    Strided rules are causal ones of what `seen_up_to` says. Those with sinks
    count as tables, unless the caller has a use for `StridedHeads.sinks`.
    """
    rules = HeadContexts(self.block, self.rules(num_heads))
    return split_heads(rules, looks_up_sinks=looks_up_sinks)

  def of_heads(self, num_heads: int) -> head_operands.Settings:
    """What head attention would be asked for."""
    return head_operands.Settings(
      pattern=HeadContexts(self.block, self.rules(num_heads)),
      scale=self.scale,
      logits_soft_cap=None,
      q_offset=0,
      tiling=self.tiling,
      interpret=self.interpret,
    )

  def refusal_of_tables(self, num_heads: int) -> str | None:
    """Why kernels for strided heads do not cover these; None if they do."""
    if not any(isinstance(run, TableHeads) for run in self.runs(num_heads)):
      return None
    return (
      "`pattern` has heads whose rule is a table, has sinks or two strides; "
      "routed queries have strided heads here."
    )


def _bounded(rule: Rule, most: int) -> Rule:
  """The same rule, with a window of at most so many blocks.

  All of the past is a window that is longer than any sequence.
  """
  if not isinstance(rule, Strided):
    return rule
  if rule.stride == 1:
    return Strided(local=most)
  return dataclasses.replace(
    rule, local=min(rule.local, most), sinks=min(rule.sinks, most)
  )


class Implementation(Protocol):
  """A module with these three functions."""

  def refusal(self, settings: Settings, operands: Operands) -> str | None:
    """Why these inputs are not covered, with the way out; None if they are."""

  def forward(
    self, settings: Settings, operands: Operands
  ) -> tuple[Float[Array, "rows H"], Float[Array, " rows"]]:
    """Output in q's dtype; float32 log-sum-exp in base 2, -inf if empty."""

  def backward(
    self,
    settings: Settings,
    operands: Operands,
    out: Float[Array, "rows H"],
    lse: Float[Array, " rows"],
    d_out: Float[Array, "rows H"],
  ) -> tuple[
    Float[Array, "rows H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
  ]:
    """Gradients of q, k and v in their dtypes; rows with lse -inf give 0."""


def check_context(
  pattern: HeadContexts | None,
  q_offset: Int[Array, ""] | int,
  *,
  heads: int,
  length: int,
  kv_length: int,
) -> None:
  """Refuses patterns and offsets that do not fit the queries and keys.

  Args:
    pattern: What each head sees; None is all keys.
    q_offset: Index, among the keys, of the first query.
    heads: Query heads.
    length, kv_length: Queries and keys.

  Raises:
    ValueError: The pattern is for other heads or ends before the queries or
      keys do, or `q_offset` is out of range; see `check_values`.
  """
  reach = FARTHEST
  if pattern is not None:
    if pattern.num_heads != heads:
      raise ValueError(
        f"`pattern` is for {pattern.num_heads} query heads, got {heads}. Make "
        "the pattern for this number of heads."
      )
    static = 0 if isinstance(q_offset, jax.Array) else int(q_offset)
    pattern.check_lengths(static + length, kv_length)
    reach = pattern.query_reach or reach
  least, most = -FARTHEST, reach - length
  check_values(
    "q_offset",
    (q_offset,),
    lambda offset: ((least <= offset) & (offset <= most), offset),
    f"be in [{least}, {most}] for {length} queries",
  )


def row_positions(operands: Operands) -> Int[Array, " rows"]:
  """Position of each row among the keys; -2^30 for unused rows."""
  position = operands.packing.row_position
  return jnp.where(position < 0, UNUSED, position + operands.q_offset)


def seen_up_to(settings: Settings, operands: Operands) -> Int[Array, " rows"]:
  """The last key that a strided rule may show to each row.

  Strided rules hide every block after the query's own. Then a rule that is not
  causal inside that block is a causal one of a query at the block's end, and
  with no pattern at all one of a query at the end of the keys.
  """
  position = row_positions(operands)
  if settings.pattern is None:
    if settings.is_causal:
      return position
    last = operands.k.shape[1] - 1
    return jnp.where(position == UNUSED, position, last)
  if settings.pattern.is_causal:
    return position
  return jnp.where(position < 0, position, position | (settings.block - 1))
