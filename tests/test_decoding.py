"""Attention over caches: equal to the definition, and reading no more."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.decoding import cache_slots, decode_attention, kv_read_fraction
from tests import s2_cases

FORWARD = 1e-5
B, H, SLOTS = 2, 8, 64

PATTERNS = {
  "everything": None,
  "strided, shared by the group": s2_cases.strided(
    4, block=8, num_kv_heads=2, stride=2, local=1
  ),
  "strided": s2_cases.strided(4, block=4),
  "sinks": s2_cases.window(4, block=4, local=2, sinks=1),
  "ranged": s2_cases.ranged(
    [0, 0, 1, 1], [0, 1, 2, 3], near=3, near_stride=2, far_stride=4
  ),
  "tables, not causal": s2_cases.random_blocks(4, causal=False, density=0.3),
}


def visible(heads, offset, T):
  """What each head sees of the cache, [T, 4, SLOTS]."""
  tokens = np.arange(SLOTS)
  seen = np.zeros((T, 4, SLOTS), bool)
  for t in range(T):
    past = tokens <= offset + t
    for n in range(4):
      seen[t, n] = past
      if heads is not None:
        size = heads.pattern.block_size
        own = heads.blocks[n][(offset + t) // size]
        seen[t, n] &= own[tokens // size]
  return seen


@functools.partial(jax.jit, static_argnames=("pattern", "implementation"))
def decode(q, k, v, offset, active, pattern, implementation):
  return decode_attention(
    q,
    k,
    v,
    q_offset=offset,
    active=active,
    pattern=pattern,
    implementation=implementation,
  )


@pytest.mark.parametrize("heads", PATTERNS.values(), ids=PATTERNS)
@hypothesis.given(
  seed=st.integers(0, 1000),
  K=st.sampled_from([1, 2, 4]),
  T=st.sampled_from([1, 3]),
  offset=st.integers(0, SLOTS - 3),
  density=st.sampled_from([0.0, 0.3, 1.0, None]),
)
@hypothesis.settings(max_examples=6)
def test_equals_the_definition_and_reads_nothing_else(
  heads, seed, K, T, offset, density
):
  rng = np.random.default_rng(seed)
  q = rng.normal(size=(B, T, 4, H))
  k, v = rng.normal(size=(2, B, K, SLOTS, H))
  active = None if density is None else rng.random((B, T, 4)) < density
  used = np.ones((B, T, 4), bool) if active is None else active
  seen = visible(heads, offset, T)
  expected = np.zeros(q.shape)
  read = np.zeros((B, K, SLOTS), bool)
  for b, t, n in zip(*np.nonzero(used), strict=True):
    mine, kv = seen[t, n], n // (4 // K)
    if not mine.any():
      continue
    logits = k[b, kv, mine] @ q[b, t, n] * H**-0.5
    weights = np.exp(logits - logits.max())
    expected[b, t, n] = weights @ v[b, kv, mine] / weights.sum()
  # Whatever no query of the KV head sees, while one is active, is not read.
  for b, t, n in np.ndindex(B, T, 4):
    kv, group = n // (4 // K), slice(n // (4 // K) * (4 // K), None)
    group = slice(group.start, group.start + 4 // K)
    if used[b, :, group].any():
      read[b, kv] |= seen[t, n]
  k, v = (np.where(read[..., None], x, np.nan) for x in (k, v))
  got = decode(
    *(jnp.asarray(x, jnp.float32) for x in (q, k, v)),
    jnp.int32(offset),
    None if active is None else jnp.asarray(active),
    heads and heads.pattern,
    "xla",
  )
  got = np.where(used[..., None], got, 0.0)
  np.testing.assert_allclose(got, expected, atol=FORWARD)


def test_the_share_of_kv_heads_that_are_read():
  active = np.zeros((2, 1, 8), bool)
  active[0, 0, [0, 1]] = True  # One group of two.
  active[1, 0, [0, 2, 4, 7]] = True  # Four groups.
  assert kv_read_fraction(jnp.asarray(active), 4) == (1 / 4 + 4 / 4) / 2
  assert kv_read_fraction(jnp.asarray(active), 8) == (2 / 8 + 4 / 8) / 2


def test_caches_hold_whole_pages():
  assert [cache_slots(n, None) for n in (1, 8, 100, 257)] == [8, 8, 104, 512]
  pattern = PATTERNS["sinks"].pattern
  assert [cache_slots(n, pattern) for n in (1, 4, 9)] == [4, 4, 12]


def test_bad_input_is_named():
  q = jnp.zeros((1, 1, 4, H))
  cache = jnp.zeros((1, 2, SLOTS, H))
  pattern = PATTERNS["sinks"].pattern
  for match, arguments in {
    "`v_cache` must have shape": (q, cache, cache[:, :1], {}),
    "divides the 4 query heads, got 3": (
      q,
      *[jnp.zeros((1, 3, SLOTS, H))] * 2,
      {},
    ),
    "`active` must have shape": (
      q,
      cache,
      cache,
      {"active": jnp.ones((1, 1, 3), bool)},
    ),
    "for 4 query heads, `q` has 2": (
      q[:, :, :2],
      cache,
      cache,
      {"pattern": pattern},
    ),
    "multiple of 4 slots": (q, *[cache[:, :, :-1]] * 2, {"pattern": pattern}),
  }.items():
    *arrays, options = arguments
    with pytest.raises(ValueError, match=match):
      decode_attention(*arrays, q_offset=0, **options)
