"""The script as a person runs it: in a process of its own."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from jaxheads.training.checkpoint import saved_steps
from jaxheads.training.metrics import read_metrics
from tests.experiments.processes import one_device
from tests.training import small

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
# One device: the promise is bit for bit there, and starting is quicker.
ENVIRONMENT = (
  os.environ | one_device() | {"PYTHONPATH": str(ROOT), "COLUMNS": "60"}
)
STEPS = 60
TIMEOUT_S = 240
# For a night: JAXHEADS_KILLS=100 python -m pytest tests/experiments
KILLS = int(os.environ.get("JAXHEADS_KILLS", "1"))


# A process that has loaded JAX must not fork to set a limit in its child.
_LIMIT_FILES = """
import os, resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def start(*flags, limit=None) -> subprocess.Popen:
  limiter = ["-c", _LIMIT_FILES, str(limit)] if limit else []
  script = str(ROOT / "experiments/train_moh.py")
  return subprocess.Popen(
    [sys.executable, *limiter, script, *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=ENVIRONMENT,
  )


def finish(process) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=TIMEOUT_S)
  return process.returncode, out, err


class Progress:
  """Watches how many records a run has written since it was started."""

  def __init__(self, metrics: pathlib.Path) -> None:
    self._metrics = metrics
    self._before = self._inode()

  def _inode(self) -> int | None:
    return self._metrics.stat().st_ino if self._metrics.exists() else None

  def wait(self, process, records: int) -> None:
    """Until there are that many, or the run has ended."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None:
      assert time.monotonic() < deadline, "no progress"
      # A resumed run first puts a shortened file in the place of the old.
      if self._inode() != self._before:
        if self._first is None:
          self._first = self._count()
        if self._count() - self._first >= records:
          return
      time.sleep(0.002)

  _first: int | None = None

  def _count(self) -> int:
    return self._metrics.read_bytes().count(b"\n")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
  """A run of a few seconds; programs compiled once serve all processes."""
  cache = tmp_path_factory.mktemp("cache")
  return [
    *("--preset", "smoke", "--steps", str(STEPS)),
    *("--evaluation.every", "20", "--evaluation.sample-tokens", "0"),
    *("--data", str(small.TEXT), "--compile-cache", str(cache)),
  ]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
  """An uninterrupted run with its baseline: folder and output."""
  out = tmp_path_factory.mktemp("finished") / "run"
  code, text, errors = finish(start(*flags, "--out", str(out), "--baseline"))
  assert code == 0, errors
  return out, text, errors


def test_what_it_prints(finished):
  out, text, errors = finished
  assert errors == ""
  for words in (
    "devices    1 x cpu",
    "75.0 % of heads active",
    "FLOPs/token, 3.3 % less than plain attention; decoding after 32 tokens",
    "execution  dense, because below 256 queries",
    f"step {STEPS}/{STEPS}",
    "bits/byte",
    "tokens/s",
    str(out / "figures" / "loss.png"),
    str(out / "checkpoints"),
  ):
    assert words in text, words


def test_the_baseline_is_matched_and_compared(finished):
  out, text, _ = finished
  summary = json.loads((out / "summary.json").read_text())
  dense = json.loads((out / "baseline" / "summary.json").read_text())
  assert summary["active_heads_fraction"] == 0.75
  assert dense["active_heads_fraction"] == 1.0
  assert dense["flops_per_token"] > summary["flops_per_token"]
  assert dense["steps"] == summary["steps"] == STEPS
  table = text[text.index("validation at the last step") :]
  assert "MoH 75 %" in table
  assert "dense" in table
  for one in (summary, dense):
    assert f"{one['validation_loss']:.4f}" in table
    assert f"{one['validation_bits_per_byte']:.4f}" in table


def test_kill_and_resume_equal_the_uninterrupted_run(finished, flags, tmp_path):
  """Killed at random, stopped politely (twice at once), then left to end."""
  out = tmp_path / "run"
  resume = ["--resume", str(out), *flags[-2:]]
  rng = random.Random(0)
  progress = Progress(out / "metrics.jsonl")
  process = start(*flags, "--out", str(out))
  for kill in range(KILLS):
    progress.wait(process, rng.randrange(0, 3 if kill else STEPS - 20))
    time.sleep(rng.random() / 20)
    process.kill()
    finish(process)
    progress = Progress(out / "metrics.jsonl")
    process = start(*resume)
  progress.wait(process, 2)
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGTERM)
  code, text, errors = finish(process)
  assert code == 0, errors
  assert errors == ""
  if "done in" not in text:  # It may have been at its end already.
    assert f"continue with --resume {out}" in text
    stopped = saved_steps(out / "checkpoints")[-1]
    assert f"SIGTERM: saved at step {stopped}" in text
    code, text, errors = finish(start(*resume))
    assert code == 0, errors
    assert f"continuing after step {stopped}" in text
  expected = small.untimed(read_metrics(finished[0]))
  assert small.untimed(read_metrics(out)) == expected


def test_a_disk_that_takes_no_more(finished, flags):
  """The system refuses large files; what was saved stays."""
  out, _, _ = finished
  before = saved_steps(out / "checkpoints")
  code, _, errors = finish(
    start(
      *("--resume", str(out), "--steps", str(STEPS + 10), "--no-baseline"),
      limit=40_000,
    )
  )
  assert code == 2
  assert errors.count("\n") == 1, errors
  assert "the file size limit is reached; earlier checkpoints" in errors
  names = {path.name for path in (out / "checkpoints").iterdir()}
  assert names == {str(step) for step in before}


def test_mistakes_are_one_line(tmp_path):
  (tmp_path / "run.yaml").write_text("stpes: 3\n")
  code, text, errors = finish(
    start("--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "x"))
  )
  assert code == 2
  assert text == ""
  assert errors.startswith("error: ")
  assert errors.count("\n") == 1
  assert "unknown key `stpes`, did you mean `steps`" in errors
  assert not (tmp_path / "x").exists()
