"""Real processes over loopback: they train, die, resume, and disagree."""

import json
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
  *("--evaluation.sample-tokens", "0", "--checkpoint.every", "4"),
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
    variables=None,
    start_s=60,
    heartbeat_s=10,
  ):
    """Starts the script `count` times, or only those of `ids`.

    Args:
      own: Further flags of single processes.
      folders: Where single processes are started.
      variables: Of single processes, instead of flags that say who they are.
    """
    environment = os.environ | one_device() | {"PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] += (
      f" --xla_force_host_platform_device_count={devices}"
    )
    meet = ["--coordinator", f"127.0.0.1:{free_port()}"]
    meet += ["--num-processes", str(count), "--process-id"]
    self._processes = {
      process: subprocess.Popen(
        [
          *(sys.executable, "-c", _SCRIPT, str(start_s), str(heartbeat_s)),
          *(str(ROOT / "experiments" / script), *flags),
          *(own or {}).get(process, ()),
          *(() if variables else (*meet, str(process))),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | (variables or {}).get(process, {}),
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
    "undisturbed": start(
      *(*FLAGS, "--out", str(folder / "undisturbed"), "--mesh", "data=2")
    ),
    "missing": start(*FLAGS, "--out", str(folder / "x"), ids=[0], start_s=9),
    "data": start(*FLAGS, "--data", "text.txt", "--out", "run", folders=texts),
  }
  jobs["killed"].wait_for(folder / "killed", 8)
  jobs["killed"].send(1, signal.SIGKILL)
  return folder, jobs


def test_a_missing_process_is_named(jobs):
  (code, _, errors) = jobs[1]["missing"].end()[0]
  assert code not in (0, None)
  assert errors.startswith("error: process 1 did not start within 9 s")
  assert errors.count("\n") == 1, errors


def assert_disagreement(job: Job, pattern: str) -> None:
  for code, _, errors in job.end().values():
    assert code == 2
    assert errors.count("\n") == 1, errors
    assert re.match(f"error: the processes disagree: {pattern}", errors), errors


def test_texts_that_differ_are_named(jobs):
  pattern = (
    r"the training text is \d,\d+ tokens .checksum \w+. in process 0 and "
    r"\d,\d+ tokens .checksum \w+. in process 1; the validation text is .*; "
    "start all of them with the same flags, files and versions"
  )
  assert_disagreement(jobs[1]["data"], pattern)


def test_only_process_0_writes_and_prints(jobs):
  folder, started = jobs
  (code, out, errors), (other_code, other_out, other_errors) = (
    started["undisturbed"].end().values()
  )
  assert (code, other_code) == (0, 0)
  assert (errors, other_errors) == ("", "")
  assert f"step {STEPS}/{STEPS}" in out
  assert "done in" in out
  # A library of JAX's writes a line itself.
  assert not re.sub(r"\[Gloo\].*\n", "", other_out)
  for name in ("summary.json", "figures/loss.png", "figures/head_load.png"):
    assert (folder / "undisturbed" / name).stat().st_size
  [_] = (folder / "undisturbed/tensorboard").iterdir()
  assert_checkpoints_whole(folder / "undisturbed")


def test_killed_and_resumed_with_another_number_of_processes(jobs):
  folder, started = jobs
  out = folder / "killed"
  told = started["killed"].end()
  assert_lost(told, victim=1)
  assert "mesh       data=1,fsdp=2" in told[0][1]
  assert f"step {STEPS}/{STEPS}" not in told[0][1]
  assert 8 in assert_checkpoints_whole(out)
  resumed = run_here(out, resume=True)
  assert_same(resumed, read_metrics(folder / "undisturbed"))


# The long ones.


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("count", "devices", "mesh", "victim", "then"),
  [
    (2, 1, "data=2", 0, 4),
    (2, 1, "context=2", 1, 1),
    (2, 1, "heads=2", 0, 1),
    (2, 2, "data=2,fsdp=2", 1, 4),
    (2, 2, "fsdp=2,heads=2", 0, 1),
    (4, 1, "fsdp=4", 3, 2),
    (4, 1, "data=2,context=2", 0, 2),
    (4, 1, "context=2,heads=2", 2, 1),
  ],
)
def test_any_mesh_any_victim_any_number_of_processes_after(
  start, undisturbed, tmp_path, count, devices, mesh, victim, then
):
  out = tmp_path / "run"
  flags = [*FLAGS, "--out", str(out), "--mesh", mesh]
  job = start(*flags, count=count, devices=devices)
  job.wait_for(out, 8)
  job.send(victim, signal.SIGKILL)
  assert_lost(job.end(), victim)
  last = assert_checkpoints_whole(out)[-1]
  resumed = start("--resume", str(out), count=then).end()
  for code, _, errors in resumed.values():
    assert (code, errors) == (0, "")
  assert f"continuing after step {last}" in resumed[0][1]
  assert_same(read_metrics(out), undisturbed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
  return run_here(tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.exhaustive
@pytest.mark.parametrize("victim", [0, 1])
def test_as_patient_as_users_processes_are(start, tmp_path, victim):
  out = tmp_path / "run"
  job = start(
    *(*FLAGS, "--out", str(out), "--steps", "10000"), start_s=40, heartbeat_s=20
  )
  job.wait_for(out, 8)
  job.send(victim, signal.SIGKILL)
  assert_lost(job.end(), victim)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ((0, 2), "process 1 did not start within 40 s"),
    ((0,), "processes 1 and 2 did not start within 40 s"),
    ((1,), "process 0 did not answer at 127.0.0.1:\\d+ within 40 s"),
  ],
)
def test_who_is_missing_is_told_in_one_line(start, tmp_path, ids, message):
  job = start(*FLAGS, "--out", str(tmp_path), count=3, ids=ids, start_s=40)
  for code, _, errors in job.end().values():
    assert code not in (0, None)
    assert re.match(f"error: {message}", errors), errors
    assert errors.count("\n") == 1, errors


@pytest.mark.exhaustive
def test_flags_that_differ_are_named(start, tmp_path):
  job = start(
    *(*FLAGS, "--out", str(tmp_path / "run")),
    own={1: ["--optimizer.learning-rate", "0.5", "--seed", "7"]},
  )
  pattern = (
    "`--seed` is 0 in process 0 and 7 in process 1; `--optimizer.learning-rate`"
    " is 0.003 in process 0 and 0.5 in process 1; start all"
  )
  assert_disagreement(job, pattern)
  assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_stops_all_politely(start, undisturbed, tmp_path, asked):
  out = tmp_path / "run"
  job = start(*FLAGS, "--out", str(out))
  job.wait_for(out, 8)
  job.send(asked, signal.SIGTERM)
  told = job.end()
  for code, _, errors in told.values():
    assert (code, errors) == (0, "")
  assert f"continue with --resume {out}" in told[0][1]
  [last] = re.findall(r"SIGTERM: saved at step (\d+)", told[0][1])
  assert saved_steps(out / "checkpoints")[-1] == int(last)
  for code, _, errors in start("--resume", str(out)).end().values():
    assert (code, errors) == (0, "")
  assert_same(read_metrics(out), undisturbed)


@pytest.mark.exhaustive
def test_a_damaged_checkpoint_is_set_aside_by_one(start, undisturbed, tmp_path):
  out = tmp_path / "run"
  started = start(*FLAGS, "--out", str(out), "--steps", "16").end()
  assert started[0][0] == 0, started
  bad = out / "checkpoints/16"
  file = max(bad.rglob("*"), key=lambda path: path.stat().st_size)
  file.write_bytes(b"x" * file.stat().st_size)
  resumed = start("--resume", str(out), "--steps", str(STEPS)).end()
  for code, _, errors in resumed.values():
    assert (code, errors) == (0, "")
  assert "checkpoint 16 cannot be used" in resumed[0][1]
  assert (out / "damaged/16").is_dir()
  assert assert_checkpoints_whole(out)


@pytest.mark.exhaustive
def test_a_defect_in_one_process_ends_all(start, tmp_path):
  broken = tmp_path / "broken.py"
  broken.write_text(
    "import jax\n"
    "from jaxheads.training import distributed, parse\n"
    "with distributed.joined(parse().processes):\n"
    "  if jax.process_index() == 1: 1 / 0\n"
    "  distributed.everyone(None)\n"
  )
  told = start(script=broken).end()
  assert told[1][0] == told[0][0] == 1
  assert "ZeroDivisionError" in told[1][2]
  assert told[0][2] == (
    "error: process 1 stopped: ZeroDivisionError: division by zero\n"
  )


@pytest.mark.exhaustive
def test_slurm_says_who_takes_part(start, tmp_path):
  """What `srun` sets; no flags."""
  port = free_port()
  variables = {
    process: {
      "SLURM_JOB_ID": "123456",
      "SLURM_STEP_NODELIST": "localhost",
      "SLURM_NTASKS": "2",
      "SLURM_PROCID": str(process),
      "SLURM_LOCALID": str(process),
      "JAX_COORDINATOR_PORT": str(port),
    }
    for process in (0, 1)
  }
  flags = [*FLAGS, "--out", str(tmp_path / "run"), "--steps", "2"]
  told = start(*flags, variables=variables).end()
  for code, _, errors in told.values():
    assert (code, errors) == (0, "")
  assert "devices    2 x cpu in 2 processes" in told[0][1]


@pytest.mark.exhaustive
def test_needles_are_found_alike(start, tmp_path):
  results = []
  for count in (1, 2):
    out = tmp_path / str(count)
    told = start(
      *("--preset", "smoke", "--out", str(out)),
      *("--model.implementation", "reference"),
      script="needle.py",
      count=count,
      devices=2 // count,
    ).end()
    for code, _, errors in told.values():
      assert (code, errors) == (0, "")
    results.append(json.loads((out / "needle.json").read_text())["models"])
    results.append(read_metrics(out / "s2"))
  assert_same(results[3], results[1])
  for name, model in results[0].items():
    assert results[2][name]["exact"] == model["exact"]
