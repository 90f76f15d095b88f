import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

from tests.experiments.processes import one_device

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments/notebooks/moh_quickstart.ipynb"


def read_notebook():
  return nbformat.read(NOTEBOOK, as_version=4)


def first_code_cell():
  return next(c for c in read_notebook().cells if c.cell_type == "code").source


def test_is_committed_clean_and_valid():
  notebook = read_notebook()
  nbformat.validate(notebook)
  assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
  for cell in notebook.cells:
    assert cell.id
    if cell.cell_type == "code":
      assert cell.outputs == []
      assert cell.execution_count is None


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
  text = tmp_path / "text"
  text.mkdir()
  for name in ("ast", "dis", "enum", "heapq", "json/decoder"):
    source = pathlib.Path(os.__file__).parent / f"{name}.py"
    shutil.copy(source, text / f"{name.replace('/', '_')}.py")
  monkeypatch.setenv("QUICKSTART_STEPS", "2")
  monkeypatch.setenv("QUICKSTART_DATA", str(text))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  for name, value in one_device().items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
  monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
  notebook = read_notebook()
  nbclient.NotebookClient(
    notebook,
    timeout=300,
    kernel_name="python3",
    resources={"metadata": {"path": str(tmp_path)}},
  ).execute()

  outputs = [
    output for cell in notebook.cells for output in cell.get("outputs", [])
  ]
  figures = [o for o in outputs if "image/png" in o.get("data", {})]
  assert len(figures) == 2
  printed = "".join(o.text for o in outputs if o.output_type == "stream")
  (difference,) = re.findall(r"largest difference .*: (\S+)", printed)
  assert float(difference) < 1e-5
  losses = re.findall(r"^step +\d+  loss (\S+)", printed, re.M)
  assert float(losses[-1]) < 0.8 * float(losses[0])
  # 2 heads always on and 3 of 6 picked: the loads add up to the active heads.
  (loads,) = re.findall(r"^head load (.*)$", printed, re.M)
  assert sum(map(float, loads.split())) == pytest.approx(5, abs=0.05)


@pytest.fixture
def colab(monkeypatch):
  """A Colab runtime: installed versions, and what the cell does to it."""
  versions = {"jax": "0.7.2", "flax": "0.11.2"}
  calls = []

  def version(package):
    if package not in versions:
      raise importlib.metadata.PackageNotFoundError(package)
    return versions[package]

  monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab")
  monkeypatch.setattr(importlib.metadata, "version", version)
  monkeypatch.setattr(
    subprocess, "run", lambda command, check: calls.append(command)
  )
  monkeypatch.setattr(os, "kill", lambda pid, signal: calls.append("restart"))
  return versions, calls


@pytest.mark.parametrize(
  ("device", "requirement"),
  [
    ("/dev/accel0", "jax[tpu]>=0.11,<0.13"),
    ("/dev/vfio/0", "jax[tpu]>=0.11,<0.13"),
    ("nvidia-smi", "jax[cuda12]>=0.11,<0.13"),
    (None, "jax>=0.11,<0.13"),
  ],
)
def test_first_cell_upgrades_colab(colab, monkeypatch, device, requirement):
  _, calls = colab
  monkeypatch.setattr(
    "glob.glob",
    lambda pattern: [device] if device and device[:-1] in pattern else [],
  )
  monkeypatch.setattr(shutil, "which", lambda name: name == device or None)
  exec(first_code_cell(), {})
  (install, restart) = calls
  assert install[:4] == [sys.executable, "-m", "pip", "install"]
  assert install[-3:] == [requirement, "flax>=0.12.10", "/content/jaxheads"]
  assert restart == "restart"


@pytest.mark.parametrize(
  ("installed", "upgrades"),
  [
    ({"jax": "0.12.0.1", "flax": "0.12.12", "jaxheads": "0.1.0"}, False),
    ({"jax": "0.11.0", "flax": "0.12.10", "jaxheads": "0.1.0"}, False),
    ({"jax": "0.12.0.1", "flax": "0.12.9", "jaxheads": "0.1.0"}, True),
    ({"jax": "0.10.2", "flax": "0.12.12", "jaxheads": "0.1.0"}, True),
    ({"jax": "0.12.0.1", "flax": "0.12.12"}, True),
  ],
)
def test_first_cell_upgrades_only_what_is_too_old(colab, installed, upgrades):
  versions, calls = colab
  versions.clear()
  versions.update(installed)
  exec(first_code_cell(), {})
  assert bool(calls) == upgrades


def test_first_cell_does_nothing_elsewhere(colab, monkeypatch):
  _, calls = colab
  monkeypatch.delenv("COLAB_RELEASE_TAG")
  exec(first_code_cell(), {})
  assert calls == []
