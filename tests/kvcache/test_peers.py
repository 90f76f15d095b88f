"""The peers of Task-KV, each against its paper's rule in NumPy."""

import math

import jax
import numpy as np
import pytest

from jaxheads import s2
from jaxheads.kvcache import (
  CacheShape,
  Chance,
  ExpectedAttention,
  KeyNorm,
  Ranked,
  ShardOnly,
  StaticHeads,
  Streaming,
  WindowAttention,
  keep_best,
  reread_scores,
)
from tests.kvcache import oracle
from tests.kvcache.prompts import draw, keep, window

R, K, TOKENS = 3, 4, 40
SHAPE = CacheShape(R, K)
SCORER = WindowAttention(window=4, kernel=3)


def kept(policy, arrays, budget, r=0, size=48):
  tokens = len(arrays[1])
  plan = policy.plan(tokens, budget, SHAPE)
  return keep(policy, plan, window(*arrays, size=size, layer=r), r)[:, :tokens]


def window_scores(arrays, s1, s2):
  q, k, _, _ = arrays
  C = oracle.by_group(oracle.window_attention(q, k, 4), K)
  return np.stack([oracle.middle_scores(c, s1, s2, 3) for c in C])


def test_streaming_keeps_both_ends():
  for budget, ends in ((0.5, (4, 16)), (0.1, (3, 1)), (0.05, (1, 1))):
    expected = np.zeros((K, TOKENS), bool)
    expected[:, : ends[0]] = expected[:, TOKENS - ends[1] :] = True
    got = kept(Streaming(), draw(0, TOKENS), budget)
    np.testing.assert_array_equal(got, expected)
    rings = Streaming().plan(TOKENS, budget, SHAPE).rings
    assert (rings == ends[1]).all()


def test_snapkv_keeps_its_window_and_what_it_looks_at():
  for seed, budget in enumerate((0.1, 0.3, 0.7)):
    arrays = draw(seed, TOKENS)
    count = math.floor(budget * TOKENS)
    expected = [
      oracle.kept(scores, 0, count - 4, 4)
      for scores in window_scores(arrays, 0, 4)
    ]
    got = kept(Ranked(scorer=SCORER), arrays, budget)
    np.testing.assert_array_equal(got, expected)


def test_snapkv_with_less_than_its_window_keeps_the_newest():
  got = kept(Ranked(scorer=SCORER), draw(0, TOKENS), 0.05)
  np.testing.assert_array_equal(np.argwhere(got)[:, 1], [38, 39] * K)


def test_the_pyramid_falls_by_a_line():
  # 400 tokens a layer and head, 32 of them recent: the middles fall from
  # 2 x 368 - 18.4 to 368 / 20.
  shape = CacheShape(5, 2)
  policy = Ranked(slope=20.0)
  plan = policy.plan(1000, 0.4, shape)
  step = (717.6 - 18.4) / 4
  expected = [32 + math.floor(717.6 - r * step) for r in range(5)]
  assert list(plan.lengths[:, 0]) == expected
  # At 60 % the first layer would hold more than there is: it is full, and the
  # last one gets what is left, 2 x 568 - 968.
  plan = policy.plan(1000, 0.6, shape)
  assert list(plan.lengths[:, 0]) == [1000, 800, 600, 400, 200]
  assert list(policy.plan(1000, 0.4, CacheShape(1, 2)).lengths[0]) == [400] * 2


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.2])
def test_heads_compete_for_a_layer(floor):
  policy = Ranked(scorer=SCORER, sinks=1, floor=floor)
  uneven = 0
  for seed, budget in enumerate((0.1, 0.3, 0.5, 0.9)):
    arrays = draw(seed, TOKENS)
    count = math.floor(budget * TOKENS)
    s1 = 1 if count > 4 else 0
    if not s1:
      assert kept(policy, arrays, budget).sum() == K * count
      continue
    own = max(0, math.floor(floor * count) - 5)
    scores = window_scores(arrays, 1, 4)
    expected = oracle.adaptive(scores, 1, count - 5, 4, own)
    got = kept(policy, arrays, budget)
    np.testing.assert_array_equal(got, expected)
    lengths = np.sort(got.sum(axis=-1))[::-1]
    bounds = policy.plan(TOKENS, budget, SHAPE).lengths[0]
    assert (lengths <= bounds).all()
    uneven += lengths[0] > lengths[-1]
  assert uneven


