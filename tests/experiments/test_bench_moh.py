"""`experiments/bench_moh.py` at sizes that take a moment."""

import json
import sys

import pytest

from experiments import _moh_cases as cases
from experiments import bench_moh
from jaxheads import flops


def run(monkeypatch, *flags):
  monkeypatch.setattr(sys, "argv", ["bench_moh.py", *flags])
  bench_moh.main()


@pytest.mark.slow
def test_writes_figures_of_every_subject(tmp_path, monkeypatch, capsys):
  figures = tmp_path / "out" / "a.json"
  run(
    monkeypatch,
    *("--lengths", "32", "--active", "0.5", "--heads", "4", "--kv-heads", "2"),
    *("--head-dim", "8", "--group-size", "2", "--rounds", "2"),
    *("--dense-limit", "16", "--json", str(figures)),
  )
  rows = {
    (row["subject"], row["direction"], row["variant"]): row
    for row in json.loads(figures.read_text())["rows"]
  }
  both = ("forward", "forward+backward")
  assert set(rows) == {
    *(
      ("operator", d, v)
      for d in both
      for v in ("all heads", "50%", "not packed")
    ),
    *(("layer", d, v) for d in both for v in ("all heads", "50%")),
    *(("decode", "decode", v) for v in ("all heads", "50%")),
  }
  assert all(row["median_ms"] > 0 < row["speedup"] for row in rows.values())
  half = rows["decode", "decode", "50%"]
  assert half["kv_read"] == 0.5 and 1 < half["ideal_speedup"] < 2
  assert rows["operator", "forward", "50%"]["ideal_speedup"] == 2
  assert "KV heads read" in " ".join(capsys.readouterr().out.split())


def test_single_picks_read_nearly_every_group():
  sizes = cases.Sizes(8, 1024, 16, 4, 64, 0, "float32")
  plan = bench_moh.BenchConfig(heads=16, kv_heads=4).plan
  one_by_one = cases.read_fraction(sizes, plan(0.5))
  # A quarter is shared and always read; see `jaxheads.flops`.
  assert one_by_one == pytest.approx(
    flops.kv_read_fraction(plan(0.5), 16, 4), abs=0.01
  )
  together = bench_moh.BenchConfig(heads=16, kv_heads=4, group_size=4).plan
  assert cases.read_fraction(sizes, together(0.5)) == 0.5 < one_by_one


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--rounds", "0"], "`--rounds` must be at least 1, got 0."),
    (["--lengths", "0"], "`--lengths` must be positive, got 0."),
    (["--stride", "-1"], "`--stride` must not be negative, got -1."),
    (["--dtype", "int8"], "must be float32 or bfloat16, got 'int8'."),
    (["--heads", "6", "--kv-heads", "4"], "must divide the 6 heads, got 4."),
    (["--active", "1.5", "--lengths", "8"], "`active` must be in (0, 1]"),
  ],
)
def test_bad_flags_are_one_line(monkeypatch, capsys, flags, message):
  with pytest.raises(SystemExit) as error:
    run(monkeypatch, *flags)
  assert error.value.code == 2
  told = capsys.readouterr().err
  assert message in told and told.count("\n") == 1
