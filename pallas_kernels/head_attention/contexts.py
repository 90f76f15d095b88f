"""What each head may see, as static values that cost no memory.

A rule says, for one head, which blocks of keys a block of queries may see.
Rules are closed forms wherever one exists: they take no arrays, know no
sequence length, hash and compare, and so are static arguments of `jax.jit`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strided:
  """A sliding window, and every `stride`-th block of the past.

  Query block i sees key block j if j <= i and any of

    i - j < local,    j mod stride == residue,    j < sinks

  Each key block is seen by one run of query blocks that starts at its own:
  what a query no longer sees, no later query sees.

  Attributes:
    local: Blocks of the window, the query's own among them; at least 1.
    stride: Blocks from one remote block to the next; 1 makes all of the past
      visible, 0 none of it.
    residue: Which of the `stride` shards the head owns.
    sinks: Blocks at the start of the sequence that stay visible.
  """

  local: int
  stride: int = 0
  residue: int = 0
  sinks: int = 0

  def __post_init__(self) -> None:
    for name, least in (("local", 1), ("stride", 0), ("sinks", 0)):
      if getattr(self, name) < least:
        raise ValueError(
          f"`{name}` must be at least {least}, got {getattr(self, name)}."
        )
    if not 0 <= self.residue < max(self.stride, 1):
      raise ValueError(
        f"`residue` must be in [0, {max(self.stride, 1)}), got {self.residue}."
      )

  def keep(self, i: Any, j: Any) -> Any:
    """True where query block i sees key block j; arrays broadcast."""
    visible = (i - j < self.local) | (j < self.sinks)
    if self.stride:
      visible |= j % self.stride == self.residue
    return (j <= i) & visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranged:
  """One stride near the query, another one far from it.

  Query block i sees key block j if j <= i and

    i - j <  near:   j mod near_stride == near_residue
    i - j >= near:   j mod far_stride  == far_residue

  A head may not see its own block, and may see nothing at all. A block that
  the near stride drops can come back with the far one.

  Source:
    S2-Attention, https://arxiv.org/abs/2407.17678, figure of the context
    ranges.
  """

  near: int
  near_stride: int
  near_residue: int
  far_stride: int
  far_residue: int

  def __post_init__(self) -> None:
    for name, least in (("near", 0), ("near_stride", 1), ("far_stride", 1)):
      if getattr(self, name) < least:
        raise ValueError(
          f"`{name}` must be at least {least}, got {getattr(self, name)}."
        )
    for which in ("near", "far"):
      stride = getattr(self, f"{which}_stride")
      residue = getattr(self, f"{which}_residue")
      if not 0 <= residue < stride:
        raise ValueError(
          f"`{which}_residue` must be in [0, {stride}), got {residue}."
        )

  def keep(self, i: Any, j: Any) -> Any:
    """True where query block i sees key block j; arrays broadcast."""
    near = (i - j < self.near) & (j % self.near_stride == self.near_residue)
    far = (i - j >= self.near) & (j % self.far_stride == self.far_residue)
    return (j <= i) & (near | far)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """A block mask of a given size, one bit an entry.

  Attributes:
    rows, columns: Query and key blocks that the mask covers.
    bits: `numpy.packbits` of the mask, row by row.
  """

  rows: int
  columns: int
  bits: bytes = dataclasses.field(repr=False)

  def __post_init__(self) -> None:
    expected = -(-self.rows * self.columns // 8)
    if self.rows < 1 or self.columns < 1 or len(self.bits) != expected:
      raise ValueError(
        f"`bits` must hold {expected} bytes for a mask of {self.rows} x "
        f"{self.columns} blocks, got {len(self.bits)}."
      )

  @classmethod
  def from_mask(cls, mask: Any) -> "Table":
    """The rule that sees what `mask` [rows, columns] (bool) says."""
    mask = np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_:
      raise ValueError(
        "`mask` must be bool of shape [rows, columns], got "
        f"{mask.dtype} {list(mask.shape)}."
      )
    rows, columns = mask.shape
    return cls(rows=rows, columns=columns, bits=np.packbits(mask).tobytes())

  def mask(self) -> np.ndarray:
    """The mask again, bool [rows, columns]."""
    return _unpack(self.rows, self.columns, self.bits)

  def keep(self, i: Any, j: Any) -> Any:
    """True where query block i sees key block j, both inside the mask."""
    return self.mask()[i, j]


@functools.lru_cache(maxsize=64)
def _unpack(rows: int, columns: int, bits: bytes) -> np.ndarray:
  flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=rows * columns)
  return flat.reshape(rows, columns).astype(bool)


Rule = Strided | Ranged | Table


@dataclasses.dataclass(frozen=True)
class HeadContexts:
  """One rule a query head, over blocks of `block_size` tokens.

  Attributes:
    block_size: Tokens of a block, a power of two. Token t is in block
      t // block_size, counted from the first key.
    rules: What each of the N query heads sees.
    is_causal: Also hide, inside a block, the keys after the query.
  """

  block_size: int
  rules: tuple[Rule, ...]
  is_causal: bool = True

  def __post_init__(self) -> None:
    size = self.block_size
    if size < 1 or size & (size - 1):
      raise ValueError(f"`block_size` must be a power of two, got {size}.")
    if not self.rules:
      raise ValueError("`rules` must hold one rule a query head, got none.")

  @property
  def num_heads(self) -> int:
    """Query heads, N."""
    return len(self.rules)

  @property
  def distinct_rules(self) -> tuple[Rule, ...]:
    """Every rule once, in the order of the heads."""
    return tuple(dict.fromkeys(self.rules))

  def with_causality(self, is_causal: bool) -> "HeadContexts":
    """This, causal also if the caller says so."""
    if is_causal and not self.is_causal:
      return dataclasses.replace(self, is_causal=True)
    return self

  def reordered(self, order: Sequence[int] | None) -> Self:
    """This, with the rule of head `order[n]` at place n."""
    if order is None:
      return self
    rules = tuple(self.rules[head] for head in order)
    return dataclasses.replace(self, rules=rules)

  @property
  def query_reach(self) -> int | None:
    """Query tokens that all rules cover; None if there is no end."""
    blocks = [rule.rows for rule in self.rules if isinstance(rule, Table)]
    return min(blocks) * self.block_size if blocks else None

  def check_lengths(self, q_end: int, kv_length: int) -> None:
    """Raises if a rule does not reach that far.

    Args:
      q_end: Position after the last query.
      kv_length: Keys.
    Raises:
      ValueError: A table covers fewer blocks.
    """
    for head, rule in enumerate(self.rules):
      if not isinstance(rule, Table):
        continue
      for name, length, blocks in (
        ("query", q_end, rule.rows),
        ("key", kv_length, rule.columns),
      ):
        if length > blocks * self.block_size:
          raise ValueError(
            f"`pattern` covers {blocks * self.block_size} {name} tokens in "
            f"head {head}, got {length}. Make it from a larger mask."
          )

  def block_mask(
    self, rule: Rule, q_blocks: range, kv_blocks: range
  ) -> np.ndarray:
    """What `rule` keeps, bool [query blocks, key blocks]."""
    i = np.arange(q_blocks.start, q_blocks.stop)[:, None]
    j = np.arange(kv_blocks.start, kv_blocks.stop)[None]
    return np.broadcast_to(rule.keep(i, j), (len(q_blocks), len(kv_blocks)))
