"""Ready patterns."""

import warnings
from typing import Any

import numpy as np

from jaxheads.s2._pattern import Pattern
from pallas_kernels.head_attention import Ranged, Rule, Strided, Table


def strided(
  num_heads: int,
  *,
  block_size: int = 64,
  local_blocks: int,
  vertical_stride: int,
  num_kv_heads: int | None = None,
  offset: int = 0,
  step: int | None = None,
  sign: int = -1,
  dense_heads: int = 0,
  per_query_head: bool = False,
  require_union: bool = True,
) -> Pattern:
  """A sliding window, and for each head its own share of the past.

  Query block i of pattern head g sees key block j <= i if

    i - j < local_blocks,  or  j mod V == sign (g step + offset) mod V

  with V = `vertical_stride`. V = 1 is dense.

  Args:
    num_heads: Query heads N.
    block_size: Tokens of a block, a power of two.
    local_blocks: Blocks of the window, the query's own among them.
    vertical_stride: Blocks from one remote block to the next, V.
    num_kv_heads: KV heads K. The N / K query heads of a KV head then share
      one pattern head, so that the cache keeps one share and not their union.
    offset: Moves every head's share. 0 in the official code; 1 in Phi-3-small.
    step: From one pattern head's residue to the next's; `None` means
      max(1, V // N), 0 gives all heads the same share.
    sign: -1 as in the official code, or 1 as in the paper's figure.
    dense_heads: So many pattern heads, the last ones, see everything.
    per_query_head: Each query head is a pattern head, whatever
      `num_kv_heads` is.
    require_union: Refuse a pattern whose heads leave a part of the past
      unseen; with False that is a warning.

  Raises:
    ValueError: A number out of range, or heads that do not see everything
      together; the message says what would.

  Example:
    >>> pattern = strided(8, block_size=64, local_blocks=8, vertical_stride=8)
    >>> pattern.union_complete(), pattern.cache_blocks(127)
    (True, (23, 23, 23, 23, 23, 23, 23, 23))

  Source:
    S2-Attention, https://arxiv.org/abs/2407.17678; names and defaults of
    LocalStrideSparseAttention in its code, linxihui/dkernel.
  """
  for name, value, least in (
    ("num_heads", num_heads, 1),
    ("local_blocks", local_blocks, 1),
    ("vertical_stride", vertical_stride, 1),
    ("dense_heads", dense_heads, 0),
  ):
    if value < least:
      raise ValueError(f"`{name}` must be at least {least}, got {value}.")
  if sign not in (-1, 1):
    raise ValueError(f"`sign` must be -1 or 1, got {sign}.")
  if num_kv_heads is not None and (
    num_kv_heads < 1 or num_heads % num_kv_heads
  ):
    raise ValueError(
      f"`num_kv_heads` must divide `num_heads` ({num_heads}), got "
      f"{num_kv_heads}."
    )
  shared = num_kv_heads is not None and not per_query_head
  pattern_heads = num_kv_heads if shared and num_kv_heads else num_heads
  if dense_heads > pattern_heads:
    raise ValueError(
      f"`dense_heads` must be at most {pattern_heads}, the number of pattern "
      f"heads, got {dense_heads}."
    )
  if step is None:
    step = max(1, vertical_stride // num_heads)
  rules: list[Rule] = []
  for head in range(pattern_heads):
    if head >= pattern_heads - dense_heads or vertical_stride == 1:
      rule = Strided(local=1, stride=1)
    else:
      residue = sign * (head * step + offset) % vertical_stride
      rule = Strided(
        local=local_blocks, stride=vertical_stride, residue=residue
      )
    rules += [rule] * (num_heads // pattern_heads)
  pattern = Pattern(
    block_size, tuple(rules), is_causal=True, num_kv_heads=num_kv_heads
  )
  if not pattern.union_complete():
    owned = len(set(pattern.rules))
    message = (
      f"The heads see only {owned} of the {vertical_stride} shares of the "
      "past together: `vertical_stride` must be at most the number of "
      f"different pattern heads ({owned} here), or `dense_heads` at least 1"
    )
    if shared and num_heads >= vertical_stride > 1 and step:
      message += ", or `per_query_head` True"
    if require_union:
      raise ValueError(f"{message}. `require_union=False` accepts it as it is.")
    warnings.warn(f"{message}.", stacklevel=2)
  return pattern


def phi3_small(num_heads: int = 32, num_kv_heads: int = 8) -> Pattern:
  """The sparse layers of Phi-3-small: 64-token blocks, 16 local, stride 8.

  The share slides with the query head, so a KV head must keep the union of
  its query heads' shares. In the model every second layer is dense:
  layer l, from 0, if (l + 1) mod 2 == 0.

  Args:
    num_heads, num_kv_heads: Query and KV heads; the model's by default.

  Source:
    The published configuration of Phi-3-small (blocksparse_* entries).
  """
  return strided(
    num_heads,
    block_size=64,
    local_blocks=16,
    vertical_stride=8,
    num_kv_heads=num_kv_heads,
    offset=1,
    per_query_head=True,
  )


def sliding_window(
  num_heads: int,
  *,
  block_size: int = 64,
  local_blocks: int,
  sink_blocks: int = 0,
  num_kv_heads: int | None = None,
) -> Pattern:
  """A window of blocks in every head, and the first blocks of the sequence.

  Args:
    num_heads: Query heads N.
    block_size: Tokens of a block, a power of two.
    local_blocks: Blocks of the window, the query's own among them.
    sink_blocks: Blocks at the start that stay visible (StreamingLLM,
      https://arxiv.org/abs/2309.17453).
    num_kv_heads: KV heads K; `None` means N.
  """
  rule = Strided(local=local_blocks, sinks=sink_blocks)
  return Pattern(block_size, (rule,) * num_heads, True, num_kv_heads)


def dense(
  num_heads: int,
  *,
  block_size: int = 128,
  num_kv_heads: int | None = None,
) -> Pattern:
  """Plain causal attention as a pattern: every head sees all of the past.

  Args:
    num_heads: Query heads N.
    block_size: Has no effect on the result.
    num_kv_heads: KV heads K; `None` means N.
  """
  rule = Strided(local=1, stride=1)
  return Pattern(block_size, (rule,) * num_heads, True, num_kv_heads)


def context_range(
  num_heads: int,
  *,
  block_size: int = 64,
  near_blocks: int,
  near_stride: int,
  far_stride: int,
  offset: int = 0,
  num_kv_heads: int | None = None,
) -> Pattern:
  """One stride for the last blocks, another one for what lies before.

  Query block i of pattern head g sees key block j <= i if j mod v equals g
  mod v (moved by `offset`), where v is `near_stride` for the last
  `near_blocks` blocks and `far_stride` for older ones. With `near_stride` 1
  this is `strided`; with more, a head may miss its own block, rows can be
  empty (they give 0) and the pattern is KV-efficient only if the far shares
  lie within the near ones.

  Args:
    num_heads: Query heads N.
    block_size: Tokens of a block, a power of two.
    near_blocks: Length n1 of the near range, the query's own block included.
    near_stride, far_stride: The strides v1 and v2.
    offset: Moves every head's share.
    num_kv_heads: KV heads K, each with one pattern head; `None` means N.

  Source:
    S2-Attention, https://arxiv.org/abs/2407.17678, figure of the context
    ranges.
  """
  for name, value, least in (
    ("num_heads", num_heads, 1),
    ("near_stride", near_stride, 1),
    ("far_stride", far_stride, 1),
  ):
    if value < least:
      raise ValueError(f"`{name}` must be at least {least}, got {value}.")
  pattern_heads = num_heads if num_kv_heads is None else num_kv_heads
  if pattern_heads < 1 or num_heads % pattern_heads:
    raise ValueError(
      f"`num_kv_heads` must divide `num_heads` ({num_heads}), got "
      f"{num_kv_heads}."
    )
  rules = [
    Ranged(
      near=near_blocks,
      near_stride=near_stride,
      near_residue=(head + offset) % near_stride,
      far_stride=far_stride,
      far_residue=(head + offset) % far_stride,
    )
    for head in range(pattern_heads)
    for _ in range(num_heads // pattern_heads)
  ]
  return Pattern(block_size, tuple(rules), True, num_kv_heads)


def from_block_mask(
  mask: Any,
  *,
  block_size: int,
  num_heads: int | None = None,
  is_causal: bool = True,
) -> Pattern:
  """Any block mask of your own.

  Args:
    mask: bool [query blocks, key blocks] for all heads, or one a head
      [N, query blocks, key blocks], or one a KV head [K, ...] with
      `num_heads` given. With `is_causal`, blocks after the query's own are
      ignored, and keys after the query inside its own block are hidden.
    block_size: Tokens of a block, a power of two.
    num_heads: Query heads N; `None` means as many as `mask` has.
    is_causal: Queries see no later key.

  Raises:
    ValueError: `mask` is not bool, has no head axis and `num_heads` is not
      given, or has a number of heads that does not divide `num_heads`.
  """
  mask = np.asarray(mask)
  if mask.dtype != np.bool_ or mask.ndim not in (2, 3) or 0 in mask.shape:
    raise ValueError(
      "`mask` must be bool of shape [query blocks, key blocks] or "
      f"[heads, query blocks, key blocks], got {mask.dtype} "
      f"{list(mask.shape)}."
    )
  if mask.ndim == 2:
    if num_heads is None:
      raise ValueError("`num_heads` must be given for a `mask` of two axes.")
    mask = mask[None]
  num_heads = mask.shape[0] if num_heads is None else num_heads
  if num_heads < 1 or num_heads % mask.shape[0]:
    raise ValueError(
      f"`mask` has {mask.shape[0]} heads, which must divide `num_heads` "
      f"({num_heads})."
    )
  if is_causal:
    mask = np.tril(mask)
  tables = [Table.from_mask(head) for head in mask]
  repeats = num_heads // len(tables)
  rules = tuple(table for table in tables for _ in range(repeats))
  kv_heads = len(tables) if len(tables) > 1 else None
  return Pattern(block_size, rules, is_causal, kv_heads)