def test_one_head_can_take_what_the_bounds_allow():
  # All attention of head 2's window falls on many tokens, that of the others
  # on their own recent ones.
  q, k, v, w_o = draw(0, TOKENS)
  q[:] = 1.0
  k[:] = -1.0
  k[36:] = 9.0
  k[:, 2] = 0.0
  policy = Ranked(scorer=SCORER, floor=0.5)
  plan = policy.plan(TOKENS, 0.4, SHAPE)
  got = kept(policy, (q, k, v, w_o), 0.4).sum(axis=-1)
  # Half of 16 each, at least; a layer has 64.
  assert list(got) == [8, 8, 40, 8]
  assert list(plan.lengths[0]) == [40, 24, 18, 16]


@pytest.mark.parametrize("sinks", [0, 4])
def test_expected_attention(sinks):
  scorer = ExpectedAttention(window=16, future=20, theta=100.0)
  parts = {"sinks": np.int32(sinks), "recent": np.int32(3)}
  run = jax.jit(scorer.scores)
  for tokens in (12, TOKENS):  # Fewer and more than the window.
    q, k, v, w_o = draw(tokens, tokens, rows=16)
    q, k = q / 4, k / 4
    got = run(window(q, k, v, w_o, size=48), parts)
    expected = oracle.expected_attention(q, k, v, 16, 20, 100.0, sinks, 3)
    np.testing.assert_allclose(got[:, :tokens], expected, atol=1e-5)


def test_expected_attention_keeps_the_best():
  scorer = ExpectedAttention(window=16, future=20)
  arrays = draw(1, TOKENS, rows=16)
  scores = oracle.expected_attention(*arrays[:3], 16, 20, 10_000.0, 4, 0)
  expected = [oracle.kept(row, 4, 12, 0) for row in scores]
  policy = Ranked(scorer=scorer, sinks=4, recent=0)
  np.testing.assert_array_equal(kept(policy, arrays, 0.4), expected)


def test_token_controls():
  arrays = draw(0, TOKENS, rows=1)
  norms = np.linalg.norm(arrays[1], axis=-1).T
  expected = [oracle.kept(-row, 0, 15, 1) for row in norms]
  got = kept(Ranked(scorer=KeyNorm()), arrays, 0.4)
  np.testing.assert_array_equal(got, expected)
  chance = Ranked(scorer=Chance(seed=1))
  got = kept(chance, arrays, 0.4)
  np.testing.assert_array_equal(got, kept(chance, arrays, 0.4, size=64))
  for other in (
    kept(Ranked(scorer=Chance(seed=2)), arrays, 0.4),
    kept(chance, arrays, 0.4, r=1),
    np.roll(got, 1, axis=0),
  ):
    assert (other & got).sum() < 0.8 * got.sum()


def test_static_heads():
  gates = ((0.1, 0.9, 0.2, 0.3), (0.9, 0.9, 0.1, 0.8), (0.0,) * 4)
  policy = StaticHeads(gates=gates, sinks=2, recent=4)
  # B = 192; with 4 full heads 8 are left 4 each, with 3 there are 8 for 9.
  plan = policy.plan(TOKENS, 0.4, SHAPE)
  np.testing.assert_array_equal(
    plan.lengths, [[40, 8, 8, 8], [40, 40, 8, 8], [8] * 4]
  )
  np.testing.assert_array_equal(
    plan.rings, [[0, 6, 6, 6], [0, 0, 6, 6], [6] * 4]
  )
  arrays = draw(0, TOKENS, rows=1)
  for r, full in enumerate(([1], [0, 1], [])):
    got = kept(policy, arrays, 0.4, r)
    expected = np.zeros((K, TOKENS), bool)
    expected[:, :2] = expected[:, 34:] = True
    expected[full] = True
    np.testing.assert_array_equal(got, expected)
  assert (policy.plan(TOKENS, 0.05, SHAPE).lengths == 2).all()
  assert (policy.plan(5, 1.0, SHAPE).lengths == 5).all()


def test_gates_that_do_not_fit_are_named():
  for gates in ((), ((1.0,), (1.0, 2.0))):
    with pytest.raises(ValueError, match="`gates` must hold as many"):
      StaticHeads(gates=gates)
  policy = StaticHeads(gates=((1.0, 2.0),))
  with pytest.raises(ValueError, match="`gates` are for 1 layers of 2 KV"):
    policy.plan(8, 0.5, SHAPE)


BLOCK = 4
PATTERNS = (
  s2.strided(
    8, block_size=BLOCK, local_blocks=2, vertical_stride=4, num_kv_heads=4
  ),
  None,
  s2.sliding_window(
    8, block_size=BLOCK, local_blocks=3, sink_blocks=1, num_kv_heads=4
  ),
)


