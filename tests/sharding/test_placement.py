"""Heads dealt to devices: equal work, whole groups, and the report of it."""

import dataclasses
import itertools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from jaxheads import head_order, s2
from jaxheads.kvcache import CacheShape, LayerWindow, make_policy
from jaxheads.kvcache.by_context import ByContext
from jaxheads.models import ModelConfig
from jaxheads.moh import MoHConfig
from jaxheads.sharding import placement
from jaxheads.sharding.partition import local_patterns
from tests.models.builders import small_config

LLAMA = MoHConfig(num_heads=32, num_shared=16, top_k=8, router="query_norm")


def model(*layers, num_heads=32, num_kv_heads=None, **fields) -> ModelConfig:
  """Layers of (plan, context)."""
  return small_config(
    *(plan for plan, _ in layers),
    contexts=tuple(context for _, context in layers),
    num_heads=num_heads,
    num_kv_heads=num_kv_heads or num_heads,
    max_seq_len=4096,
    **fields,
  )


def cost(work, order, shards):
  """Sum over layers of the largest shard."""
  work = np.atleast_2d(work)[:, list(order)]
  return work.reshape(len(work), shards, -1).sum(axis=-1).max(axis=-1).sum()


def least_cost(work, shards):
  """The same of the best of all dealings."""
  work = np.atleast_2d(work)
  size = work.shape[1] // shards

  def dealings(left):
    if not left:
      yield []
    else:
      for others in itertools.combinations(left[1:], size - 1):
        shard = (left[0], *others)
        for rest in dealings([group for group in left if group not in shard]):
          yield [*shard, *rest]

  groups = list(range(work.shape[1]))
  return min(cost(work, order, shards) for order in dealings(groups))


@st.composite
def problems(draw, most_groups):
  """Work by layer and group, rules, and a number of shards."""
  shards = draw(st.integers(1, 4))
  each = draw(st.integers(1, most_groups // shards))
  layers = draw(st.integers(1, 3))
  shape = layers, shards * each
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  work = {
    "random": rng.random(shape),
    "few sizes": rng.integers(0, 4, shape).astype(float),
    "one heavy": np.where(np.arange(shape[1]) == 0, 10.0, rng.random(shape)),
    "all alike": np.ones(shape),
    "none": np.zeros(shape),
  }[draw(st.sampled_from(
    ["random", "few sizes", "one heavy", "all alike", "none"]
  ))]  # fmt: skip
  rules = rng.integers(0, draw(st.integers(1, 4)), shape[1]).tolist()
  return work, rules, shards


@hypothesis.given(problems(most_groups=8))
@hypothesis.settings(max_examples=100)
def test_small_problems_are_solved_exactly(problem):
  work, rules, shards = problem
  best = least_cost(work, shards)
  for options in ({}, {"rules": rules}):
    order = placement.deal(work, shards, **options)
    np.testing.assert_allclose(cost(work, order, shards), best, rtol=1e-8)


@hypothesis.given(problems(most_groups=40))
def test_every_group_once_never_worse_than_before_and_always_the_same(problem):
  work, rules, shards = problem
  order = placement.deal(work, shards, rules=rules)
  groups = range(work.shape[1])
  assert sorted(order) == list(groups)
  assert cost(work, order, shards) <= cost(work, groups, shards) * (1 + 1e-8)
  assert order == placement.deal(work.copy(), shards, rules=list(rules))
  mean = work[0].sum() / shards
  imbalance = placement.imbalance(work[0], order, shards)
  np.testing.assert_allclose(imbalance * mean, cost(work[0], order, shards))
  assert imbalance * (1 + 1e-12) >= 1


@hypothesis.given(problems(most_groups=24))
def test_shards_see_the_same_where_that_costs_nothing(problem):
  work, rules, shards = problem
  # As many of each kind for every shard, each kind with work of its own.
  rules = rules * shards
  work = np.asarray([[1.0 + rule for rule in rules]])
  order = placement.deal(work, shards, rules=rules)
  seen = np.asarray(rules)[list(order)].reshape(shards, -1)
  assert (seen == seen[0]).all()
  assert placement.imbalance(work, order, shards) == pytest.approx(1.0)


def test_what_is_alike_stays_in_its_order_and_a_good_order_as_it_is():
  assert placement.deal(np.ones(8), 4) == tuple(range(8))
  assert placement.deal(np.array([1, 2, 2, 1.0]), 2) == (0, 1, 2, 3)
  heavy_first = np.array([2.0] * 4 + [1.0] * 4)
  assert placement.deal(heavy_first, 2) == (0, 1, 4, 5, 2, 3, 6, 7)


def test_layers_dealt_alike_are_balanced_each():
  # Their sum is even already.
  work = np.array([[3, 3, 1, 1], [1, 1, 3, 3.0]])
  order = placement.deal(work, 2)
  np.testing.assert_array_equal(placement.imbalance(work, order, 2), [1, 1])
  np.testing.assert_array_equal(placement.imbalance(work, None, 2), [1.5, 1.5])


@pytest.mark.parametrize("shards", [0, 3, 16])
def test_shards_that_do_not_divide_are_named(shards):
  with pytest.raises(
    ValueError, match=f"divisor of the 8 groups, got {shards}"
  ):
    placement.deal(np.ones(8), shards)
  with pytest.raises(ValueError, match="divisor of the 32 `num_kv_heads`"):
    placement.place(model((LLAMA, None)), shards + 1000, 64)


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf])
def test_work_that_is_none_is_refused(value):
  with pytest.raises(ValueError, match="`work` must be finite"):
    placement.deal(np.array([1.0, value]), 2)


