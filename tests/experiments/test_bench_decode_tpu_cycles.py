"""What the decoding cycle benchmark counts; one test asks the compiler."""

import pytest

from experiments import _decode_cycle_cases as cases
from experiments import _decode_cycle_costs as costs
from experiments import bench_decode_tpu_cycles as bench
from experiments.bench_tpu_cycles import compile_alone

PROBLEM = cases.Problem(batch=2, length=1024, kv_heads=8)
CASE = cases.Case("v5e", "ours", "bfloat16", 128)


@pytest.mark.parametrize("budget", [1.0, 0.6, 0.4, 0.2])
@pytest.mark.parametrize("heads", ["even", "uneven"])
def test_rows_keep_the_budget(budget, heads):
  lengths = cases.row_lengths(PROBLEM, budget, heads)
  assert len(lengths) == PROBLEM.rows
  kept = sum(lengths) / (PROBLEM.rows * PROBLEM.length)
  assert kept == pytest.approx(budget, abs=1e-3)
  if heads == "uneven":
    assert lengths.count(PROBLEM.length) >= PROBLEM.batch


def test_pages_of_all_heads_keep_what_any_head_keeps():
  lengths = cases.row_lengths(PROBLEM, 0.4, "uneven")
  together = cases.Case("v5e", "stock, all heads", "bfloat16", 128)
  full = PROBLEM.rows * PROBLEM.length // 128
  assert costs.live_pages(together, PROBLEM, lengths) == full
  # 1,024 tokens fill 8 pages, each of the others' 322 fill 3.
  assert costs.live_pages(CASE, PROBLEM, lengths) == 2 * (8 + 7 * 3)


def test_a_turn_waits_for_its_copies_and_hides_others():
  def run(starting, computing, copied, ahead=2, rest=0.0):
    turns = [costs.Turn(starting, computing, copied)] * 10
    return costs.run(turns, ahead, rest, bandwidth=2.0)

  # Copies take 100 cycles each: the last turn computes after all of them.
  assert run(0, 10, 200).cycles == 10 * 100 + 10
  # They take none: the core has ten turns to start and compute.
  assert run(5, 10, 0).cycles == 10 * 15
  # They take as long as a turn: after the first, none is waited for.
  assert run(0, 100, 200).cycles == 100 + 10 * 100
  # One after the other, if none is under way while a turn computes.
  assert run(0, 100, 200, ahead=0).cycles == 10 * (100 + 100)
  busy = run(5, 10, 0, rest=30)
  assert busy.busy == busy.cycles == 10 * 15 + 30


def test_turns_compute_halves_of_what_is_left():
  ours = costs.OurCosts(
    whole=1000,
    partial=100,
    halves={1024: 50, 512: 30, 256: 20},
    least=7,
    ahead=3,
    page=2,
    row=0,
  )
  # All; then 1,024 + 256 + 1 of the 1,281 tokens in eleven pages.
  whole, last = ours.turns(CASE, [2048 + 1281])
  assert (whole.computing, whole.starting) == (1000, 3 + 16 * 2)
  assert last.computing == 100 + 50 + costs.BRANCH + 20 + 7
  assert last.copied == 11 * CASE.page_bytes == 11 * 2 * 128 * 128 * 2


@pytest.mark.compile
def test_a_step_costs_what_its_live_pages_cost():
  problem = cases.Problem()
  found = compile_alone(cases.compile_case, CASE, problem)
  if isinstance(found, str):
    raise AssertionError(found)
  rows = {
    (row["budget"], row["heads"]): row
    for row in bench.rows_of({CASE: found}, problem)
  }
  for row in rows.values():
    assert 0.9 < row["over_live_pages"] < 1.1
    assert row["share_of_bandwidth"] > 0.9
  assert rows[0.4, "uneven"]["speedup"] > 2.3
