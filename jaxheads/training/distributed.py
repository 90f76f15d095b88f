"""Several processes as one job: they meet, agree, and end together.

JAX does the work (`jax.distributed`): its coordination service, in process 0,
lets processes find each other and notices who is gone. What is here says who
takes part, compares what every process was given, and sees to it that all of
them end when one does, each with one line that says why.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed
from jaxlib import _jax

from jaxheads.errors import UserError
from jaxheads.training import lost_hosts

_T = TypeVar("_T")

# A missing process is told within a minute, a lost one too.
_START_S = 40
_HEARTBEAT_S = 20
# Reading a text or drawing figures may take one process long; the heartbeats
# tell who is gone meanwhile.
_PATIENCE_S = 6 * 3600
_LOOK_EVERY_S = 1.0
# So long, others that fail for the same reason may say so themselves.
_GRACE_S = 3.0
_LEAVE_S = 10

_LOGGER = logging.getLogger("jaxheads")
_STATE = distributed.global_state
_ROUND, _STOPPED = "jaxheads/round/", "jaxheads/stopped/"
_FIELDS = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}
_rounds = itertools.count()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
  """Which process of the job this is.

  Slurm, Open MPI, Cloud TPU and GKE say so themselves.
  """

  coordinator: str | None = None
  """HOST:PORT of process 0, if there are several (or
  JAX_COORDINATOR_ADDRESS)."""
  num_processes: int | None = None
  """Processes of the job (or JAX_NUM_PROCESSES)."""
  process_id: int | None = None
  """Which of them this is, from 0 (or JAX_PROCESS_ID)."""


def initialise(processes: Processes) -> None:
  """Meets the other processes of the job; returns at once if there are none.

  The flags win over JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
  JAX_PROCESS_ID, these over what JAX finds out by itself (Slurm, Open MPI,
  Cloud TPU, GKE). For scripts, before anything asks JAX for devices. A process
  that is missing, or lost later, ends this one with a line on standard error.

  Raises:
    UserError: Some of the settings are missing or make no sense.
  """
  processes = _with_environment(processes)
  local_device_ids: Any = None
  if None in dataclasses.astuple(processes):
    processes, local_device_ids = _completed(processes)
  _check(processes)
  if processes.num_processes in (None, 1):
    return
  coordinator, num_processes, process_id = dataclasses.astuple(processes)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # The training loop has signal handlers of its own.
  jax.config.update("jax_enable_preemption_service", False)
  lost_hosts.filter_stderr(
    process_id=process_id, coordinator=coordinator, patience_s=_START_S
  )
  with _missing_named():
    jax.distributed.initialize(
      coordinator,
      num_processes,
      process_id,
      local_device_ids,
      cluster_detection_method="deactivate",
      # Long enough to be told who is missing.
      initialization_timeout=_START_S + 10,
      heartbeat_timeout_seconds=_HEARTBEAT_S,
      shutdown_timeout_seconds=_START_S,
    )


@contextlib.contextmanager
def joined(processes: Processes) -> Iterator[None]:
  """A script's work, in all processes of its job: they end together.

  An exception in one of them ends the others too, with its reason, within
  seconds. With a single process, nothing but the work.

  Raises:
    UserError: Some of the settings are missing or make no sense.
  """
  initialise(processes)
  if num_processes() == 1:
    yield
    return
  watch = _Watch()
  try:
    yield
    everyone(None)
  except BaseException as error:
    watch.leave(error)
  watch.close()
  jax.distributed.shutdown()


def num_processes() -> int:
  """Of this job; does not start JAX's backends."""
  return 1 if _STATE.client is None else _STATE.num_processes


def everyone(value: _T) -> list[_T]:
  """The JSON-able values of all processes; all of them call it in turn."""
  if num_processes() == 1:
    return [value]
  client, number, me = _client(), next(_rounds), _STATE.process_id
  client.key_value_set(f"{_ROUND}{number}/{me}", json.dumps(value))
  client.wait_at_barrier(f"{_ROUND}{number}", _PATIENCE_S * 1000)
  # All have read the round before, or they would not be here.
  if number:
    client.key_value_delete(f"{_ROUND}{number - 1}/{me}")
  found = {
    int(key.rpartition("/")[2]): json.loads(text)
    for key, text in client.key_value_dir_get(f"{_ROUND}{number}/")
  }
  return [found[process] for process in range(_STATE.num_processes)]