def test_shared_and_routed_heads_of_moh():
  config = model((LLAMA, None), (LLAMA, None))
  placed = placement.place(config, 2, 4096)
  (order, again) = placed.head_orders
  assert (
    order == again == (*range(8), *range(16, 24), *range(8, 16), *range(24, 32))
  )
  assert len(placed.runs) == 1
  assert placement.report(placed, 2, 4096) == (
    "heads over 2 devices, largest over mean active work: "
    "MoH layers 1.33x -> 1.00x"
  )
  assert "MoH layers 1.33x -> 1.33x" in placement.report(config, 2, 4096)


def test_query_groups_move_together():
  # Shared heads are KV groups 0-3, routed ones 4-7, as in MoH-LLaMA3-8B.
  config = model((LLAMA, None), num_kv_heads=8)
  for shards in (2, 4):
    (order,) = placement.place(config, shards, 4096).head_orders
    groups = np.reshape(order, (8, 4))
    assert all(len(set(group // 4)) == 1 for group in groups)
    np.testing.assert_array_equal(groups % 4, [[0, 1, 2, 3]] * 8)
  assert placement.report(placement.place(config, 4, 4096), 4, 4096).endswith(
    "MoH layers 1.33x -> 1.00x"
  )
  # One group a device: nothing can be done about it, and nothing is.
  assert placement.place(config, 8, 4096) == config
  assert placement.report(config, 8, 4096).endswith("1.33x -> 1.33x")


def test_measured_load_replaces_the_expected_one():
  config = model((LLAMA, None), num_kv_heads=8)
  load = np.ones((1, 32))
  load[0, 16:] = np.repeat([0.75, 0.25, 0.25, 0.75], 4)
  placed = placement.place(config, 2, 4096, head_load=load)
  before, after = (
    placement.report(c, 2, 4096, head_load=load) for c in (config, placed)
  )
  assert before.endswith("1.33x -> 1.33x")
  assert after.endswith("-> 1.00x")
  with pytest.raises(ValueError, match=r"`head_load` must be \[1, 32\]"):
    placement.place(config, 2, 4096, head_load=load[0])


def test_one_shard_is_the_own_order():
  config = model((LLAMA, None))
  placed = placement.place(placement.place(config, 2, 64), 1, 64)
  assert placed == config


def test_dense_heads_among_sharded_ones():
  hybrid = s2.strided(
    32, local_blocks=4, vertical_stride=8, dense_heads=4, num_kv_heads=16
  )
  config = model((None, hybrid), (None, None), num_kv_heads=16)
  placed = placement.place(config, 4, 4096)
  before, after = (
    placement.imbalance(
      placement.group_work(config, 4096)[0],
      order and head_order.of_kv_heads(order, 16),
      4,
    )
    for order in (None, placed.head_orders[0])
  )
  assert before > 2
  assert after < 1.01
  assert placed.head_orders[1] is None
  assert placement.report(placed, 4, 4096).endswith(
    f"S2 layers {before:.2f}x -> {after:.2f}x, dense layers 1.00x -> 1.00x"
  )


@pytest.mark.parametrize("per_query_head", [True, False])
def test_strides_up_to_the_heads_of_a_device_need_no_choice(per_query_head):
  pattern = s2.strided(
    32,
    local_blocks=2,
    vertical_stride=4,
    num_kv_heads=16,
    per_query_head=per_query_head,
  )
  # In their own order, the shares of a device do not repeat.
  pattern = dataclasses.replace(
    pattern,
    rules=tuple(sorted(pattern.rules, key=lambda r: r.residue // 2))
    if per_query_head
    else tuple(sorted(pattern.rules, key=lambda r: r.residue)),
  )
  config = model((LLAMA, pattern), (None, pattern), num_kv_heads=16)
  own = model((None, pattern), num_kv_heads=16)
  assert len(set(local_patterns(pattern, 8))) > 1
  for stored in placement.place(own, 4, 4096).stored_contexts:
    assert len(set(local_patterns(stored, 8))) == 1
  placed = placement.place(config, 4, 4096)
  assert placement.report(placed, 4, 4096).count("-> 1.0") == 2


def read_window(length, kv_heads):
  """A prompt whose first half of heads says something of its own."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  v = normal(length, kv_heads, 4)
  v[:, : kv_heads // 2] += 9 * normal(kv_heads // 2, 4)
  return LayerWindow(
    q=normal(32, kv_heads, 4),
    k=normal(length, kv_heads, 4),
    v=v,
    length=np.int32(length),
    w_o=normal(kv_heads, 4, 8),
    layer=np.int32(0),
  )


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("static_heads", {"gates": ((8, 7, 6, 5, 1, 1, 1, 1),)}),
    ("task_kv", {"beta": 0.5, "m": 4, "recent": 32}),
  ],
)
def test_full_and_compressed_heads_as_a_policy_keeps_them(name, options):
  policy = make_policy(name, **options)
  plan = policy.plan(512, 0.6, CacheShape(1, 8))
  one_layer = {key: value[0] for key, value in plan.layers.items()}
  keep = jax.jit(policy.keep)(read_window(512, 8), one_layer)
  kept = np.asarray(keep.sum(axis=-1))
  assert len(set(kept.tolist())) == 2  # Full ones and others.
  np.testing.assert_array_equal(np.sort(kept)[::-1], plan.lengths[0])
  config = model((None, None), num_heads=8)
  kept = {"kept_tokens": kept[None]}
  placed = placement.place(config, 2, 512, **kept)
  own = placement.imbalance(kept["kept_tokens"][0], None, 2)
  assert own > 1.05
  assert placement.report(placed, 2, 512, **kept).endswith(
    f"dense layers {own:.2f}x -> 1.00x"
  )
  with pytest.raises(ValueError, match=r"`kept_tokens` must be \[1, 8\]"):
    placement.place(config, 2, 512, kept_tokens=np.ones((1, 4)))


def test_a_plan_that_knows_its_heads_is_read_back_by_head():
  hybrid = s2.strided(
    8, block_size=16, local_blocks=2, vertical_stride=4, dense_heads=2
  )
  policy = ByContext(policy=make_policy("full"), contexts=(hybrid, None))
  plan = policy.plan(256, 1.0, CacheShape(2, 8))
  kept = placement.kept_by_head(plan.lengths, plan.heads)
  mask = hybrid.block_masks(256)[:, -1] * 16
  np.testing.assert_array_equal(kept, [mask.sum(axis=-1), [256] * 8])
  config = model((None, hybrid), (None, None), num_heads=8)
  placed = placement.place(config, 2, 256, kept_tokens=kept)
  loads = kept[0][list(placed.head_orders[0])].reshape(2, 4).sum(axis=-1)
  assert loads.max() - loads.min() <= 16


def test_configs_with_orders_survive_json_and_old_ones_load():
  placed = placement.place(model((LLAMA, None), (None, None)), 2, 64)
  assert any(placed.head_orders)
  fields = json.loads(json.dumps(placed.to_dict()))
  assert ModelConfig.from_dict(fields) == placed
  assert hash(ModelConfig.from_dict(fields)) == hash(placed)
  del fields["head_orders"]
  assert ModelConfig.from_dict(fields) == dataclasses.replace(
    placed, head_orders=()
  )


def test_an_order_of_heads_as_they_are_is_none():
  own = model((LLAMA, None), (LLAMA, None))
  assert dataclasses.replace(own, head_orders=(tuple(range(32)), None)) == own
  with pytest.raises(ValueError, match=r"`head_orders` must hold .* 2 layers"):
    dataclasses.replace(own, head_orders=(None,))
  with pytest.raises(ValueError, match=r"`head_orders\[1\]` must hold each"):
    dataclasses.replace(own, head_orders=(None, (0,) * 32))
