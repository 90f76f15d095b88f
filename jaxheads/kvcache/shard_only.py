"""What a pattern's later queries can still see, and nothing else."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxheads.kvcache.budgets import check_prompt
from jaxheads.kvcache.policy import CacheShape, LayerWindow, Plan, Policy
from jaxheads.kvcache.window import prompt_tokens
from jaxheads.s2 import Pattern
from pallas_kernels.head_attention import Rule, Strided
from pallas_kernels.head_attention.reference import visible_blocks

_DENSE = Strided(local=1, stride=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardOnly(Policy):
  """The cache of a model with S2 patterns: nothing that it sees is lost.

  The patterns decide, whatever the budget. As decoding goes on, blocks that
  leave a head's sight give their page back; a page is a block.

  Attributes:
    patterns: One a layer, with the same blocks; `None` is dense. See
      `jaxheads.models.ModelConfig.contexts`.

  Raises:
    ValueError: Blocks differ in size, query heads that share a KV head differ
      in what they see, or blocks could come back into sight.

  Source:
    S2-Attention, https://arxiv.org/abs/2407.17678.
  """

  patterns: tuple[Pattern | None, ...] = ()

  def __post_init__(self) -> None:
    if len({pattern.block_size for pattern in self.patterns if pattern}) != 1:
      raise ValueError(
        "`patterns` must hold one pattern a layer (`None` is dense), with "
        f"blocks of one size, got {self.patterns}."
      )
    for layer, pattern in enumerate(self.patterns):
      if pattern is None:
        continue
      if not all(isinstance(rule, Strided) for rule in pattern.rules):
        raise ValueError(
          f"`patterns[{layer}]` must have strided rules (shards, windows, "
          "sinks): what others hide can come back into sight."
        )
      kv_heads = pattern.num_kv_heads or pattern.num_heads
      groups = pattern.num_heads // kv_heads
      if pattern.rules != tuple(
        rule for rule in pattern.rules[::groups] for _ in range(groups)
      ):
        raise ValueError(
          f"`patterns[{layer}]` must let the query heads of a KV head see the "
          "same: their cache is one."
        )

  @property
  def block_size(self) -> int:
    """Tokens of a block, and of a page."""
    return next(pattern.block_size for pattern in self.patterns if pattern)

  @property
  def knows_heads(self) -> bool:
    return True

  def plan(self, length: int, budget: float, shape: CacheShape) -> Plan:
    check_prompt(length, budget)
    size = self.block_size
    row = (length - 1) // size
    tokens = np.minimum(size, length - np.arange(row + 1) * size)
    lengths = np.asarray(
      [
        [tokens @ rule.keep(row, np.arange(row + 1)) for rule in rules]
        for rules in self._rules(shape)
      ],
      np.int32,
    )
    heads = np.argsort(-lengths, axis=-1, kind="stable").astype(np.int32)
    distinct = list(dict.fromkeys(self.patterns))
    return Plan(
      np.take_along_axis(lengths, heads, axis=-1),
      np.zeros(shape, np.int32),
      {
        "pattern": np.asarray(
          [distinct.index(pattern) for pattern in self.patterns], np.int32
        )
      },
      heads,
    )

  def keep(
    self, window: LayerWindow, layer: dict[str, Any]
  ) -> Bool[Array, "K S"]:
    tokens, heads, _ = window.k.shape
    blocks = -(-tokens // self.block_size)
    row = (window.length - 1) // self.block_size
    seen = []
    for pattern in dict.fromkeys(self.patterns):
      if pattern is None:
        seen.append(jnp.ones((heads, blocks), bool))
        continue
      by_head = visible_blocks(pattern, row[None], blocks)[:, 0]
      seen.append(by_head[:: pattern.num_heads // heads])
    kept = jnp.repeat(
      jnp.stack(seen)[layer["pattern"]], self.block_size, axis=-1
    )
    return kept[:, :tokens] & prompt_tokens(window)[None]

  def drops(
    self, position: int, page_size: int, shape: CacheShape
  ) -> Int[np.ndarray, "R K"]:
    if page_size != self.block_size:
      raise ValueError(
        f"`page_size` must be the pattern's block size ({self.block_size}), "
        f"got {page_size}."
      )
    row = position // page_size
    return np.asarray(
      [[_dropped(rule, row) for rule in rules] for rules in self._rules(shape)],
      np.int32,
    )

  def _rules(self, shape: CacheShape) -> list[list[Rule]]:
    """The rule of each KV head of each layer."""
    layers, heads = shape
    for pattern in self.patterns:
      kv_heads = pattern and (pattern.num_kv_heads or pattern.num_heads)
      if len(self.patterns) != layers or kv_heads not in (None, heads):
        raise ValueError(
          f"`patterns` are for {len(self.patterns)} layers of {kv_heads} KV "
          f"heads, got {shape}."
        )
    return [
      list(pattern.rules[:: pattern.num_heads // heads])
      if pattern
      else [_DENSE] * heads
      for pattern in self.patterns
    ]


@functools.lru_cache(maxsize=4096)
def _dropped(rule: Rule, row: int) -> int:
  """Which of the blocks that row - 1 sees is hidden from row on; -1 if none."""
  before = rule.keep(row - 1, np.arange(row))
  gone = before & ~rule.keep(row, np.arange(row))
  return int(before[: gone.argmax()].sum()) if gone.any() else -1
