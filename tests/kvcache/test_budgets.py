"""How many tokens and heads: the arithmetic of the specification."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads.kvcache import (
  CacheShape,
  Full,
  Plan,
  Streaming,
  TaskKV,
  cache_memory,
)
from jaxheads.kvcache.budgets import descending_heads, share, split
from tests.kvcache import oracle

LLAMA = CacheShape(32, 32), dict(beta=0.25, m=4)
MISTRAL = CacheShape(32, 8), dict(beta=0.3, m=1)
SHARES = st.integers(1, 1000).map(lambda share: share / 1000)


def k_of(plan):
  return plan.layers["middle"]


def test_llama_at_40_percent():
  shape, line = LLAMA
  plan = TaskKV(**line).plan(4096, 0.4, shape)
  assert list(descending_heads(shape, **line)[[0, -1]]) == [8, 4]
  assert (k_of(plan)[0], k_of(plan)[-1]) == (547, 1015)
  assert list(plan.lengths[0]) == [4096] * 8 + [819] * 24
  assert list(plan.lengths[-1]) == [4096] * 4 + [1287] * 28


def test_counts_are_rounded_to_the_nearest_head():
  # f(0) = 2.4, f(31) = 1, and 1.5 is passed between layers 19 and 20.
  counts = descending_heads(MISTRAL[0], 0.3, 1)
  assert list(counts) == [2] * 20 + [1] * 12
  assert descending_heads(CacheShape(1, 8), 0.3, 1) == [2]
  # 2.5 and 1.5 exactly: halves go up. 0.1 * 25 as floats is 2.5 as well.
  assert list(descending_heads(CacheShape(3, 25), 0.1, 1)) == [3, 2, 1]
  assert list(descending_heads(CacheShape(2, 4), 1.0, 9)) == [4, 4]


@pytest.mark.parametrize(("shape", "line"), [LLAMA, MISTRAL])
def test_1024_tokens_at_40_percent_have_no_middle_in_20_layers(shape, line):
  plan = TaskKV(**line).plan(1024, 0.4, shape)
  assert (k_of(plan) == 0).sum() == 20
  assert (plan.layers["recent"] < 256).sum() == 20
  assert (plan.layers["full"] == descending_heads(shape, **line)).all()


def test_an_extra_head_leaves_no_middle_up_to_6800_tokens():
  shape, line = MISTRAL
  for length in (2048, 4096, 6700):
    extra = TaskKV(**line, center="extra").plan(length, 0.4, shape)
    assert (extra.layers["recent"] < 256).sum() == 20, length
  enough = TaskKV(**line, center="extra").plan(6801, 0.4, shape)
  assert (enough.layers["recent"] == 256).all()
  assert (k_of(TaskKV(**line).plan(6700, 0.4, shape)) > 0).all()


@pytest.mark.parametrize(
  ("length", "first", "mean"),
  [
    (1024, 0.45, (0.40, 0.42)),
    (2048, 0.35, (0.30, 0.31)),
    (4096, 0.30, (0.24, 0.26)),
    (32768, 0.26, (0.19, 0.21)),
  ],
)
def test_feasible_floors(length, first, mean):
  means = []
  for shape, line in (LLAMA, MISTRAL):
    policy, n = TaskKV(**line), shape.num_kv_heads
    counts = descending_heads(shape, **line)
    floors = (counts * length + (n - counts) * 272) / (n * length)
    assert floors[0] == max(floors)
    assert floors[0] == pytest.approx(first, abs=0.005)
    means.append(round(floors.mean(), 2))
    # The least budget is the least: at it nothing shrinks, just below it does.
    at, below = (
      policy.plan(length, floors[0] + d, shape).layers for d in (1e-6, -1e-3)
    )
    assert at["full"][0] == counts[0]
    assert (at["sinks"][0], at["recent"][0]) == (16, 256)
    assert at["middle"][0] == 0
    assert (below["full"][0], below["recent"][0]) < (counts[0], 256) or (
      below["recent"][0] < 256
    )
  assert min(means) >= mean[0] and max(means) <= mean[1], means


def rules(length, budget, beta=0.5, m=2):
  """One layer of 4 heads, 2 of them full; L = 4, s1 = 2, s2 = 8."""
  policy = TaskKV(window=4, sinks=2, recent=8, top=8, beta=beta, m=m)
  plan = policy.plan(length, budget, CacheShape(1, 4))
  x = {name: int(value[0]) for name, value in plan.layers.items()}
  return (x["full"], x["sinks"], x["middle"], x["recent"]), plan


def test_rule_1_short_prompts_and_full_budgets_are_kept_whole():
  for length, budget in ((1, 0.01), (10, 0.1), (100, 1.0)):
    parts, plan = rules(length, budget)
    assert parts[0] == 4
    assert (plan.lengths == length).all()
    assert plan.kept_fraction(length) == 1
  assert rules(11, 0.5)[0][0] < 4


def test_rule_2_recent_tokens_shrink_to_the_window():
  # B = 232, C = (232 - 200) / 2 = 16, then 9, then 6.
  assert rules(100, 0.58)[0] == (2, 2, 6, 8)
  assert rules(100, 0.545)[0] == (2, 2, 0, 7)
  assert rules(100, 0.53)[0] == (2, 2, 0, 4)


def test_rule_3_full_heads_become_fewer():
  # C = (208 - 200) / 2 = 4 < 2 + 4, so one is full: (208 - 100) / 3 = 36.
  assert rules(100, 0.52)[0] == (1, 2, 26, 8)
  # B = 112: one full head leaves (112 - 100) / 3 = 4, no one 28.
  assert rules(100, 0.28)[0] == (0, 2, 18, 8)


def test_rule_4_sinks_shrink_to_one():
  assert rules(100, 0.06)[0] == (0, 2, 0, 4)
  assert rules(100, 0.05)[0] == (0, 1, 0, 4)
  assert rules(100, 0.03)[0] == (0, 1, 0, 2)
  parts, plan = rules(100, 0.001)
  assert parts == (0, 1, 0, 0)
  assert (plan.lengths == 1).all()


def test_all_heads_full_needs_the_whole_budget():
  # K_r = n divides by nothing in Eq. 17.
  assert rules(100, 1.0, beta=1.0, m=4)[0][0] == 4
  assert rules(100, 0.9, beta=1.0, m=4)[0] == (3, 2, 50, 8)


def test_no_full_head():
  assert rules(100, 0.4, beta=0.0, m=0)[0] == (0, 2, 30, 8)


@hypothesis.given(
  length=st.integers(1, 9000),
  budget=SHARES,
  shape=st.builds(CacheShape, st.integers(1, 6), st.integers(1, 9)),
  beta=st.integers(0, 20).map(lambda share: share / 20),
  m=st.integers(0, 5),
  window=st.integers(1, 32),
  more=st.integers(0, 100),
  sinks=st.integers(0, 20),
  center=st.sampled_from(["included", "extra", "off"]),
)
@hypothesis.settings(max_examples=200)
def test_every_layer_follows_the_rules(
  length, budget, shape, beta, m, window, more, sinks, center
):
  policy = TaskKV(
    window=window,
    sinks=sinks,
    recent=window + more,
    beta=beta,
    m=m,
    center=center,
  )
  plan = policy.plan(length, budget, shape)
  layers, n = shape
  total = oracle.decimal(budget) * n * length
  for r in range(layers):
    wanted = oracle.head_count(r, layers, n, beta, m)
    if center == "extra":
      wanted = min(wanted + 1, n)
    full, s1, k, s2 = oracle.layer_budget(
      length, budget, n, wanted, sinks, window + more, window
    )
    if full == n:
      assert (plan.lengths[r] == length).all()
      continue
    x = {name: plan.layers[name][r] for name in plan.layers}
    assert (x["full"], x["sinks"], x["middle"], x["recent"]) == (
      full,
      s1,
      k,
      s2,
    )
    each = s1 + k + s2
    assert list(plan.lengths[r]) == [length] * full + [each] * (n - full)
    if each > 1:  # As much of the budget as equal lengths can use.
      assert total - (n - full) < plan.lengths[r].sum() <= total


def test_rolling_rows_overwrite_their_recent_tokens():
  shape, line = MISTRAL
  plan = TaskKV(**line, decode="roll").plan(4096, 0.4, shape)
  assert list(plan.rings[0]) == [0, 0] + [256] * 6
  assert list(plan.rings[-1]) == [0] + [256] * 7
  assert not TaskKV(**line).plan(4096, 0.4, shape).rings.any()
  assert not TaskKV(**line, decode="roll").plan(200, 0.4, shape).rings.any()


@pytest.mark.parametrize(
  ("length", "logical", "paged", "entries", "tables"),
  [(8192, 0.400, 0.406, None, None), (32768, 1.600, 1.609, 824, 0.10)],
)
def test_memory(length, logical, paged, entries, tables):
  shape, line = MISTRAL
  sizes = dict(page_size=128, head_dim=128, itemsize=2)
  policy = TaskKV(**line)
  memory = cache_memory(policy.plan(length, 0.4, shape), **sizes)
  everything = cache_memory(Full().plan(length, 1.0, shape), **sizes)
  assert everything.logical_bytes == everything.paged_bytes
  assert everything.logical_bytes == length // 8192 * 2**30
  assert memory.logical_bytes / 2**30 == pytest.approx(logical, abs=5e-4)
  assert memory.paged_bytes / 2**30 == pytest.approx(paged, abs=5e-4)
  assert memory.paged_bytes / everything.paged_bytes <= 0.42
  assert memory.paged_bytes == memory.pages * 2 * 128 * 128 * 2
  if entries is not None:
    rows = policy.plan(length, 0.4, shape).lengths
    assert max((-(-rows // 128)).sum(axis=-1)) == entries
    assert memory.table_bytes / 2**20 == pytest.approx(tables, abs=5e-3)


def test_the_budget_is_the_decimal_that_was_written():
  assert 0.29 * 100 < 29
  assert share(0.29, 100) == 29
  assert share(np.float32(0.29), 100) == 29
  assert share(1, 7) == share(1.0, 7) == 7
  assert share(1e-7, 10**7) == 1


@hypothesis.given(
  tokens=st.integers(1, 60),
  sinks=st.integers(0, 20),
  recent=st.integers(0, 30),
  least=st.integers(0, 30),
)
def test_parts_add_up(tokens, sinks, recent, least):
  parts = split(tokens, sinks, recent, least)
  assert parts.tokens == tokens
  assert min(parts) >= 0
  assert parts.sinks <= sinks
  assert parts.sinks > 0 or sinks == 0


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, math.nan, math.inf])
def test_budgets_out_of_range_are_named(budget):
  for policy in (Full(), Streaming(), TaskKV()):
    with pytest.raises(ValueError, match=r"`budget` must be in \(0, 1\]"):
      policy.plan(8, budget, CacheShape(1, 1))
    with pytest.raises(ValueError, match="`length` must be at least 1"):
      policy.plan(0, 0.5, CacheShape(1, 1))


def test_the_effective_budget():
  plan = Plan(np.asarray([[8, 4], [8, 2]]), np.zeros((2, 2), int), {})
  assert plan.kept_fraction(8) == 22 / 32
