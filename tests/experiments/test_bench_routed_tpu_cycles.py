"""What the cycle benchmark counts, without its compilers."""

import numpy as np
import pytest

from experiments import bench_routed_tpu_cycles as bench
from experiments._tpu_cycle_cases import Case, Problem
from jaxheads.errors import UserError

PROBLEM = Problem(length=1024, block=16, local=2, stride=4, heads=8)
SIZE = 128


def test_visits_are_those_up_to_the_last_query_of_each_block():
  work = bench.routed_work(
    Case("v5e", "routed", "causal", SIZE, SIZE), PROBLEM, 0.5
  )
  packing = bench.picks(PROBLEM, 0.5, SIZE)
  positions = np.asarray(packing.row_position).reshape(-1, SIZE)
  last = positions.max(axis=1)
  first = np.where(positions < 0, PROBLEM.length, positions).min(axis=1)
  used = last >= 0
  tiles = last[used] // SIZE + 1
  full = (first[used] + 1) // SIZE
  (forward,) = work["forward"]
  assert forward.counts == {
    "near full": full.sum(),
    "near edge": (tiles - full).sum(),
  }
  assert forward.outputs == used.sum()
  (backward,) = work["backward"]
  assert backward.counts == forward.counts
  # Every head has its own keys, and somebody sees each of their tiles.
  assert backward.outputs == PROBLEM.heads * PROBLEM.length // SIZE


def test_sharded_contexts_visit_fewer_tiles():
  case = Case("v5e", "routed", "s2", SIZE, SIZE)
  work = bench.routed_work(case, PROBLEM, 0.5)
  dense = bench.routed_work(
    Case("v5e", "routed", "causal", SIZE, SIZE), PROBLEM, 0.5
  )
  (forward,), near_and_far = work["forward"], work["backward"]
  assert forward.visits < dense["forward"][0].visits
  assert forward.visits == sum(each.visits for each in near_and_far)
  assert forward.steps == sum(each.steps for each in near_and_far)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"active": 0.0}, "`--active` must be in"),
    ({"chips": ("v3",)}, "`--chips` must be among"),
    ({"workers": 0}, "`--workers` must be at least 1"),
  ],
)
def test_what_does_not_fit_is_refused(options, message):
  with pytest.raises(UserError, match=message):
    bench.BenchConfig(**options)
