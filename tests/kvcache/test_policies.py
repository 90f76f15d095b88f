"""What every policy owes to those who serve it."""

import collections
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxheads import s2
from jaxheads.kvcache import (
  POLICIES,
  CacheShape,
  Ranked,
  TaskKV,
  compact,
  make_policy,
)
from tests.kvcache.prompts import draw, layer_of, window

R, K, SIZE, ROWS = 3, 4, 48, 4
SHAPE = CacheShape(R, K)
WINDOW = dict(window=ROWS, kernel=3)
SHARDS = s2.strided(
  8, block_size=4, local_blocks=2, vertical_stride=4, num_kv_heads=4
)
SETTINGS = {
  "snapkv": WINDOW,
  "pyramid": WINDOW,
  "ada_snapkv": WINDOW,
  "ada_pyramid": WINDOW,
  "expected": dict(window=ROWS, future=16),
  "ada_expected": dict(window=ROWS, future=16),
  "static_heads": dict(
    gates=((0.1, 0.9, 0.2, 0.3), (0.9, 0.9, 0.1, 0.8), (0.0,) * 4),
    sinks=2,
    recent=4,
  ),
  "shard_only": dict(patterns=(SHARDS, None, SHARDS)),
  "task_kv": dict(sinks=2, recent=6, top=8, beta=0.5, **WINDOW),
}
EVERY = {name: make_policy(name, **SETTINGS.get(name, {})) for name in POLICIES}
# What they see or keep is not the budget's to decide.
FREE = {"full", "shard_only"}


@functools.cache
def packed(policy):
  """Keep set and rows of one layer, and how often that was traced."""
  traces = collections.Counter()

  @jax.jit
  def run(window, layer):
    traces["run"] += 1
    keep = policy.keep(window, layer)
    return keep, compact(keep, window.k, window.v)

  return run, traces


@pytest.mark.parametrize("name", EVERY)
@hypothesis.given(
  seed=st.integers(0, 1000),
  tokens=st.integers(1, SIZE),
  budget=st.integers(1, 100).map(lambda share: share / 100),
)
@hypothesis.example(seed=0, tokens=1, budget=0.01)
@hypothesis.example(seed=0, tokens=SIZE, budget=1.0)
@hypothesis.settings(max_examples=12)
def test_keeps_its_plan(name, seed, tokens, budget):
  policy = EVERY[name]
  run, traces = packed(policy)
  plan = policy.plan(tokens, budget, SHAPE)
  total = 0
  for r in range(R):
    w = window(*draw(seed + r, tokens, rows=policy.window), size=SIZE, layer=r)
    keep, rows = run(w, layer_of(plan, r))
    keep, rows = jax.tree.map(np.asarray, (keep, rows))
    # Nothing but the prompt, and from each head at least a token.
    assert not keep[:, tokens:].any()
    assert keep.any(axis=-1).all()
    lengths = rows.lengths
    total += lengths.sum()
    if policy.knows_lengths:
      np.testing.assert_array_equal(lengths, plan.lengths[r])
    else:
      assert (lengths <= plan.lengths[r]).all()
    if plan.heads is not None:
      np.testing.assert_array_equal(rows.head_of_slot, plan.heads[r])
    assert np.isfinite(rows.k).all() and np.isfinite(rows.v).all()
  # One program for all layers, lengths and budgets.
  assert traces["run"] == 1
  if name not in FREE and not (name == "task_kv" and tokens <= 8):
    assert total <= max(budget * R * K * tokens + 1e-6, R * K)
  if budget == 1 and name != "shard_only":
    assert total == R * K * tokens


@pytest.mark.parametrize("name", EVERY)
def test_plans_are_well_formed(name):
  policy = EVERY[name]
  assert hash(policy) == hash(make_policy(name, **SETTINGS.get(name, {})))
  for tokens, budget in ((1, 0.3), (9, 0.3), (48, 0.5), (48, 1.0), (5000, 0.2)):
    plan = policy.plan(tokens, budget, SHAPE)
    assert plan.lengths.shape == plan.rings.shape == SHAPE
    assert plan.lengths.dtype == plan.rings.dtype == np.int32
    assert plan.lengths.min() >= 1 and plan.lengths.max() <= tokens
    assert (np.diff(plan.lengths, axis=-1) <= 0).all()
    assert (plan.rings <= plan.lengths).all() and plan.rings.min() >= 0
    for x in plan.layers.values():
      assert len(x) == R
      assert x.dtype in (np.int32, np.float32)
    if budget == 1:
      assert not plan.rings.any()
  for budget in (0.0, 1.1, -1.0, float("nan")):
    with pytest.raises(ValueError, match="`budget` must be in"):
      policy.plan(8, budget, SHAPE)
  with pytest.raises(ValueError, match="`length` must be at least 1"):
    policy.plan(0, 0.5, SHAPE)


@pytest.mark.parametrize(
  "name", [name for name, policy in EVERY.items() if policy.knows_lengths]
)
def test_budgets_are_used(name):
  if name in FREE:
    return
  for budget in (0.2, 0.4, 0.75):
    plan = EVERY[name].plan(4000, budget, SHAPE)
    assert 0.99 * budget < plan.kept_fraction(4000) <= budget


def test_unknown_names_and_settings_are_refused():
  with pytest.raises(ValueError, match="`policy` must be one of 'full'"):
    make_policy("h2o")
  with pytest.raises(TypeError, match="windows"):
    make_policy("snapkv", windows=3)


def test_settings_reach_scorer_and_policy():
  policy = make_policy("ada_snapkv", window=8, kernel=5, sinks=2)
  assert isinstance(policy, Ranked)
  assert (policy.window, policy.scorer.kernel, policy.sinks) == (8, 5, 2)
  assert policy.floor == 0.2
  assert make_policy("ada_snapkv", floor=0.5).floor == 0.5
  assert make_policy("task_kv", beta=0.3) == TaskKV(beta=0.3)