def from_first(find: Callable[[], _T]) -> _T:
  """The JSON-able value that process 0 finds; all of them call it in turn."""
  found: Any = find() if _STATE.process_id == 0 else None
  return everyone(found)[0]


def agree(facts: Mapping[str, Any]) -> None:
  """Compares facts, by name, over all processes.

  Raises:
    UserError: Some differ; every process raises it, and it names them.
  """
  reports = everyone({name: _short(value) for name, value in facts.items()})
  differing = []
  for name in dict.fromkeys(name for report in reports for name in report):
    values = [report.get(name, "missing") for report in reports]
    other = next((i for i, v in enumerate(values) if v != values[0]), None)
    if other is not None:
      differing.append(
        f"{name} is {values[0]} in process 0 and {values[other]} in process "
        f"{other}"
      )
  if differing:
    more = f"; {len(differing) - 3} more differ" if differing[3:] else ""
    raise UserError(
      f"the processes disagree: {'; '.join(differing[:3])}{more}; start all of "
      "them with the same flags, files and versions"
    )


def as_flags(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested options by their flags, such as "`--optimizer.learning-rate`"."""
  flags: dict[str, Any] = {}
  for name, value in values.items():
    flag = f"{prefix}{name.replace('_', '-')}"
    if isinstance(value, Mapping):
      flags.update(as_flags(value, f"{flag}."))
    else:
      flags[f"`--{flag}`"] = value
  return flags


def _short(value: Any) -> str:
  text = str(value)
  return text if len(text) <= 80 else f"{text[:60]}... ({_crc(text.encode())})"


def fingerprint(tokens: np.ndarray) -> str:
  """A few words that differ where the numbers do."""
  return f"{len(tokens):,} tokens ({_crc(np.ascontiguousarray(tokens).data)})"


def _crc(data: Any) -> str:
  return f"checksum {zlib.crc32(data):08x}"


def _with_environment(processes: Processes) -> Processes:
  """What the flags leave open, from the plain variables."""
  values: dict[str, Any] = {}
  for name, variable in _FIELDS.items():
    values[name] = getattr(processes, name)
    text = os.environ.get(variable)
    if values[name] is None and text:
      try:
        values[name] = text if name == "coordinator" else int(text)
      except ValueError:
        raise UserError(
          f"{variable} must be a whole number, got {text!r}"
        ) from None
  return Processes(**values)


def _check(processes: Processes) -> None:
  values = dataclasses.asdict(processes)
  if all(value is None for value in values.values()):
    return
  coordinator, count, index = values.values()
  if count == 1:
    return
  for name, value in values.items():
    if value is None:
      raise UserError(
        f"{_flag(name)} is missing: several processes need `--coordinator`, "
        "`--num-processes` and `--process-id` (or "
        f"{', '.join(_FIELDS.values())})"
      )
  if count < 1:
    raise UserError(f"`--num-processes` must be at least 1, got {count}")
  if not 0 <= index < count:
    raise UserError(
      f"`--process-id` must be in [0, {count}) with {count} processes, got "
      f"{index}"
    )
  host, _, port = coordinator.rpartition(":")
  if not host or not port.isdigit():
    raise UserError(
      f"`--coordinator` must be HOST:PORT of process 0, got {coordinator!r}"
    )


def _flag(name: str) -> str:
  return f"`--{name.replace('_', '-')}`"


def _cluster() -> type[clusters.ClusterEnv] | None:
  """The scheduler that JAX finds, if any."""
  for cluster in clusters.ClusterEnv._cluster_types:
    # A pod of Kubernetes need not be part of a job.
    if cluster.opt_in_only_method or (
      cluster.name == "k8s" and "JOB_COMPLETION_INDEX" not in os.environ
    ):
      continue
    if cluster.is_env_present():
      return cluster
  return None


def _completed(processes: Processes) -> tuple[Processes, Any]:
  """With what a scheduler says, and which devices it gives to this process."""
  if processes.num_processes == 1:
    return processes, None
  try:
    cluster = _cluster()
    # Alone, a process shall see all devices, also where Slurm started it.
    if cluster is None or cluster.get_process_count() == 1:
      return processes, None
    find: Any = cluster.auto_detect_unset_distributed_params
    *found, local_device_ids = find(
      *dataclasses.astuple(processes), None, cluster.name, _START_S
    )
  except Exception as error:
    # A notebook on one TPU host must not fail because nobody answers there.
    _LOGGER.warning(
      "what the scheduler says about processes cannot be read (%s): several "
      "need `--coordinator`, `--num-processes` and `--process-id`",
      " ".join(str(error).split()),
    )
    return processes, None
  return Processes(**dict(zip(_FIELDS, found, strict=True))), local_device_ids


@contextlib.contextmanager
def _missing_named() -> Iterator[None]:
  """Within it, JAX's service says after `_START_S` who has not come.

  Its own default is an hour, and `jax.distributed` has no argument for it.
  """
  make = _jax.get_distributed_runtime_service
  _jax.get_distributed_runtime_service = functools.partial(
    make, cluster_register_timeout=_START_S
  )
  try:
    yield
  finally:
    _jax.get_distributed_runtime_service = make


def _client() -> Any:
  return _STATE.client


class _Watch:
  """Looks whether another process has stopped, and lets others know of us."""

  def __init__(self) -> None:
    self._ended = threading.Event()
    self._leaving = threading.Lock()
    self._thread = threading.Thread(target=self._look, daemon=True)
    self._thread.start()

  def close(self) -> None:
    self._ended.set()
    self._thread.join()

  def leave(self, error: BaseException) -> NoReturn:
    """Ends this process, and tells the others why."""
    if _is_consequence(error):
      # The service knows better who it was, after some heartbeats.
      time.sleep(_HEARTBEAT_S + _LEAVE_S)
    status = 1
    if isinstance(error, UserError):
      told, status = f"error: {error}", 2
    elif isinstance(error, SystemExit):
      told = "told to stop"
      status = error.code if isinstance(error.code, int) else 0
    elif isinstance(error, KeyboardInterrupt):
      told, status = "interrupted", 130
    else:
      told = "".join(traceback.format_exception(error)).strip()
    reason = {"why": told.splitlines()[-1], "status": status}
    self._go(None if isinstance(error, SystemExit) else told, reason)

  def _look(self) -> None:
    while not self._ended.wait(_LOOK_EVERY_S):
      try:
        stopped = _client().key_value_dir_get(_STOPPED)
      except jax.errors.JaxRuntimeError:
        continue  # The service is gone: JAX itself ends this process.
      if stopped and not self._ended.wait(_GRACE_S):
        process = stopped[0][0].rpartition("/")[2]
        reason = json.loads(stopped[0][1])
        why = reason["why"].removeprefix("error: ")
        self._go(f"error: process {process} stopped: {why}", reason)

  def _go(self, told: str | None, reason: dict[str, Any]) -> NoReturn:
    with self._leaving:  # Never released: one thread ends the process.
      lost_hosts.leave_quietly()
      if told is not None:
        print(told, file=sys.stderr)
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(
          f"{_STOPPED}{_STATE.process_id}", json.dumps(reason)
        )
        # Process 0 last, or its end would be all that the others hear of.
        _client().wait_at_barrier(_STOPPED, _LEAVE_S * 1000)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(reason["status"])


def _is_consequence(error: BaseException) -> bool:
  """Whether another process's end may be behind it."""
  return not isinstance(error, UserError) and (
    re.search(
      "gloo|closed by peer|reset by peer|barrier|coordination|UNAVAILABLE",
      str(error),
      re.IGNORECASE,
    )
    is not None
  )
