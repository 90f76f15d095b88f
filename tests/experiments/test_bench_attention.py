"""`experiments/bench_attention.py` at sizes that take a moment."""

import json
import sys

import pytest

from experiments import _attention_cases as attention_cases
from experiments import _timing as timing
from experiments import bench_attention
from experiments._attention_cases import Problem


def run(monkeypatch, *flags):
  monkeypatch.setattr(sys, "argv", ["bench_attention.py", *flags])
  bench_attention.main()


@pytest.mark.slow
def test_writes_figures_and_a_drawing(tmp_path, monkeypatch, capsys):
  figures, drawing = tmp_path / "out" / "a.json", tmp_path / "b.png"
  run(
    monkeypatch,
    *("--lengths", "64", "128", "--strides", "2", "--local-blocks", "2"),
    *("--block-size", "8", "--heads", "2", "--head-dim", "8", "--rounds", "2"),
    *("--break-even-length", "64", "--dense-limit-gib", "0.0003"),
    *("--json", str(figures), "--png", str(drawing)),
  )
  written = json.loads(figures.read_text())
  rows = {
    (row["length"], row["direction"], row["variant"]): row
    for row in written["rows"]
  }
  assert len(rows) == 2 * 2 * 4
  # 16 bytes a logit: 64 x 64 of them a head are within the limit, four times
  # that is not.
  assert rows[64, "forward", "dense, jax.nn"]["median_ms"] > 0
  absent = rows[128, "forward", "dense, jax.nn"]["absent"]
  assert "--dense-limit-gib" in absent
  assert absent in " ".join(capsys.readouterr().out.split())
  mine = rows[128, "forward+backward", "ours, V=2"]
  assert mine["best_dense"] == "ours, V=1"
  assert mine["of_ceiling"] == pytest.approx(mine["speedup"] * mine["density"])
  assert {row["stride"] for row in written["doubled"]} == {1, 2}
  densities = [row["density"] for row in written["break_even"]]
  assert densities[0] == 1 and min(densities) < 1
  assert drawing.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--block-size", "12"], "`--block-size` must be a power of two, got 12."),
    (["--lengths", "100"], "multiple of the block size 64, got 100."),
    (["--strides", "1"], "`--strides` must be at least 2"),
    (["--heads", "6", "--kv-heads", "4"], "must divide the 6 heads, got 4."),
    (["--rounds", "0"], "`--rounds` must be at least 1, got 0."),
    (["--dtype", "int8"], "must be float32 or bfloat16, got 'int8'."),
  ],
)
def test_bad_flags_are_one_line(monkeypatch, capsys, flags, message):
  with pytest.raises(SystemExit) as stop:
    run(monkeypatch, *flags)
  assert stop.value.code == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_visible_pairs_count_the_tokens_that_the_mask_shows():
  problem = Problem.make(
    batch=1,
    length=64,
    heads=3,
    kv_heads=3,
    head_dim=8,
    dtype="float32",
    block_size=4,
    local_blocks=2,
  )
  for stride in (1, 3, 5):
    pattern = problem.pattern(stride)
    tokens = sum(
      rule.keep(i // 4, j // 4)
      for rule in pattern.rules
      for i in range(64)
      for j in range(i + 1)
    )
    assert problem.visible_pairs(stride) == tokens


def test_a_baseline_that_fails_is_reported_not_raised():
  def exhausted():
    raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte")

  def broken():
    raise RuntimeError("no such kernel\nand much more")

  times, reasons = timing.interleave(
    {"a": exhausted, "b": broken, "c": lambda: None}, 2
  )
  assert reasons == {"a": "out of memory", "b": "failed: no such kernel"}
  assert len(times["c"]) == 2


def test_flex_attention_says_when_torch_is_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "torch", None)
  problem = Problem.make(
    batch=1,
    length=16,
    heads=1,
    kv_heads=1,
    head_dim=8,
    dtype="float32",
    block_size=4,
    local_blocks=2,
  )
  with pytest.raises(timing.Unavailable, match="not installed"):
    attention_cases.flex(problem, 2)
