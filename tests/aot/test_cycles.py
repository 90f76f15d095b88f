import dataclasses

import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as splash_info,
)

from experiments import _tpu_cycle_costs as costs
from experiments import bench_tpu_cycles as bench
from experiments._tpu_cycle_cases import Case, Problem, dense_masks
from pallas_kernels.aot.bundles import Body, Schedule
from pallas_kernels.head_attention.mosaic_tpu.settings import overlap_on

PROBLEM = Problem(length=2048, block=64, local=2, stride=8, heads=3)


def body(kind="guard", bundles=0, matmuls=0, selects=0, inner=()):
  return Body(
    kind=kind,
    first=0,
    last=0,
    bundles=bundles,
    slots={"MXU": 2 * bundles} if matmuls else {},
    matmuls=matmuls,
    selects=selects,
    inner=tuple(inner),
  )


def schedule(name, *tiles, step=10, ends=7):
  """A kernel whose tiles have these bundles; edges select."""
  return Schedule(
    name=name,
    capacity={"MXU": 4},
    root=body(
      "kernel",
      inner=[
        body(
          "loop",
          step,
          inner=[
            body(bundles=ends),
            *(
              body(bundles=bundles, matmuls=1, selects=selects)
              for bundles, selects in tiles
            ),
          ],
        )
      ],
    ),
  )


def test_the_floor_is_the_peak():
  case = Case("v5e", "ours", "s2", 512, 512)
  assert costs.floor(case, 2) == 1024
  assert costs.floor(dataclasses.replace(case, chip="v6e"), 2) == 256


@pytest.mark.parametrize("tile", [(128, 128), (256, 128), (512, 512)])
def test_splash_attention_visits_what_it_says_itself(tile):
  masks = dense_masks(PROBLEM.pattern(), PROBLEM.length)
  info, _ = splash_info.process_mask(
    splash_mask.MultiHeadMask([splash_mask.NumpyMask(m) for m in masks]), tile
  )
  assert info.block_mask is not None
  # Masks differ from head to head: one grid step for each tile of each head.
  q_tiles, kv_tiles = PROBLEM.length // tile[0], PROBLEM.length // tile[1]
  assert info.block_mask.shape == (PROBLEM.heads, q_tiles, kv_tiles)
  assert costs.splash_visits(PROBLEM, *tile) == np.count_nonzero(
    info.block_mask
  )


def work_of(case, problem=PROBLEM):
  """What each kernel of a case does, forward first."""
  work = costs.our_work(dataclasses.replace(case, chip="any"), problem)
  return [*work["forward"], *work["backward"]]


def test_our_work_covers_the_mask():
  case = Case("v5e", "ours", "s2", 128, 128)
  forward, near, far = work_of(case)
  assert forward.counts == near.counts | far.counts
  assert forward.steps == near.steps + far.steps
  # What is computed holds all that is seen, and is not much more.
  masks = dense_masks(PROBLEM.pattern(), PROBLEM.length)
  seen = sum(mask.sum() for mask in masks)
  overlap = overlap_on(5, forward.layout, backward=False)
  computed = sum(
    count * chunk.size * chunk.keys
    for name, count in forward.counts.items()
    for chunk in forward.codes[name].chunks(forward.layout, overlap)
  )
  assert seen <= computed < 2 * seen


