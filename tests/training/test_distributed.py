"""Real processes over loopback: they train, die, resume, and disagree."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxheads.training import checkpoint, parse
from jaxheads.training.checkpoint import saved_steps
from jaxheads.training.metrics import read_metrics
from tests.experiments.processes import one_device
from tests.training import small

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 24
FLAGS = [
  *("--preset", "smoke", "--steps", str(STEPS), "--data", str(small.TEXT)),
  *("--evaluation.every", "8", "--evaluation.batches", "2"),
  *("--evaluation.sample-tokens", "2", "--checkpoint.every", "4"),
]
TIMEOUT_S = 240
# Less patient than users' processes are, where a test waits for the end of it.
_SCRIPT = """
import runpy, sys
from jaxheads.training import distributed
_, start_s, heartbeat_s, *sys.argv = sys.argv
distributed._START_S = int(start_s)
distributed._HEARTBEAT_S = int(heartbeat_s)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


class Job:
  """Processes that are started together."""

  def __init__(
    self,
    *flags,
    script="train_moh.py",
    count=2,
    ids=None,
    devices=1,
    own=None,
    folders=None,
    start_s=60,
    heartbeat_s=10,
  ):
    """`own` are flags of single processes, `folders` where they are started."""
    environment = os.environ | one_device() | {"PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] += (
      f" --xla_force_host_platform_device_count={devices}"
    )
    port = free_port()
    self._processes = {
      process: subprocess.Popen(
        [
          *(sys.executable, "-c", _SCRIPT, str(start_s), str(heartbeat_s)),
          *(str(ROOT / "experiments" / script), *flags),
          *(own or {}).get(process, ()),
          *("--coordinator", f"127.0.0.1:{port}"),
          *("--num-processes", str(count), "--process-id", str(process)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=(folders or {}).get(process),
      )
      for process in (range(count) if ids is None else ids)
    }

  def send(self, process: int, number: signal.Signals) -> None:
    self._processes[process].send_signal(number)

  def end(self) -> dict[int, tuple[int, str, str]]:
    """Status, output and errors of each process, once all have ended."""
    told = {}
    for process, running in self._processes.items():
      out, errors = running.communicate(timeout=TIMEOUT_S)
      told[process] = running.returncode, out, errors
    return told

  def wait_for(self, out: pathlib.Path, step: int) -> None:
    """Until that checkpoint is there."""
    deadline = time.monotonic() + TIMEOUT_S
    while step not in saved_steps(out / "checkpoints"):
      assert time.monotonic() < deadline, "no progress"
      if any(p.poll() is not None for p in self._processes.values()):
        pytest.fail(f"a process has ended: {self.end()}")
      time.sleep(0.002)

  def close(self) -> None:
    for running in self._processes.values():
      if running.poll() is None:
        running.kill()
        running.communicate()


@pytest.fixture(scope="module")
def start():
  jobs = []

  def start(*flags, **settings):
    jobs.append(Job(*flags, **settings))
    return jobs[-1]

  yield start
  for job in jobs:
    job.close()


def run_here(out, *, resume=False) -> list[dict]:
  """The records of the run in this process, on its eight devices."""
  _, folder = small.run(parse(FLAGS).config, out, resume=resume)
  return read_metrics(folder.metrics_file)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  return run_here(tmp_path_factory.mktemp("undisturbed") / "run")


def assert_same(records, expected):
  steps = [record["step"] for record in records]
  assert steps == [record["step"] for record in expected]
  for one, other in zip(
    small.untimed(records), small.untimed(expected), strict=True
  ):
    assert one.keys() == other.keys()
    for name, value in other.items():
      np.testing.assert_allclose(
        one[name], value, rtol=2e-5, err_msg=f"{name} at step {one['step']}"
      )


def assert_lost(told, victim: int) -> None:
  """All but the victim have ended, each with one line that names it."""
  for process, (code, _, errors) in told.items():
    if process == victim:
      assert code == -signal.SIGKILL
      continue
    assert code not in (0, None)
    assert errors.count("\n") == 1, errors
    assert f"error: process {victim} ended without a word" in errors
    assert "continue with `--resume`" in errors


def assert_checkpoints_whole(out: pathlib.Path) -> list[int]:
  steps = saved_steps(out / "checkpoints")
  for step in steps:
    checkpoint._check_files(out / "checkpoints" / str(step))
  return steps


@pytest.fixture(scope="module")
def jobs(start, tmp_path_factory):
  """What the quick tests look at, all started at once: they mostly wait."""
  folder = tmp_path_factory.mktemp("jobs")
  texts = {process: folder / f"host{process}" for process in (0, 1)}
  for process, path in texts.items():
    path.mkdir()
    (path / "text.txt").write_text(f"Host {process} reads this. " * 400)
  jobs = {
    "killed": start(*FLAGS, "--out", str(folder / "killed")),
    "missing": start(
      *FLAGS, "--out", str(folder / "missing"), count=3, ids=(1, 0), start_s=9
    ),
    "config": start(
      *(*FLAGS, "--out", str(folder / "config")),
      own={1: ["--optimizer.learning-rate", "0.5", "--seed", "7"]},
    ),
    "data": start(*FLAGS, "--data", "text.txt", "--out", "run", folders=texts),
  }
  jobs["killed"].wait_for(folder / "killed", 8)
  jobs["killed"].send(1, signal.SIGKILL)
  return folder, jobs


def test_a_missing_process_is_named(jobs):
  for code, _, errors in jobs[1]["missing"].end().values():
    assert code not in (0, None)
    assert errors.startswith("error: process 2 did not start within 9 s")
    assert errors.count("\n") == 1, errors


@pytest.mark.parametrize(
  ("name", "message"),
  [
    (
      "config",
      "`--seed` is 0 in process 0 and 7 in process 1; "
      "`--optimizer.learning-rate` is 0.003 in process 0 and 0.5 in process 1",
    ),
    (
      "data",
      r"the training text is 7,.* tokens .checksum \w+. in process 0 and 7,.* in "
      r"process 1; the validation text is .*; start all",
    ),
  ],
)
def test_processes_that_disagree_say_in_what(jobs, name, message):
  for code, _, errors in jobs[1][name].end().values():
    assert code == 2
    assert re.match(f"error: the processes disagree: {message}", errors), errors
    assert errors.count("\n") == 1, errors


def test_killed_and_resumed_with_another_number_of_processes(jobs, undisturbed):
  folder, started = jobs
  out = folder / "killed"
  told = started["killed"].end()
  assert_lost(told, victim=1)
  assert "mesh       data=1,fsdp=2" in told[0][1]
  assert f"step {STEPS}/{STEPS}" not in told[0][1]
  assert 8 in assert_checkpoints_whole(out)
  assert_same(run_here(out, resume=True), undisturbed)