def last_row(pattern, length):
  """What each KV head sees from the last of `length` tokens, [K, length]."""
  if pattern is None:
    return np.ones((K, length), bool)
  return pattern.to_dense(length)[::2, -1]


@pytest.mark.parametrize("tokens", [1, 4, 5, 16, 17, 31, 32])
def test_shards_keep_what_the_last_token_sees(tokens):
  policy = ShardOnly(patterns=PATTERNS)
  arrays = draw(0, tokens, rows=1)
  for r, pattern in enumerate(PATTERNS):
    got = kept(policy, arrays, 0.5, r, size=33)
    np.testing.assert_array_equal(got, last_row(pattern, tokens))


@pytest.mark.parametrize("prompt", [3, 8, 13])
def test_shards_drop_what_is_out_of_sight(prompt):
  policy = ShardOnly(patterns=PATTERNS)
  plan = policy.plan(prompt, 0.5, SHAPE)
  # Rows as the scheduler has them: slots of tokens, cut into pages.
  rows = [
    [
      list(np.flatnonzero(last_row(PATTERNS[r], prompt)[plan.heads[r, j]]))
      for j in range(K)
    ]
    for r in range(R)
  ]
  dropped = 0
  for position in range(prompt, 60):
    if position % BLOCK == 0:
      drops = policy.drops(position, BLOCK, SHAPE)
      for r, j in np.ndindex(R, K):
        page = drops[r, plan.heads[r, j]]
        if page >= 0:
          dropped += 1
          assert (page + 1) * BLOCK <= len(rows[r][j])
          del rows[r][j][page * BLOCK : (page + 1) * BLOCK]
    for r, j in np.ndindex(R, K):
      rows[r][j].append(position)
      seen = last_row(PATTERNS[r], position + 1)[plan.heads[r, j]]
      assert rows[r][j] == list(np.flatnonzero(seen))
  assert dropped > 20


def test_patterns_that_cannot_be_served_are_named():
  with pytest.raises(ValueError, match="blocks of one size"):
    ShardOnly(patterns=())
  with pytest.raises(ValueError, match="blocks of one size"):
    ShardOnly(patterns=(None,))
  table = s2.from_block_mask(
    np.tril(np.ones((4, 4), bool)), block_size=4, num_heads=8
  )
  with pytest.raises(ValueError, match=r"`patterns\[1\]` must have strided"):
    ShardOnly(patterns=(None, table))
  apart = s2.strided(
    8, block_size=4, local_blocks=2, vertical_stride=4, num_kv_heads=4,
    per_query_head=True,
  )  # fmt: skip
  with pytest.raises(ValueError, match="the query heads of a KV head see the"):
    ShardOnly(patterns=(apart,))
  policy = ShardOnly(patterns=PATTERNS)
  with pytest.raises(ValueError, match="`page_size` must be the pattern's"):
    policy.drops(8, 8, SHAPE)
  for shape in (CacheShape(2, 4), CacheShape(3, 8)):
    with pytest.raises(ValueError, match="`patterns` are for 3 layers of 4"):
      policy.plan(8, 0.5, shape)


def test_rereading():
  context, tokens = 11, 30
  q, k, _, _ = draw(0, tokens, rows=tokens)
  expected = oracle.reread_scores(q, k, context)
  padded = (np.pad(x, ((0, 6), (0, 0), (0, 0)), constant_values=np.nan)
            for x in (q, k))  # fmt: skip
  got = jax.jit(reread_scores, static_argnames="block")(
    *padded, context=np.int32(context), length=np.int32(tokens), block=8
  )
  got = np.asarray(got)
  np.testing.assert_allclose(got[:, :tokens], expected, atol=1e-5)
  assert not got[:, context:].any()


def test_the_best_of_all_layers_and_heads():
  scores = np.random.default_rng(0).random((R, K, TOKENS)).astype(np.float32)
  length, tokens = 30, 100
  ranked = scores.copy()
  ranked[..., :2] = 9
  ranked[..., length:] = -1
  expected = np.zeros(scores.size, bool)
  expected[oracle.largest(ranked.ravel(), tokens)] = True
  best = jax.jit(keep_best, static_argnames="sinks")
  got = best(scores, length=np.int32(length), tokens=np.int32(tokens), sinks=2)
  np.testing.assert_array_equal(got, expected.reshape(scores.shape))
  everything = best(scores, length=np.int32(3), tokens=np.int32(10**6), sinks=2)
  assert everything.sum() == R * K * 3
