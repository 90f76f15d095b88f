"""The script for GPUs, as far as it goes without one."""

import dataclasses
import time

import numpy as np
import pytest

from experiments import _gpu_cases, check_gpu
from pallas_kernels import platform
from pallas_kernels.head_attention.contexts import Strided

HEADS = _gpu_cases.HeadCase(
  name="small", rules=(Strided(local=1),) * 2, block=16, T=40, K=1, H=16
)
ROUTED = _gpu_cases.RoutedCase(
  name="small",
  rules=(Strided(local=1),) * 2,
  active=(1.0, 0.3),
  block=16,
  T=40,
  K=1,
  H=16,
  block_rows=16,
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  "case",
  [HEADS, pytest.param(ROUTED, marks=pytest.mark.exhaustive)],
  ids=["head", "routed"],
)
def test_a_right_kernel_passes(case, dtype):
  with platform.interpreting():
    row = check_gpu.check(dataclasses.replace(case, dtype=dtype), "triton")
  assert row["verdict"] == "ok", row
  assert set(row["errors"]) == {"out", "dq", "dk", "dv"} | (
    {"lse"} if case is HEADS else set()
  )


@pytest.mark.exhaustive
@pytest.mark.parametrize("changed", ["out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("wrong_runs", [(1, 2), (2,), ()])
def test_wrong_numbers_and_other_bits_fail(monkeypatch, changed, wrong_runs):
  runs = []

  def run(case, arrays, implementation):
    values = {name: np.ones(3) for name in check_gpu.LIMITS}
    if implementation != "reference":
      runs.append(implementation)
      values[changed] *= 1 + 1e-3 * (len(runs) in wrong_runs)
    return values

  monkeypatch.setattr(_gpu_cases.HeadCase, "run", run)
  row = check_gpu.check(HEADS, "triton")
  assert row["verdict"] == ("FAILED" if wrong_runs else "ok")
  assert row["is_deterministic"] == (wrong_runs != (2,))


def test_what_is_not_covered_is_said_and_no_failure():
  with platform.interpreting():
    row = check_gpu.check(HEADS, "mosaic_gpu")
  assert row["verdict"] == "not covered"
  assert "mosaic_gpu" in row["why"]


@pytest.mark.parametrize(
  ("cases", "name"),
  [
    (_gpu_cases.head_cases, "last queries"),
    (_gpu_cases.head_cases, "soft cap"),
    (_gpu_cases.head_cases, "not causal"),
    (_gpu_cases.routed_cases, "last queries"),
    (_gpu_cases.routed_cases, "not causal in a block"),
  ],
)
def test_dense_attention_of_the_script_is_the_reference(cases, name):
  (case, _) = (case for case in cases() if case.name == name)
  case = dataclasses.replace(case, T=70, S=case.S and 90, H=16)
  if getattr(case, "offset", 0):
    case = dataclasses.replace(case, offset=20)
  arrays = case.arrays()
  one, two = case.dense(arrays), case.run(arrays, "reference")
  assert one.keys() == two.keys()
  for key in two:
    limit = 1e-5 * np.abs(two[key]).max()
    np.testing.assert_allclose(one[key], two[key], rtol=0, atol=limit)


@pytest.mark.exhaustive
def test_routed_heads_are_timed_beside_all_heads():
  config = check_gpu.CheckConfig(length=32, rounds=1)
  with platform.interpreting():
    rows = check_gpu.time_routed(config, time.monotonic() + 3600)
  assert {(row["operation"], row["active_heads"]) for row in rows} == {
    ("head_attention", 16),
    *(("routed_attention", active) for active in (4, 8, 12, 16)),
  }
  assert all(row["median_ms"] > 0 for row in rows)


def test_needs_a_gpu(monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["check_gpu.py"])
  with pytest.raises(SystemExit) as stop:
    check_gpu.main()
  assert stop.value.code
  assert "needs a GPU" in capsys.readouterr().err
