"""The S2 script as a person runs it; the trainer is `test_train_moh`'s."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.experiments.processes import one_device
from tests.training import small

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def test_smoke_run_with_its_dense_baseline(tmp_path):
  out = tmp_path / "run"
  finished = subprocess.run(
    [
      *(sys.executable, str(ROOT / "experiments/train_s2.py")),
      *("--preset", "smoke-s2", "--steps", "4", "--baseline"),
      *("--evaluation.sample-tokens", "0", "--data", str(small.TEXT)),
      *("--model.implementation", "reference", "--out", str(out)),
    ],
    capture_output=True,
    text=True,
    timeout=300,
    env=os.environ | one_device() | {"PYTHONPATH": str(ROOT)},
  )
  assert finished.returncode == 0, finished.stderr
  summary = json.loads((out / "summary.json").read_text())
  dense = json.loads((out / "baseline" / "summary.json").read_text())
  assert (summary["label"], dense["label"]) == ("S2 hybrid", "dense")
  assert summary["num_params"] == dense["num_params"]
  assert summary["flops_per_token"] < dense["flops_per_token"]
  table = finished.stdout[finished.stdout.index("validation at the last") :]
  assert f"{100 * summary['visible_keys_fraction']:.1f} %" in table
  assert str(out / "figures" / "contexts.png") in finished.stdout
  assert (out / "figures" / "contexts.png").stat().st_size > 1000