def test_a_step_that_shows_a_head_nothing_runs_no_tile():
  case = Case("v5e", "ours", "s2", 128, 128)
  (forward, *_) = work_of(case)
  edges = {
    name: count for name, count in forward.counts.items() if "far" in name
  }
  assert forward.visits == sum(forward.counts.values()) < forward.steps
  # Shards of a residue that is not reached yet.
  residues = [rule.residue for rule in PROBLEM.pattern().rules]
  blocks = np.arange(PROBLEM.length // PROBLEM.block)
  last = blocks[1::2] - PROBLEM.local
  held = [
    np.maximum(last - each, -1) // PROBLEM.stride + 1 for each in residues
  ]
  assert sum(edges.values()) == sum(int((-(-h // 2)).sum()) for h in held)


def kernels_of(case, bundles, problem=PROBLEM):
  """Kernels whose tiles take these bundles; edges select."""
  names = ("forward_.1", "backward_.2", "backward_.3")
  return [
    schedule(
      f"jvp_head_attention_{name}",
      *((bundles(tile), 50 if "edge" in tile else 0) for tile in work.codes),
    )
    for name, work in zip(names, work_of(case, problem), strict=False)
  ]


def test_our_cost_is_the_sum():
  case = Case("v5e", "ours", "s2", 128, 128)
  (forward, *_) = work_of(case)
  bundles = {name: 100 * at + 200 for at, name in enumerate(forward.codes)}
  kernel = kernels_of(case, bundles.get)[0]
  cost = costs.our_cost(case, [kernel], PROBLEM, "forward")
  in_tiles = sum(forward.counts[name] * bundles[name] for name in bundles)
  assert cost.visits == forward.visits
  assert cost.tiles == in_tiles
  skipped = forward.steps * len(bundles) - forward.visits
  outputs = PROBLEM.heads * PROBLEM.length // 128
  assert forward.outputs == outputs
  rest = 10 * forward.steps + costs.BRANCH * skipped + 7 * outputs
  assert cost.total == in_tiles + rest


def test_an_edge_takes_no_less_than_the_floor_of_what_it_computes():
  case = Case("v5e", "ours", "s2", 512, 512)
  (kernel, *_) = kernels_of(case, lambda _: 1, Problem())
  (forward, *_) = work_of(case, Problem())
  tiles = forward.tiles(case, kernel, "forward")
  assert tiles["far full"].cycles == 1024
  assert tiles["far edge of 256"].cycles == 512
  # 128 queries each with 128, 256, 384 and 512 keys; 448, 320, 192 and 64.
  assert tiles["near edge at 0"].cycles == 1024 * 10 / 16
  assert tiles["near edge at 512"].cycles == 1024 / 2


def test_a_tile_takes_no_less_than_the_floor():
  case = Case("v5e", "splash fused", "s2", 512, 512)
  kernel = schedule("splash_mha_fwd_residuals.1", (900, 50))
  cost = costs.splash_cost(case, [kernel], PROBLEM, "forward")
  assert cost.tiles == 1024 * costs.splash_visits(PROBLEM, 512, 512)
  steps = PROBLEM.heads * 4 * 4
  ends = PROBLEM.heads * 4
  assert cost.total == cost.tiles + 10 * steps + 7 * ends


def test_tiles_that_changed_places_are_noticed():
  kinds = ["far full", "near edge"]
  found = costs.label(schedule("k.1", (100, 0), (150, 9)), kinds)
  assert found["near edge"].bundles == 150
  with pytest.raises(ValueError, match="selects"):
    costs.label(schedule("k.1", (150, 9), (100, 0)), kinds)
  with pytest.raises(ValueError, match="has 1 tiles"):
    costs.label(schedule("k.1", (100, 0)), kinds)


def all_results():
  """Every case, with the same kernels in each."""
  results = {}
  for case in bench.cases(["v5e"]):
    if case.kernel != "ours":
      results[case] = [
        schedule("splash_mha_fwd_residuals.1", (2000, 50)),
        schedule("splash_mha_dq_no_residuals.1", (3000, 50)),
        schedule("splash_mha_dkv_no_residuals.1", (4000, 50)),
      ]
      continue
    results[case] = kernels_of(case, lambda _: 1000, Problem())
  return results


def test_the_tables():
  results = all_results()
  rows = bench.tile_rows(results, Problem())
  first = rows[0]
  assert (first["chip"], first["direction"]) == ("v5e", "forward")
  assert first["floor"] == 1024
  # No faster than the matrix units.
  assert first["full"] == {
    "bundles": 1000,
    "cycles": 1024,
    "mxu_occupancy": 0.5,
  }
  assert {"near full", "near edge at 0", "far full"} <= set(first["ours"])
  assert first["splash causal"]["splash fused"]["cycles"] == 2000
  assert first["ratio causal"] == 0.512
  assert first["share_of_floor"] == 1
  # Backward: splash attention's faster way.
  back = rows[1]
  assert back["full"]["bundles"] == 1000
  assert back["full"]["cycles"] == 1024 * 2.5
  assert back["splash causal"]["splash fused"]["cycles"] == 4000
  assert back["splash causal"]["splash unfused"]["cycles"] == 7000
  assert back["ratio causal"] == 0.64
  assert bench.tile_cells(rows)[2][6] == "4,000"
  whole = bench.whole_rows(results, Problem())
  assert [row["direction"] for row in whole] == ["forward", "backward"]
  for row in whole:
    for what in ("total", "tiles"):
      figures = row[what]
      assert figures["ratio"] == round(figures["splash"] / figures["ours"], 2)
  for cells in (bench.tile_cells(rows), bench.whole_cells(whole)):
    assert {len(row) for row in cells} == {len(cells[0])}


def test_what_does_not_compile_leaves_a_gap():
  results = all_results()
  for case in results:
    if 1024 in (case.block_q, case.block_kv):
      results[case] = "VMEM exceeded"
  rows = bench.tile_rows(results, Problem())
  gaps = [row for row in rows if row["tile"] == "1024 x 1024"]
  assert all("full" not in row and row["ours"] == {} for row in gaps)
  assert all("ratio causal" not in row for row in gaps)
  assert bench.tile_cells(rows)[-1][3] == "-"
  whole = bench.whole_rows(results, Problem())
  assert whole[0]["total"]["ours_tile"] == "512 x 512"
