"""Attention of the newest tokens over a cache of keys and values."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.sharding import per_device, spec
from pallas_kernels.head_attention import HeadContexts, Strided
from pallas_kernels.head_attention.contexts import Rule
from pallas_kernels.head_attention.reference import visible_blocks
from pallas_kernels.paged_attention import PageTable, paged_attention
from pallas_kernels.shapes import check_shape

# Tokens of a page of a cache that no pattern cuts into blocks.
PAGE_SIZE = 256


class _Tokens(NamedTuple):
  """Arrays with a batch axis."""

  q: Float[Array, "B T N H"]
  k: Float[Array, "B K S H"]
  v: Float[Array, "B K S H"]
  active: Bool[Array, "B T N"] | None


_SPECS = _Tokens(
  spec("batch", None, "heads", None),
  spec("batch", "kv_heads", None, None),
  spec("batch", "kv_heads", None, None),
  spec("batch", None, "heads"),
)


def decode_attention(
  q: Float[Array, "B T N H"],
  k_cache: Float[Array, "B K S H"],
  v_cache: Float[Array, "B K S H"],
  *,
  q_offset: Int[Array, ""] | int,
  active: Bool[Array, "B T N"] | None = None,
  pattern: HeadContexts | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "B T N H"]:
  """Causal attention of a few new tokens that are in the cache already.

  What no active head sees is not read: a KV head none of whose query heads
  any new token chose, the slots after the last token, and blocks that the
  pattern hides. Grouped query heads share their KV head's keys, so routing
  saves reads only where it leaves a whole group out; see `kv_read_fraction`.
  Not differentiable.

  Args:
    q: Queries (after RoPE) of the T newest tokens.
    k_cache, v_cache: Keys (after RoPE) and values; slot s is token s. Slots of
      later tokens may hold anything.
    q_offset: Tokens before the new ones; the cache holds `q_offset` + T.
    active: Heads that each token uses; `None` is all. Inactive pairs give
      what the read keys happen to give: multiply them by a gate of 0.
    pattern: What each head sees, see `jaxheads.s2`; static. Each new token
      then reads on its own; without one, they read what any of them sees.
    scale: Multiplies the logits; `None` means H ** -0.5.
    implementation: See `pallas_kernels.paged_attention`.

  Returns:
    Output of each head in q's dtype. Heads of a KV head that is not read
    give 0.

  Raises:
    ValueError: Shapes disagree, or the pattern is for other heads.
  """
  sizes: dict[str, int] = {}
  check_shape("q", q, "B T N H", sizes)
  check_shape("k_cache", k_cache, "B K S H", sizes)
  check_shape("v_cache", v_cache, "B K S H", sizes)
  check_shape("active", active, "B T N", sizes)
  heads, kv_heads = sizes["N"], sizes["K"]
  if heads % kv_heads:
    raise ValueError(
      f"`k_cache` must have a number of heads that divides the {heads} query "
      f"heads, got {kv_heads}."
    )
  if pattern is not None:
    if pattern.num_heads != heads:
      raise ValueError(
        f"`pattern` is for {pattern.num_heads} query heads, `q` has {heads}."
      )
    if sizes["S"] % pattern.block_size:
      raise ValueError(
        f"`k_cache` must have a multiple of {pattern.block_size} slots, the "
        f"pattern's blocks, got {sizes['S']}."
      )
    pattern.check_lengths(sizes["S"], sizes["S"])
    pattern = pattern.with_causality(True)
  run = functools.partial(
    _attend, pattern=pattern, scale=scale, implementation=implementation
  )
  return per_device(
    lambda operands: run(*operands),
    (
      _Tokens(q, k_cache, v_cache, active),
      jnp.asarray(q_offset, jnp.int32),
    ),
    (_SPECS, spec()),
    _SPECS.q,
    batch_size=q.shape[0],
    # Heads with contexts are not told apart by device here.
    num_kv_heads=1 if pattern else kv_heads,
  )


def cache_slots(max_length: int, pattern: HeadContexts | None) -> int:
  """Slots of a cache for so many tokens: whole pages."""
  page = PAGE_SIZE if max_length > PAGE_SIZE else 8
  page = page if pattern is None else pattern.block_size
  return -(-max_length // page) * page


def kv_read_fraction(
  active: Bool[Array, "B T N"], num_kv_heads: int
) -> Float[Array, ""]:
  """Share of the KV heads that a step of these tokens reads.

  Args:
    active: Heads that each of the T new tokens uses.
    num_kv_heads: K, which divides N.
  """
  return _used(active, num_kv_heads).any(axis=1).mean(dtype=jnp.float32)


def _used(active: Bool[Array, "B T N"], units: int) -> Bool[Array, "B T units"]:
  """Whether any of the query heads of a unit is active."""
  return active.reshape(*active.shape[:2], units, -1).any(axis=-1)


def _attend(
  tokens: _Tokens,
  q_offset: Int[Array, ""],
  *,
  pattern: HeadContexts | None,
  scale: float | None,
  implementation: str | None,
) -> Float[Array, "B T N H"]:
  attend = functools.partial(
    paged_attention, scale=scale, implementation=implementation
  )
  if pattern is None:
    return _attend_all(attend, tokens, q_offset)
  return _attend_seen(attend, tokens, q_offset, pattern)


def _attend_all(
  attend: Callable[..., Array], tokens: _Tokens, q_offset: Int[Array, ""]
) -> Float[Array, "B T N H"]:
  """A row for every KV head; new tokens see themselves and what was before."""
  q, k, v, active = tokens
  batch, length, heads, size = q.shape
  _, kv_heads, slots, _ = k.shape
  page = math.gcd(slots, PAGE_SIZE)
  groups = heads // kv_heads
  q = q.reshape(batch, length, kv_heads, groups, size).swapaxes(1, 2)
  lengths = jnp.broadcast_to(q_offset + length, (batch, kv_heads))
  if active is not None:
    lengths = jnp.where(_used(active, kv_heads).any(axis=1), lengths, 0)
  seen = jnp.repeat(q_offset + 1 + jnp.arange(length), groups)
  rows = batch * kv_heads
  out = attend(
    q.reshape(rows, length * groups, size),
    _pages(k, page),
    _pages(v, page),
    PageTable.contiguous(lengths.reshape(-1), pages_per_row=slots // page),
    seen=jnp.broadcast_to(seen, (rows, length * groups)),
  )
  out = out.reshape(batch, kv_heads, length, groups, size)
  return out.swapaxes(1, 2).reshape(batch, length, heads, size)


def _attend_seen(
  attend: Callable[..., Array],
  tokens: _Tokens,
  q_offset: Int[Array, ""],
  pattern: HeadContexts,
) -> Float[Array, "B T N H"]:
  """A row for every token and every KV head, or head if contexts differ."""
  q, k, v, active = tokens
  batch, length, heads, size = q.shape
  _, kv_heads, slots, _ = k.shape
  block = pattern.block_size
  groups = heads // kv_heads
  units = kv_heads if _is_shared(pattern, groups) else heads
  blocks = slots // block
  position = q_offset + jnp.arange(length)
  own = position // block
  seen = visible_blocks(pattern, own, blocks)[:: heads // units]
  seen &= jnp.arange(blocks) <= own[:, None]
  seen = seen.swapaxes(0, 1)  # [T, units, blocks]
  # Blocks fill a row in order; past the most that any head sees, nothing.
  most = max(_most_blocks(rule, blocks) for rule in pattern.rules)
  at = jnp.where(seen, jnp.cumsum(seen, axis=-1) - 1, most)
  listed = jnp.zeros((length, units, most), jnp.int32)
  token, unit = jnp.indices((length, units))
  listed = listed.at[token[..., None], unit[..., None], at].set(
    jnp.arange(blocks, dtype=jnp.int32), mode="drop"
  )
  # Of the own block, the part that is there.
  hidden = block - 1 - position % block
  sees_own = jnp.take_along_axis(seen, own[:, None, None], axis=-1)[..., 0]
  lengths = seen.sum(-1) * block - jnp.where(sees_own, hidden[:, None], 0)
  lengths = jnp.broadcast_to(lengths, (batch, length, units))
  if active is not None:
    lengths = jnp.where(_used(active, units), lengths, 0)
  kv_row = jnp.arange(batch)[:, None] * kv_heads + jnp.arange(units) // (
    units // kv_heads
  )
  pages = kv_row[:, None, :, None] * blocks + listed
  rows = batch * length * units
  out = attend(
    q.reshape(rows, heads // units, size),
    _pages(k, block),
    _pages(v, block),
    PageTable(
      pages.reshape(-1),
      jnp.arange(rows, dtype=jnp.int32) * most,
      lengths.reshape(-1),
    ),
  )
  return out.reshape(q.shape)


def _pages(
  x: Float[Array, "B K S H"], page_size: int
) -> Float[Array, "P page H"]:
  return x.reshape(-1, page_size, x.shape[-1])


def _is_shared(pattern: HeadContexts, groups: int) -> bool:
  """Whether the query heads of a KV head all see the same."""
  rules = pattern.rules
  return all(
    rule == rules[head - head % groups] for head, rule in enumerate(rules)
  )


def _most_blocks(rule: Rule, blocks: int) -> int:
  """Blocks that a query sees at most."""
  if not isinstance(rule, Strided):
    return blocks
  strided = -(-blocks // rule.stride) if rule.stride else 0
  return min(blocks, rule.local + strided + rule.sinks)
