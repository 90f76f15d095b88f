"""Head plans: what is refused, what is derived, when a warning is due."""

import dataclasses
import warnings

import pytest

from jaxheads.moh import MoHConfig


def config(**changes):
  plan = {"num_heads": 8, "num_shared": 2, "top_k": 4}
  return MoHConfig(**(plan | changes))


def test_counts_are_derived_from_the_plan():
  plan = config()
  assert plan.num_routed == 6
  assert plan.num_active == 6
  assert plan.active_fraction == 0.75
  assert plan.routes


def test_defaults_are_the_released_codes_two_stage_router():
  plan = config()
  assert plan.router == "two_stage"
  assert plan.gates == "scaled"
  assert plan.straight_through == "selected"
  assert plan.group_size == 1


def test_a_plan_with_all_heads_shared_does_not_route():
  plan = config(num_shared=8, top_k=0)
  assert not plan.routes
  assert plan.num_routed == 0
  assert plan.num_active == 8
  assert plan.active_fraction == 1.0


@pytest.mark.parametrize(
  ("shared", "top_k"), [(0, 8), (0, 2), (1, 7), (1, 2), (7, 1), (2, 6)]
)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_legal_extremes_are_accepted(shared, top_k):
  plan = config(num_shared=shared, top_k=top_k)
  assert plan.num_active == shared + top_k


def test_plans_are_frozen_hashable_and_equal_by_value():
  assert config() == config()
  assert hash(config()) == hash(config())
  assert config() != config(gates="paper")
  with pytest.raises(dataclasses.FrozenInstanceError):
    config().top_k = 3


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"top_k": 7}, "top_k"),  # shared + top_k > heads
    ({"num_shared": 0, "top_k": 9}, "top_k"),  # top_k > routed
    ({"top_k": -1}, "top_k"),
    ({"num_shared": -1}, "num_shared"),
    ({"num_shared": 9, "top_k": 0}, "num_shared"),
    ({"num_heads": 0, "num_shared": 0, "top_k": 0}, "num_heads"),
    ({"num_heads": -8}, "num_heads"),
    ({"top_k": 0}, "top_k"),  # routed heads that nobody may pick
    ({"num_shared": 0, "top_k": 0}, "top_k"),  # no head at all
    ({"group_size": 0}, "group_size"),
    ({"group_size": -2}, "group_size"),
    ({"group_size": 4}, "group_size"),  # 6 routed heads
    ({"group_size": 2, "top_k": 3}, "group_size"),
    ({"num_heads": 9, "num_shared": 3, "group_size": 2}, "group_size"),
    ({"router": "sigmoid"}, "router"),
    ({"gates": "softmax"}, "gates"),
    ({"router": "query_norm", "straight_through": "all"}, "straight_through"),
  ],
)
def test_impossible_plans_are_refused_by_name(changes, named):
  with pytest.raises(ValueError, match=rf"`{named}`"):
    config(**changes)


def test_a_refusal_says_what_came():
  with pytest.raises(ValueError, match=r"`top_k`.*\b7\b"):
    config(top_k=7)


def test_top_1_in_the_scaled_form_warns_that_the_router_cannot_learn():
  with pytest.warns(UserWarning, match="top_k") as record:
    config(top_k=1)
  # The warning offers the way out, once.
  assert len(record) == 1
  assert "paper" in str(record[0].message)


@pytest.mark.parametrize(
  "changes",
  [
    {"top_k": 1, "gates": "paper"},
    {"top_k": 1, "router": "query_norm"},
    {"top_k": 2},
    {"num_shared": 8, "top_k": 0},
  ],
)
def test_no_warning_where_the_task_gradient_exists(changes):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    config(**changes)


@pytest.mark.parametrize(
  ("num_heads", "active", "shared", "top_k"),
  [(8, 0.75, 2, 4), (16, 0.5, 4, 4), (8, 1.0, 2, 6), (4, 0.75, 1, 2)],
)
def test_from_fraction_keeps_a_quarter_of_the_heads_shared(
  num_heads, active, shared, top_k
):
  plan = MoHConfig.from_fraction(num_heads, active)
  assert (plan.num_heads, plan.num_shared, plan.top_k) == (
    num_heads,
    shared,
    top_k,
  )
  assert plan.active_fraction == active


def test_from_fraction_takes_the_shared_heads_and_other_fields():
  plan = MoHConfig.from_fraction(8, 0.5, shared=0, gates="paper", group_size=2)
  assert plan == config(num_shared=0, top_k=4, gates="paper", group_size=2)


def test_from_fraction_never_shares_more_than_is_active():
  plan = MoHConfig.from_fraction(16, 0.25)
  assert plan.num_active == 4
  assert 1 <= plan.num_shared <= 4


@pytest.mark.parametrize("active", [0.0, -0.5, 1.5, float("nan")])
def test_from_fraction_refuses_a_fraction_outside_0_to_1(active):
  with pytest.raises(ValueError, match="`active`"):
    MoHConfig.from_fraction(8, active)


def test_from_fraction_refuses_more_shared_than_active_heads():
  with pytest.raises(ValueError, match="shared"):
    MoHConfig.from_fraction(8, 0.5, shared=5)
