"""Task-KV: which heads, which tokens, for every option."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.kvcache import (
  CacheShape,
  Full,
  Ranked,
  Streaming,
  TaskKV,
  WindowAttention,
)
from jaxheads.kvcache.task_kv import separate
from tests.kvcache import oracle
from tests.kvcache.prompts import draw, keep, window

R, K = 3, 4
SMALL = TaskKV(window=4, sinks=2, recent=6, top=8, beta=0.5, m=1, kernel=3)
ORACLE = dict(L=4, s1=2, s2=6, top=8, beta=0.5, m=1, kernel=3)
SHAPE = CacheShape(R, K)


def kept(policy, arrays, budget, r=0):
  """Keep sets of the prompt; whatever is around it is kept by no one."""
  tokens = len(arrays[1])
  plan = policy.plan(tokens, budget, SHAPE)
  got = keep(policy, plan, window(*arrays, size=48, layer=r), r)
  assert not got[:, tokens:].any()
  return got[:, :tokens]


OPTIONS = {
  "as published": {},
  "extra": dict(center="extra"),
  "off": dict(center="off"),
  "nearest": dict(ranking="nearest"),
  "norms": dict(ranking="vnorm", center="off"),
  "pool all": dict(pool_scope="all"),
  "residual space": dict(space="wo", renorm=True),
  "maximum": dict(group_reduce="max"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_keeps_what_the_paper_keeps(options):
  policy = dataclasses.replace(SMALL, **options)
  names = {"pool_scope": "scope", "group_reduce": "reduce"}
  options = {names.get(name, name): x for name, x in options.items()}
  for tokens, budget, r in itertools.product(
    (5, 20, 40), (0.1, 0.4, 0.6, 0.9), range(R)
  ):
    arrays = draw(tokens + r, tokens)
    got = kept(policy, arrays, budget, r)
    expected = oracle.task_kv(*arrays, r, R, budget, **ORACLE, **options)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_short_prompts_are_kept_whole(tokens):
  # No longer than sinks and recent tokens, and shorter than the window.
  assert kept(SMALL, draw(0, tokens), 0.2).all()


def test_full_budgets_and_all_heads_full_are_the_full_cache():
  arrays = draw(0, 40)
  full = kept(Full(), arrays, 1.0)
  np.testing.assert_array_equal(kept(SMALL, arrays, 1.0), full)
  policy = dataclasses.replace(SMALL, beta=1.0, m=K)
  assert (policy.plan(40, 1.0, SHAPE).lengths == 40).all()


def test_without_full_heads_it_is_snapkv_with_sinks():
  arrays = draw(1, 40)
  policy = dataclasses.replace(SMALL, beta=0.0, m=0)
  snapkv = Ranked(scorer=WindowAttention(window=4, kernel=3), sinks=2, recent=6)
  for budget in (0.3, 0.5, 0.8):
    np.testing.assert_array_equal(
      kept(policy, arrays, budget), kept(snapkv, arrays, budget)
    )


def test_without_full_heads_and_middle_it_is_streaming():
  arrays = draw(1, 40)
  policy = dataclasses.replace(SMALL, beta=0.0, m=0)
  for budget in (0.15, 0.175, 0.2):  # 6, 7 and 8 tokens.
    np.testing.assert_array_equal(
      kept(policy, arrays, budget), kept(Streaming(sinks=2), arrays, budget)
    )


def test_no_and_all_middle_tokens():
  arrays = draw(1, 40)
  policy = dataclasses.replace(SMALL, beta=0.0, m=0)
  none = policy.plan(40, 0.2, SHAPE)
  assert none.layers["middle"][0] == 0
  most = policy.plan(40, 0.975, SHAPE)
  assert most.layers["middle"][0] == 31  # Of 32.
  got = kept(policy, arrays, 0.975)
  assert (got.sum(axis=-1) == 39).all()


def planted(vectors):
  """A prompt whose heads attend alike, and say exactly these vectors."""
  q, k, _, w_o = draw(0, 40)
  q[:], k[:] = q[:, :1], k[:, :1]
  return q, k, np.broadcast_to(vectors, (40, K, 8)).astype(np.float32), w_o


def full_heads(policy, arrays, budget=0.6, r=0):
  return list(np.flatnonzero(kept(policy, arrays, budget, r).all(axis=-1)))


# `top` holds the whole prompt, so that all weights together are 1.
PLANTED = dataclasses.replace(SMALL, top=64)


@pytest.mark.parametrize("odd", range(K))
def test_the_displaced_head_is_picked(odd):
  vectors = np.ones((K, 8))
  vectors[odd] += 1
  assert full_heads(PLANTED, planted(vectors), r=2) == [odd]
  # Layer 0 has two: the nearest is added, a tie of all others.
  first = 1 if odd == 0 else 0
  assert full_heads(PLANTED, planted(vectors)) == sorted({odd, first})


def test_the_head_at_the_mean_is_the_nearest():
  vectors = np.outer([3, -1, 0, -2], np.ones(8))  # Head 2 is their mean.
  assert full_heads(PLANTED, planted(vectors)) == [0, 2]
  off = dataclasses.replace(PLANTED, center="off")
  assert full_heads(off, planted(vectors)) == [0, 3]
  extra = dataclasses.replace(PLANTED, center="extra")
  assert full_heads(extra, planted(vectors), budget=0.9) == [0, 2, 3]


def test_ties_go_to_the_lower_head():
  pick = jax.jit(separate)
  scores = np.zeros(5, np.float32)
  for full, nearest, expected in (
    (2, 0, [0, 1]),
    (3, 1, [0, 1, 2]),
    (1, 1, [0]),
    (0, 0, []),
    (5, 1, [0, 1, 2, 3, 4]),
  ):
    got = pick(scores, scores, np.int32(full), np.int32(nearest))
    assert list(np.flatnonzero(got)) == expected
  distances = np.asarray([1, 5, 1, 5, 1], np.float32)
  got = pick(distances, distances, np.int32(2), np.int32(1))
  assert list(np.flatnonzero(got)) == [0, 1]


def test_attention_weights_decide_what_a_head_says():
  # Head 3 alone attends to the token whose value is odd; all values are equal.
  q, k, v, w_o = draw(0, 40)
  v[:] = 0.1
  v[20] = 3.0
  k[20] = 0.0
  k[20, 3] = 20 * q[:, 6:].mean(axis=(0, 1))
  q[:, 6:] = q[:, 6:].mean(axis=(0, 1))
  assert full_heads(PLANTED, (q, k, v, w_o), r=2) == [3]


def test_controls():
  arrays = draw(2, 40)
  listed = dataclasses.replace(
    SMALL, ranking="static", heads=((3, 1), (2,), ()), center="off"
  )
  assert full_heads(listed, arrays, r=0) == [1, 3]
  assert full_heads(listed, arrays, r=1) == [0, 2]
  assert full_heads(listed, arrays, r=2) == [0]
  random = dataclasses.replace(SMALL, ranking="random", center="off")
  order = random.plan(40, 0.6, SHAPE).layers["order"]
  for r in range(R):
    assert full_heads(random, arrays, r=r) == sorted(
      np.argsort(order[r])[: (2, 2, 1)[r]]
    )
    assert full_heads(random, draw(5, 40), r=r) == full_heads(
      random, arrays, r=r
    )
  orders = [
    dataclasses.replace(random, seed=seed).plan(40, 0.6, SHAPE).layers["order"]
    for seed in range(200)
  ]
  first = np.argmin(orders, axis=-1)  # [200, R]
  assert np.bincount(first.ravel(), minlength=K).min() > 100  # Of 150.


@pytest.mark.parametrize(("G", "space"), [(1, "value"), (2, "wo"), (8, "wo")])
def test_permuted_heads_permute_the_picks(G, space):
  q, k, v, w_o = draw(4, 40, N=K * G)
  policy = dataclasses.replace(SMALL, space=space)
  order = np.asarray([2, 0, 3, 1])

  def permuted(x, axis):
    """Query heads go with their KV head."""
    shape = (*x.shape[:axis], K, G, *x.shape[axis + 1 :])
    return x.reshape(shape).take(order, axis=axis).reshape(x.shape)

  expected = kept(policy, (q, k, v, w_o), 0.5)[order]
  got = kept(
    policy,
    (permuted(q, 1), k[:, order], v[:, order], permuted(w_o, 0)),
    0.5,
  )
  np.testing.assert_array_equal(got, expected)


def test_rotated_values_leave_residual_space_alone():
  changed = 0
  for seed in range(12):
    q, k, v, w_o = draw(seed, 40)
    rng = np.random.default_rng(seed)
    turned, back = v.copy(), w_o.copy()
    for g in range(K):
      turn, _ = np.linalg.qr(rng.normal(size=(8, 8)))
      turned[:, g] = v[:, g] @ turn
      for n in (2 * g, 2 * g + 1):
        back[n] = turn.T @ w_o[n]
    picks = {
      space: [
        full_heads(dataclasses.replace(SMALL, space=space), arrays)
        for arrays in ((q, k, v, w_o), (q, k, turned, back))
      ]
      for space in ("value", "wo")
    }
    assert picks["wo"][0] == picks["wo"][1]
    changed += picks["value"][0] != picks["value"][1]
  assert changed  # The paper's space depends on each head's basis.


def test_bfloat16_picks_the_same():
  tokens, agreed, heads, same_heads = 48, [], 0, 0
  for seed in range(20):
    arrays = draw(seed, tokens)
    plan = SMALL.plan(tokens, 0.5, SHAPE)
    exact, rounded = (
      keep(SMALL, plan, window(*arrays, dtype=dtype))
      for dtype in (jnp.float32, jnp.bfloat16)
    )
    agreed.append((exact & rounded).sum() / exact.sum())
    heads += K
    same_heads += (exact.all(axis=-1) == rounded.all(axis=-1)).sum()
  assert np.mean(agreed) > 0.95, np.mean(agreed)
  assert same_heads / heads > 0.95, same_heads / heads


def test_works_in_scan_and_vmap():
  plan = SMALL.plan(40, 0.4, SHAPE)
  windows = [window(*draw(r, 40), size=48, layer=r) for r in range(R)]
  expected = np.stack([keep(SMALL, plan, windows[r], r) for r in range(R)])
  stacked = jax.tree.map(lambda *x: np.stack(x), *windows)

  def layer(_, inputs):
    return None, SMALL.keep(*inputs)

  _, scanned = jax.lax.scan(layer, None, (stacked, plan.layers))
  np.testing.assert_array_equal(scanned, expected)
  mapped = jax.jit(jax.vmap(SMALL.keep))(stacked, plan.layers)
  np.testing.assert_array_equal(mapped, expected)


@pytest.mark.parametrize(
  ("settings", "match"),
  [
    (dict(window=0), "`window` must be at least 1, got 0"),
    (dict(recent=16), "`recent` must be at least `window`"),
    (dict(kernel=4), "`kernel` must be odd"),
    (dict(beta=1.5), "`beta` must be in"),
    (dict(center="middle"), "`center` must be one of 'included'"),
    (dict(ranking="best"), "`ranking` must be one of"),
    (dict(ranking="static"), "`heads` must be given"),
    (dict(heads=((0,),)), "`heads` must be given"),
    (dict(decode="ring"), "`decode` must be one of"),
  ],
)
def test_bad_settings_are_named(settings, match):
  with pytest.raises(ValueError, match=match):
    TaskKV(**settings)


@pytest.mark.parametrize(
  ("heads", "match"),
  [
    (((0,),), "heads of 3 layers, got 1"),
    (((0,), (0, 0), ()), r"`heads\[1\]` must hold different"),
    (((0,), (4,), ()), r"`heads\[1\]` must hold different"),
  ],
)
def test_bad_lists_are_named(heads, match):
  policy = dataclasses.replace(SMALL, ranking="static", heads=heads)
  with pytest.raises(ValueError, match=match):
    policy.plan(40, 0.4, SHAPE)
