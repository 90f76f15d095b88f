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


def test_our_visits_cover_the_mask():
  case = Case("v5e", "ours", "s2", 128, 128)
  visits = costs.our_visits(case, PROBLEM)
  counts = costs.kind_counts(visits)
  assert list(counts) == [kind for kind in costs.KINDS if kind in counts]
  assert sum(counts.values()) == visits.q_tile.size
  (mask, *_) = dense_masks(PROBLEM.pattern(), PROBLEM.length)
  # Far tiles are full of what is seen: no fewer keys than the mask has.
  assert visits.q_tile.size * 128 * 128 >= mask.sum()


def test_our_cost_is_the_sum():
  case = Case("v5e", "ours", "s2", 128, 128)
  counts = costs.kind_counts(costs.our_visits(case, PROBLEM))
  bundles = {kind: 100 * at + 200 for at, kind in enumerate(counts)}
  tiles = [(bundles[kind], 50 if "edge" in kind else 0) for kind in counts]
  kernel = schedule("jvp_head_attention_forward_.1", *tiles)
  cost = costs.our_cost(case, [kernel], PROBLEM, "forward")
  visits = sum(counts.values())
  in_tiles = sum(counts[kind] * bundles[kind] for kind in counts)
  q_tiles = PROBLEM.length // 128
  assert cost.visits == visits * PROBLEM.heads
  assert cost.tiles == in_tiles * PROBLEM.heads
  assert cost.total == PROBLEM.heads * (in_tiles + 10 * visits + 7 * q_tiles)


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
    kinds = list(costs.kind_counts(costs.our_visits(case, Problem())))
    tiles = [(1000, 50 if "edge" in kind else 0) for kind in kinds]
    near = [
      tile for tile, kind in zip(tiles, kinds, strict=True) if "near" in kind
    ]
    far = [
      tile for tile, kind in zip(tiles, kinds, strict=True) if "far" in kind
    ]
    results[case] = [
      schedule("jvp_head_attention_forward_.1", *tiles),
      schedule("transpose_head_attention_backward_.2", *near),
      *(
        [schedule("transpose_head_attention_backward_.3", *far)] if far else []
      ),
    ]
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
  assert set(first["ours"]) == set(costs.KINDS)
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
    if case.block_q == 1024:
      results[case] = "VMEM exceeded"
  rows = bench.tile_rows(results, Problem())
  gaps = [row for row in rows if row["tile"] == "1024 x 1024"]
  assert all("full" not in row and row["ours"] == {} for row in gaps)
  assert all("ratio causal" not in row for row in gaps)
  assert bench.tile_cells(rows)[-1][3] == "-"
  whole = bench.whole_rows(results, Problem())
  assert whole[0]["total"]["ours_tile"] == "512 x 512"
