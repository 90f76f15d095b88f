"""A pattern: what every head sees, and what can be asked of it."""

import base64
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from jaxheads.s2 import _plot
from pallas_kernels.head_attention import (
  HeadContexts,
  Ranged,
  Rule,
  Strided,
  Table,
)

if TYPE_CHECKING:
  from matplotlib.figure import Figure

_KINDS: dict[str, type[Strided] | type[Ranged]] = {
  "strided": Strided,
  "ranged": Ranged,
}
# Rows of the block mask that are looked at together.
_CHUNK = 256


@dataclasses.dataclass(frozen=True)
class Pattern(HeadContexts):
  """What each query head sees; a static, hashable value without arrays.

  Made by `strided`, `sliding_window` and the other constructors of
  `jaxheads.s2`. Pass it to `jaxheads.attention` or to `jaxheads.nn`.

  Attributes:
    block_size: Tokens of a block.
    rules: One a query head.
    is_causal: Queries see no later key.
    num_kv_heads: KV heads K that the cache has, each serving N / K
      consecutive query heads; `None` means one a query head.
  """

  num_kv_heads: int | None = None

  def __post_init__(self) -> None:
    super().__post_init__()
    kv_heads = self.num_kv_heads
    if kv_heads is not None and (kv_heads < 1 or self.num_heads % kv_heads):
      raise ValueError(
        f"`num_kv_heads` must divide `num_heads` ({self.num_heads}), got "
        f"{kv_heads}."
      )

  def block_masks(self, length: int) -> Bool[np.ndarray, "N blocks blocks"]:
    """What each head sees of `length` tokens, block by block."""
    blocks = range(self._blocks(length))
    of_rule = {
      rule: self.block_mask(rule, blocks, blocks)
      for rule in self.distinct_rules
    }
    return np.stack([of_rule[rule] for rule in self.rules])

  def to_dense(self, length: int) -> Bool[np.ndarray, "N T T"]:
    """What each head sees of `length` tokens; for small lengths.

    Args:
      length: Tokens T.
    Returns:
      True where the query (second axis) sees the key (third axis).
    """
    b = self.block_size
    mask = self.block_masks(length).repeat(b, axis=1).repeat(b, axis=2)
    mask = mask[:, :length, :length]
    return np.tril(mask) if self.is_causal else mask

  def union_complete(self, length: int | None = None) -> bool:
    """Whether the heads together see all that one dense head would.

    Args:
      length: Tokens; `None` asks for every length (block masks: theirs).
    """
    rows = (
      self._blocks(length) if length is not None else self._telling_blocks()
    )
    for chunk in _chunks(rows):
      columns = range(chunk.stop if self.is_causal else rows)
      union = np.zeros((len(chunk), len(columns)), bool)
      for rule in self.distinct_rules:
        union |= self.block_mask(rule, chunk, columns)
      if self.is_causal:
        i = np.arange(chunk.start, chunk.stop)[:, None]
        union |= np.arange(len(columns))[None] > i
      if not union.all():
        return False
    return True

  def kv_efficient(self) -> bool:
    """Whether a key that a head stops seeing is never needed again.

    True if every block below the diagonal that is kept at row i is also kept
    at row i - 1. A cache that frees what is no longer seen needs it.
    """
    return self._first_return() is None

  def cache_blocks(self, i: int) -> tuple[int, ...]:
    """Blocks that each KV head must hold while block row i is computed.

    A KV head holds what any of its query heads sees.

    Args:
      i: Query block, from 0.
    Raises:
      ValueError: The pattern does not reach row i, or is not KV-efficient:
        nothing could be freed. The message names the head, row and column.
    """
    if i < 0:
      raise ValueError(f"`i` must be at least 0, got {i}.")
    self.check_lengths((i + 1) * self.block_size, (i + 1) * self.block_size)
    returned = self._first_return()
    if returned is not None:
      head, row, column = returned
      raise ValueError(
        f"The pattern is not KV-efficient: head {head} sees block {column} at "
        f"row {row} but not at row {row - 1}. A cache that frees blocks needs "
        "a pattern whose `kv_efficient()` is True."
      )
    kv_heads = self.num_kv_heads or self.num_heads
    groups = self.num_heads // kv_heads
    held = []
    for kv_head in range(kv_heads):
      rules = dict.fromkeys(
        self.rules[kv_head * groups : (kv_head + 1) * groups]
      )
      seen = np.zeros((1, i + 1), bool)
      for rule in rules:
        seen |= self.block_mask(rule, range(i, i + 1), range(i + 1))
      held.append(int(seen.sum()))
    return tuple(held)

  def visible_pairs(self, length: int) -> int:
    """(query, key) pairs that the heads see in `length` tokens, summed."""
    sizes = np.minimum(
      self.block_size,
      length - np.arange(self._blocks(length)) * self.block_size,
    )
    total = 0
    for rule in self.distinct_rules:
      pairs = 0
      for chunk in _chunks(len(sizes)):
        columns = range(chunk.stop if self.is_causal else len(sizes))
        mask = self.block_mask(rule, chunk, columns)
        rows = sizes[chunk.start : chunk.stop]
        pairs += int(rows @ (mask @ sizes[: len(columns)]))
        if self.is_causal:
          own = mask[np.arange(len(chunk)), np.arange(*_bounds(chunk))]
          pairs -= int((own * rows * (rows - 1) // 2).sum())
      total += pairs * self.rules.count(rule)
    return total

  def density(self, length: int) -> float:
    """Visible pairs as a fraction of what dense heads would see.

    Args:
      length: Tokens.
    """
    one_head = length * (length + 1) // 2 if self.is_causal else length**2
    return self.visible_pairs(length) / (self.num_heads * one_head)

  def plot(self, length: int) -> "Figure":
    """A figure with a panel for each different head, and their union.

    Args:
      length: Tokens; up to a few hundred blocks stay readable.
    Returns:
      A matplotlib figure; `.savefig(path)` writes it.
    """
    return _plot.plot(self, length)

  def to_dict(self) -> dict[str, Any]:
    """A dict of JSON types; `from_dict` is its inverse."""
    distinct = self.distinct_rules
    return {
      "block_size": self.block_size,
      "is_causal": self.is_causal,
      "num_kv_heads": self.num_kv_heads,
      "rules": [_rule_to_dict(rule) for rule in distinct],
      "rule_of_head": [distinct.index(rule) for rule in self.rules],
    }

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "Pattern":
    """The pattern whose `to_dict` gave `fields`.

    Raises:
      ValueError: A field is missing or does not fit.
    """
    try:
      rules = [_rule_from_dict(rule) for rule in fields["rules"]]
      return cls(
        fields["block_size"],
        tuple(rules[index] for index in fields["rule_of_head"]),
        fields["is_causal"],
        fields["num_kv_heads"],
      )
    except (KeyError, TypeError, IndexError) as error:
      raise ValueError(f"This is no pattern: {error!r}.") from error

  def _blocks(self, length: int) -> int:
    if length < 1:
      raise ValueError(f"`length` must be at least 1, got {length}.")
    self.check_lengths(length, length)
    return -(-length // self.block_size)

  def _telling_blocks(self) -> int:
    """So many blocks, and the pattern repeats or ends."""
    near, sinks, period, covered = 1, 0, 1, None
    for rule in self.distinct_rules:
      if isinstance(rule, Strided):
        near, sinks = max(near, rule.local), max(sinks, rule.sinks)
        period = math.lcm(period, max(rule.stride, 1))
      elif isinstance(rule, Ranged):
        near = max(near, rule.near)
        period = math.lcm(period, rule.near_stride, rule.far_stride)
      else:
        covered = min(covered or rule.rows, rule.rows, rule.columns)
    # The last row sees, between its window and the sinks, a whole period.
    return sinks + near + 2 * period if covered is None else covered

  def _first_return(self) -> tuple[int, int, int] | None:
    """(head, row, column) of a block that comes back into sight, if any."""
    for rule in self.distinct_rules:
      if isinstance(rule, Strided):
        continue  # By construction.
      alone = Pattern(self.block_size, (rule,), self.is_causal)
      rows = alone._telling_blocks()
      for chunk in _chunks(rows - 1):
        both = range(chunk.start, chunk.stop + 1)
        mask = self.block_mask(rule, both, range(chunk.stop + 1))
        i = np.arange(chunk.start + 1, chunk.stop + 1)[:, None]
        below = np.arange(chunk.stop + 1)[None] < i
        found = np.argwhere(mask[1:] & ~mask[:-1] & below)
        if found.size:
          row, column = found[0]
          return (
            self.rules.index(rule),
            int(row) + chunk.start + 1,
            int(column),
          )
    return None


def _chunks(rows: int) -> Iterator[range]:
  for start in range(0, rows, _CHUNK):
    yield range(start, min(start + _CHUNK, rows))


def _bounds(chunk: range) -> tuple[int, int]:
  return chunk.start, chunk.stop


def _rule_to_dict(rule: Rule) -> dict[str, Any]:
  if isinstance(rule, Table):
    return {
      "kind": "table",
      "rows": rule.rows,
      "columns": rule.columns,
      "bits": base64.b64encode(rule.bits).decode(),
    }
  kind = "strided" if isinstance(rule, Strided) else "ranged"
  return {"kind": kind, **dataclasses.asdict(rule)}


def _rule_from_dict(fields: Mapping[str, Any]) -> Rule:
  fields = dict(fields)
  kind = fields.pop("kind")
  if kind == "table":
    return Table(**{**fields, "bits": base64.b64decode(fields["bits"])})
  return _KINDS[kind](**fields)
