import pytest

from pallas_kernels.aot import bundles

# The shape of the compiler's text, written by hand: a loop over the grid that
# starts an output tile, adds a full tile or an edge, loops over something, and
# ends.
BUNDLES = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0 /* entry bundle: %kernel */ } /* Start region 1 */
   0x1   :  { %s2 = sphi 0 } /* End region 1 :: Start region 2 */
   0x2 LB: > { %s9 = sadd.s32 1, %s8 } /* Start region 10 :: Start region 3 */
   0x3   : > { %12 = sbr.rel (%p7_p0) target = $region40 } /* End region 3 */
   0x4   : > { %v1 = vsel /*vm=*/%vm1, 0.0 ;; %4 = vst [vmem:[#a]] %v1 }
   0x5   : > { %v2 = vadd.f32 1.0, %v1 }
   0x6 PF: > { %13 = sbr.rel (%p8_p1) target = $region44  ;;  %s3 = sld [smem:
   #b]] } /* Start/End empty region 40 :: Start region 41 */
   0x7   : > { %v3 = vmatpush.msra.mxu0 %v2 }
   0x8   : > { %14 = vmatmul.bf16.gmra.mxu0 %v3  ;;  %15 = vmatmul.f32 %v3 }
   0x9   : > { %16 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s1,
             /*vmem=*/%s2, /* vsel in a comment */ } /* End region 41 */
   0xa PF: > { %17 = sbr.rel (!%p8) target = $region48 } /* Start region 44 */
   0xb   : > { %18 = vmatmul.bf16.gmra.mxu0 %v3  ;;  %19 = vsel %vm2, 0.0 }
   0xc   : > { %20 = vsel /*vm=*/%vm2, 0.0  ;;  %21 = vpop.f32.mrf.mxu0 }
   0xd PF: > { %22 = sbr.rel (%p9) target = $region52 } /* Start region 48 */
   0xe LB: >> { %v4 = vadd.f32 1.0, %v4 } /* Start region 100 */
   0xf   : >> { %23 = sbr.rel (!%p3_p6) target = $region100 }
  0x10 PF: > { %s3 = sadd.s32 1, %s3 } /* Start/End empty region 52 */
  0x11   : > { %24 = sbr.rel (!%p4_p6) target = $region10 } /* End region 10 */
  0x12   :  { %25 = vsyncpa [#allocation6], 1 /* exit bundle: %kernel */ }
"""
HEADER = """\
== CAPACTIY:
MXU, VALU, VLOAD:FILL
    4     2     1
== UTILIZATION:
"""
ROWS = {0x7: "1 0 0", 0x8: "2 1 0", 0xB: "1 1 1", 0xC: "1 2 0", 0x5: "0 1 0"}
USAGE = HEADER + "".join(ROWS.get(at, "0 0 0") + "\n" for at in range(0x13))


@pytest.fixture
def schedule():
  return bundles.parse("kernel.1", BUNDLES, USAGE)


def test_branches_make_bodies(schedule):
  def outline(body):
    return (body.kind, body.first, body.last, [outline(x) for x in body.inner])

  assert outline(schedule.root) == (
    *("kernel", 0x0, 0x12),
    [
      (
        *("loop", 0x2, 0x11),
        [
          ("guard", 0x4, 0x5, []),
          ("guard", 0x7, 0x9, []),
          ("guard", 0xB, 0xC, []),
          ("guard", 0xE, 0xF, [("loop", 0xE, 0xF, [])]),
        ],
      )
    ],
  )


def test_every_bundle_belongs_to_one_body(schedule):
  assert sum(body.bundles for body in schedule.root.walk()) == 0x13
  assert schedule.root.bundles == 3
  (grid,) = schedule.root.inner
  assert grid.bundles == 7


def test_tiles_are_where_the_products_are(schedule):
  full, edge = schedule.tiles()
  assert (full.bundles, full.matmuls, full.selects) == (3, 2, 0)
  assert (edge.bundles, edge.matmuls, edge.selects) == (2, 1, 2)
  assert full.slots == {"MXU": 3, "VALU": 1}
  assert edge.slots == {"MXU": 2, "VALU": 3, "VLOAD:FILL": 1}
  assert schedule.occupancy(full, "MXU") == 3 / (4 * 3)
  assert schedule.occupancy(full, "VLOAD:FILL") == 0


def test_what_surrounds_the_tiles(schedule):
  # The loop over the grid; what starts a tile, and the loop that ends it.
  assert schedule.step_bundles() == 7
  assert schedule.ends_bundles() == 2 + 2


def test_a_core_without_work_leaves_before_the_loop(schedule):
  early = BUNDLES.replace(
    "0x1   :  { %s2", "0x1   :  { %s2 = sbr.rel (%p1) target = $region4 ;; %s2"
  )
  assert early != BUNDLES
  found = bundles.parse("kernel.1", early, USAGE)
  assert found.step_bundles() == schedule.step_bundles()
  assert [each.matmuls for each in found.tiles()] == [
    each.matmuls for each in schedule.tiles()
  ]


def test_other_texts_are_refused():
  with pytest.raises(ValueError, match="19 bundles and 18 rows"):
    bundles.parse("kernel.1", BUNDLES, USAGE.rstrip()[:-5])
  with pytest.raises(ValueError, match="capacity"):
    bundles.parse("kernel.1", BUNDLES, "")
  with pytest.raises(ValueError, match="region 99, which is not"):
    bundles.parse(
      "kernel.1", BUNDLES.replace("= $region40", "= $region99"), USAGE
    )
  crossing = BUNDLES.replace("target = $region40", "target = $region48")
  crossing = crossing.replace("target = $region44", "target = $region52")
  with pytest.raises(ValueError, match="cross"):
    bundles.parse("kernel.1", crossing, USAGE)


def test_a_folder_is_read_in_program_order(tmp_path):
  for name in ("jvp_attend_.10", "jvp_attend_.9", "copy.1"):
    stem = f"1700-{name}"
    (tmp_path / f"{stem}-72-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / f"{stem}-71-schedule-analysis_final_bundles.txt").write_text(
      "bundles: 19"
    )
    (
      tmp_path / f"{stem}-70-final_hlo-static-per-bundle-utilization.txt"
    ).write_text(USAGE)
  found = bundles.read_dump(tmp_path, "attend")
  assert [each.name for each in found] == ["jvp_attend_.9", "jvp_attend_.10"]


def test_the_compiler_is_told_where_to_write(tmp_path):
  flags = bundles.dump_flags(tmp_path)
  assert f"--xla_jf_dump_to={tmp_path} " in flags
  assert " --xla_jf_dump_llo_text=true " in flags
