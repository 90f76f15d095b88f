"""Who takes part in a job, and what a person reads when one does not."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxheads.errors import UserError
from jaxheads.sharding import MeshShape, make_mesh
from jaxheads.training import devices, distributed, lost_hosts, run_folder
from jaxheads.training.distributed import Processes

AT = "host0:1234"
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
  for name in (*VARIABLES, "SLURM_JOB_ID"):
    monkeypatch.delenv(name, raising=False)


@pytest.fixture
def met(monkeypatch):
  """What `jax.distributed.initialize` was asked for; it does nothing."""
  asked = {}

  def initialize(coordinator, count, index, local_device_ids, **_):
    asked.update(coordinator=coordinator, count=count, index=index)
    asked.update(local_device_ids=local_device_ids)

  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  monkeypatch.setattr(lost_hosts, "filter_stderr", lambda **_: None)
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  return asked


def test_one_process_meets_nobody(met):
  for processes in (
    Processes(),
    Processes(num_processes=1),
    Processes(coordinator=AT, num_processes=1, process_id=0),
  ):
    with distributed.joined(processes):
      assert distributed.num_processes() == 1
  assert not met
  assert distributed.everyone({"a": 1}) == [{"a": 1}]
  assert distributed.from_first(lambda: 3) == 3
  distributed.agree({"x": 1})


def test_flags_win_over_variables(met, monkeypatch):
  for name, value in zip(VARIABLES, ("other:1", "4", "3"), strict=True):
    monkeypatch.setenv(name, value)
  distributed.initialise(Processes(process_id=2))
  assert met["coordinator"] == "other:1"
  assert (met["count"], met["index"]) == (4, 2)
  assert met["local_device_ids"] is None


def slurm(monkeypatch, count):
  for name, value in {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_NTASKS": str(count),
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "JAX_COORDINATOR_PORT": "99",
  }.items():
    monkeypatch.setenv(name, value)


def test_slurm_says_the_rest(met, monkeypatch):
  slurm(monkeypatch, 8)
  distributed.initialise(Processes())
  assert met == {
    "coordinator": "node007:99",
    "count": 8,
    "index": 5,
    "local_device_ids": [1],
  }


def test_one_task_of_slurm_keeps_all_its_devices(met, monkeypatch):
  slurm(monkeypatch, 1)
  distributed.initialise(Processes())
  assert not met


def test_a_scheduler_that_cannot_be_read_is_told(met, monkeypatch, caplog):
  slurm(monkeypatch, "all")
  distributed.initialise(Processes())
  assert not met
  assert "cannot be read (invalid literal for int() with base 10: 'all'" in (
    caplog.text
  )


def test_a_folder_that_is_not_shared(monkeypatch, tmp_path):
  monkeypatch.setattr(run_folder, "_SHARED_WITHIN_S", 0.0)
  with pytest.raises(
    UserError, match="not on storage that all processes share"
  ):
    run_folder.RunFolder(tmp_path).check_shared()


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ({"process_id": 1}, "`--coordinator` is missing: several processes need"),
    ({"coordinator": AT, "process_id": 0}, "`--num-processes` is missing"),
    ({"coordinator": AT, "num_processes": 2}, "`--process-id` is missing"),
    (
      {"coordinator": AT, "num_processes": 2, "process_id": 2},
      r"`--process-id` must be in .0, 2. with 2 processes, got 2",
    ),
    (
      {"coordinator": AT, "num_processes": 0, "process_id": 0},
      "`--num-processes` must be at least 1, got 0",
    ),
    (
      {"coordinator": "host0", "num_processes": 2, "process_id": 0},
      "`--coordinator` must be HOST:PORT of process 0, got 'host0'",
    ),
  ],
)
def test_settings_that_make_no_sense(met, flags, message):
  with pytest.raises(UserError, match=message):
    distributed.initialise(Processes(**flags))
  assert not met


def test_a_variable_that_is_no_number(monkeypatch):
  monkeypatch.setenv("JAX_PROCESS_ID", "one")
  with pytest.raises(UserError, match="JAX_PROCESS_ID must be a whole number"):
    distributed.initialise(Processes())


def test_what_differs_is_named_with_the_first_process_that_differs(monkeypatch):
  reports = [{"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {"a": "1", "c": "3"}]
  monkeypatch.setattr(distributed, "everyone", lambda mine: reports)
  with pytest.raises(
    UserError,
    match="disagree: b is 2 in process 0 and missing in process 2; c is "
    "missing in process 0 and 3 in process 2; start all",
  ):
    distributed.agree({})


def test_flags_are_named_as_typed():
  values = {"seed": 1, "optimizer": {"learning_rate": 2.0}, "model": {"s2": {}}}
  assert distributed.as_flags(values) == {
    "`--seed`": 1,
    "`--optimizer.learning-rate`": 2.0,
  }


def test_fingerprints_differ_where_texts_do():
  tokens = np.arange(5000, dtype=np.uint16)
  other = tokens.copy()
  other[3] += 1
  assert distributed.fingerprint(tokens) == distributed.fingerprint(tokens + 0)
  assert distributed.fingerprint(tokens) != distributed.fingerprint(other)
  assert distributed.fingerprint(tokens).startswith("5,000 tokens (checksum ")


# What JAX prints.

GONE = (
  "F1123 03:23:50.934201   10752 client.h:80] Terminating process because the "
  "JAX distributed service detected fatal errors. This most likely indicates "
  "that another task died. absl::Status: UNAVAILABLE: The following tasks are "
  "unhealthy (stopped sending heartbeats):\n"
  "{ids}"
  "The tasks have crashed. Check the task logs for an earlier error.\n\n"
  "RPC: /xla.coordination.CoordinationService/PollForError\n"
  "*** Check failure stack trace: ***\n"
  "    @     0x7f2d27420634  absl::log_internal::LogMessage::SendToLog()\n"
)


def filtered(text: str) -> str:
  """What comes out of a process whose last words on descriptor 2 these are."""
  program = (
    "import os, sys\n"
    f"sys.path.insert(0, {os.path.dirname(lost_hosts.__file__)!r})\n"
    "import lost_hosts\n"
    "lost_hosts.filter_stderr(process_id=2, coordinator='h:1', patience_s=40)\n"
    "os.write(2, sys.stdin.buffer.read())\n"
    "os.abort()\n"
  )
  done = subprocess.run(
    [sys.executable, "-S", "-c", program],
    input=text.encode(),
    capture_output=True,
    check=False,
  )
  assert done.returncode < 0
  return done.stderr.decode()


def test_a_stack_trace_becomes_a_line_and_the_rest_goes_through():
  text = (
    "a library writes\n"
    "E1123 03:23:50.933327   10735 coordination_service.cc:1549] told to all\n"
    "W1123 03:23:50.933327   10735 compiler.cc:1] slow\n"
    + GONE.format(ids="1\n")
  )
  assert filtered(text) == (
    "a library writes\n"
    "W1123 03:23:50.933327   10735 compiler.cc:1] slow\n"
    "error: process 1 ended without a word; what is saved is intact: continue "
    "with `--resume`\n"
  )


def test_a_process_that_tells_its_end_is_not_told_twice():
  text = lost_hosts._LEAVING + GONE.format(ids="1\n")
  assert filtered(text) == ""


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (GONE.format(ids="1\n3\n12\n"), "processes 1, 3 and 12 ended without a"),
    (
      "UNAVAILABLE: Failed to send RPC to coordination service. Either",
      "process 0 ended without a word; what is saved is intact",
    ),
    (
      "# of tasks that reached the barrier: 2/4.\nThe first task at the "
      "barrier: 0. Some timed out task names:\n2\n3\n\n\nRPC: /RegisterTask",
      "processes 2 and 3 did not start within 40 s",
    ),
    (
      "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /x/RegisterTask",
      "process 0 did not answer at h:1 within 40 s",
    ),
    (
      "ALREADY_EXISTS: Aborted connect attempt as there is a request from a "
      "newer incarnation.",
      "process 5 was started twice",
    ),
    (
      "fatal errors. absl::Status: INTERNAL: never seen\n before",
      "the processes lost each other (INTERNAL: never seen before); what is",
    ),
  ],
)
def test_last_words_in_other_words(text, message):
  told = lost_hosts.explain(
    text, process_id=5, coordinator="h:1", patience_s=40
  )
  assert told.startswith(message)


# Rows.


class Device:
  """Of some process of the job."""

  def __init__(self, process_index: int) -> None:
    self.process_index = process_index


@pytest.fixture
def rows(monkeypatch):
  """(process of each device, axes) to the rows of each process, of eight."""

  def rows(process_of, **axes):
    mesh = make_mesh(MeshShape(**axes), jax.devices()[: len(process_of)])

    class Placed:
      def __init__(self, mesh, spec):
        self._real = NamedSharding(mesh, spec)

      def devices_indices_map(self, shape):
        real = self._real.devices_indices_map(shape)
        return {Device(process_of[d.id]): index for d, index in real.items()}

    monkeypatch.setattr(devices, "NamedSharding", Placed)
    devices._rows_by_process.cache_clear()
    found = []
    for process in range(max(process_of) + 1):
      monkeypatch.setattr(jax, "process_index", lambda process=process: process)
      found.append(
        tuple(
          devices.rows_of_process(mesh, 8, shared=shared)
          for shared in (True, False)
        )
      )
    devices._rows_by_process.cache_clear()
    return found

  return rows


ALL = tuple(range(8))


def test_processes_with_sequences_of_their_own(rows):
  own = [((0, 1, 2, 3),) * 2, ((4, 5, 6, 7),) * 2]
  assert rows([0, 0, 1, 1], fsdp=4) == own
  assert rows([0, 0, 1, 1], data=2, heads=2) == own
  assert rows([0, 1, 1, 0], data=2, fsdp=2) == [
    ((0, 1, 6, 7),) * 2,
    ((2, 3, 4, 5),) * 2,
  ]


def test_processes_that_share_sequences_read_the_same_rows(rows):
  assert rows([0, 1], heads=2) == [(ALL, ALL), (ALL, ())]
  assert rows([0, 1, 0, 1], data=2, context=2) == [(ALL, ALL), (ALL, ())]
  assert rows([0, 0, 0, 1, 1, 1, 2, 2], data=2, fsdp=2, heads=2) == [
    ((0, 1, 2, 3), (0, 1, 2, 3)),
    ((2, 3, 4, 5), (4, 5)),
    ((6, 7), (6, 7)),
  ]
