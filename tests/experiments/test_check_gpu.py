"""The script for GPUs, as far as it goes without one."""

import dataclasses

import numpy as np
import pytest

from experiments import check_gpu
from pallas_kernels import platform
from pallas_kernels.head_attention.contexts import Strided

SMALL = check_gpu.Case(
  name="small", rules=(Strided(local=1),) * 2, block=16, T=40, K=1, H=16
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_kernel_passes(dtype):
  with platform.interpreting():
    row = check_gpu.check(dataclasses.replace(SMALL, dtype=dtype), "triton")
  assert row["verdict"] == "ok", row
  assert set(row["errors"]) == set(check_gpu.NAMES)


@pytest.mark.exhaustive
@pytest.mark.parametrize("changed", check_gpu.NAMES)
@pytest.mark.parametrize("wrong_runs", [(1, 2), (2,), ()])
def test_wrong_numbers_and_other_bits_fail(monkeypatch, changed, wrong_runs):
  runs = []

  def run(case, arrays, implementation):
    values = {name: np.ones(3) for name in check_gpu.NAMES}
    if implementation != "reference":
      runs.append(implementation)
      values[changed] *= 1 + 1e-3 * (len(runs) in wrong_runs)
    return values

  monkeypatch.setattr(check_gpu, "run", run)
  row = check_gpu.check(SMALL, "triton")
  assert row["verdict"] == ("FAILED" if wrong_runs else "ok")
  assert row["is_deterministic"] == (wrong_runs != (2,))


def test_what_is_not_covered_is_said_and_no_failure():
  with platform.interpreting():
    row = check_gpu.check(SMALL, "mosaic_gpu")
  assert row["verdict"] == "not covered"
  assert "mosaic_gpu" in row["why"]


@pytest.mark.parametrize("name", ["last queries", "soft cap", "not causal"])
def test_dense_attention_of_the_script_is_the_reference(name):
  (case, _) = (case for case in check_gpu.cases() if case.name == name)
  case = dataclasses.replace(case, T=70, S=case.S and 90, H=16)
  arrays = check_gpu.make_arrays(case)
  one = check_gpu.dense(case, arrays)
  two = check_gpu.run(case, arrays, "reference")
  for key in check_gpu.NAMES:
    limit = 1e-5 * np.abs(two[key]).max()
    np.testing.assert_allclose(one[key], two[key], rtol=0, atol=limit)


def test_needs_a_gpu(monkeypatch, capsys):
  monkeypatch.setattr("sys.argv", ["check_gpu.py"])
  with pytest.raises(SystemExit) as stop:
    check_gpu.main()
  assert stop.value.code
  assert "needs a GPU" in capsys.readouterr().err
