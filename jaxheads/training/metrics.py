"""Metrics of a run: JSON lines that survive `kill -9`, and TensorBoard."""

import contextlib
import json
import math
import numbers
import os
import pathlib
import time
from typing import Any

import numpy as np
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from jaxheads.errors import UserError

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class _TensorBoard:
  """An event file, written in the caller's thread.

  tensorboardX's own SummaryWriter hands events to a thread through a bounded
  queue; when that thread dies (a full disk), `close` waits for it for ever.
  """

  _FLUSH_SECONDS = 5.0

  def __init__(self, folder: pathlib.Path, purge_step: int | None):
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = RecordWriter(
      str(folder / f"events.out.tfevents.{time.time_ns()}")
    )
    self._next_flush = 0.0
    self._add(file_version="brain.Event:2")
    if purge_step is not None:
      # TensorBoard hides what earlier files say of this step and later ones.
      self._add(
        step=purge_step, session_log=SessionLog(status=SessionLog.START)
      )

  def write(self, step: int, time_s: float, scalars: dict[str, float]) -> None:
    """Adds one event that holds all scalars of a step."""
    values = [
      Summary.Value(tag=name, simple_value=value)
      for name, value in scalars.items()
    ]
    self._add(step=step, wall_time=time_s, summary=Summary(value=values))

  def close(self) -> None:
    """Closes the file; a disk that is full by now has been reported."""
    with contextlib.suppress(OSError):
      self._writer.close()

  def _add(self, **fields: Any) -> None:
    fields.setdefault("wall_time", time.time())
    self._writer.write(Event(**fields).SerializeToString())
    if time.monotonic() >= self._next_flush:  # It syncs, so not every time.
      self._writer.flush()
      self._next_flush = time.monotonic() + self._FLUSH_SECONDS


class MetricsWriter:
  """Appends scalars to `metrics.jsonl`, and to TensorBoard beside it.

  A line is one JSON object, {"step": 10, "time_s": 1767225600.0, "loss": 2.5},
  in the order of writing; `time_s` is Unix time. Lines reach the operating
  system one by one before `write` returns, so that killing the process loses
  none of them. A number keeps its float32 value exactly. What is not finite
  is null in the file, because JSON has no word for it.

  Works as a context manager. With several processes, one of them writes.
  """

  def __init__(
    self,
    directory: str | os.PathLike[str],
    *,
    resume_step: int | None = None,
  ):
    """Opens the files, and makes the directory if it is not there.

    Args:
      directory: Where the run keeps its artefacts.
      resume_step: Last step that the restored checkpoint has seen: lines after
        it are dropped (in one atomic step), and the run writes them again.
        None starts a new run.

    Raises:
      UserError: A new run would overwrite the metrics of another, or the
        directory cannot be written.
    """
    self._path = pathlib.Path(directory) / FILE_NAME
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      if resume_step is not None:
        _drop_after(self._path, resume_step)
      elif self._path.exists() and self._path.stat().st_size:
        raise UserError(
          f"{str(self._path)!r} holds the metrics of another run; resume that "
          "run or choose another directory."
        )
      self._tensorboard = _TensorBoard(
        self._path.parent / TENSORBOARD_FOLDER,
        purge_step=None if resume_step is None else resume_step + 1,
      )
      # Unbuffered: one `write` is one system call.
      self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
    except OSError as error:
      raise self._cannot_write(error) from None

  def write(self, step: int, **scalars: Any) -> None:
    """Appends one line.

    Args:
      step: Training steps done when the scalars were measured.
      **scalars: Numbers, or arrays of one number (NumPy, JAX). A name may have
        slashes, which TensorBoard groups by: write(3, **{"load/head_0": 0.5}).

    Raises:
      ValueError: A name is taken, or a value is not one number.
      UserError: The file cannot be written (a full disk); the lines before
        this one are whole.
    """
    record: dict[str, Any] = {"step": int(step), "time_s": time.time()}
    for name, value in scalars.items():
      if name in record:
        raise ValueError(f"`{name}` is a name that the writer uses itself.")
      record[name] = _scalar(name, value)
    line = json.dumps(
      {
        name: None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in record.items()
      },
      allow_nan=False,
    )
    self._append(line.encode("utf-8") + b"\n")
    try:
      self._tensorboard.write(
        record["step"],
        record["time_s"],
        {name: float(record[name]) for name in scalars},
      )
    except OSError as error:
      raise self._cannot_write(error) from None

  def close(self) -> None:
    """Closes both; TensorBoard's last values are on disk after that."""
    self._tensorboard.close()
    self._file.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _append(self, line: bytes) -> None:
    """Writes a whole line or none of it."""
    end = os.fstat(self._file.fileno()).st_size
    try:
      written = 0
      while written < len(line):
        written += self._file.write(line[written:])
    except OSError as error:
      self._file.truncate(end)
      raise self._cannot_write(error) from None

  def _cannot_write(self, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(
      f"metrics cannot be written to {str(self._path)!r}: {reason}; free some "
      "space or choose another directory."
    )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The lines of a metrics file, oldest first.

  A last line that was only half written is left out; null becomes NaN.

  Args:
    path: `metrics.jsonl`, or the directory it is in.

  Raises:
    UserError: There is no such file, or a line other than the last is broken.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    path = path / FILE_NAME
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError as error:
    reason = error.strerror or type(error).__name__
    raise UserError(f"no metrics in {str(path)!r}: {reason}.") from None
  records = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    record = _parse(line)
    if record is not None:
      records.append(record)
    elif number < len(lines):  # The last one has no newline after it.
      raise UserError(
        f"{str(path)!r}, line {number}, is not a metrics record; mend or "
        "delete that line."
      )
  return [
    {
      name: math.nan if value is None else value
      for name, value in record.items()
    }
    for record in records
  ]


def _parse(line: bytes) -> dict[str, Any] | None:
  """The record on a line, or None if it is not a whole one."""
  try:
    record = json.loads(line)
  except ValueError:
    return None
  if not isinstance(record, dict) or not isinstance(record.get("step"), int):
    return None
  return record


def _drop_after(path: pathlib.Path, resume_step: int) -> None:
  """Keeps the whole lines up to `resume_step`, all of them or all as before."""
  if not path.exists():
    return
  lines = path.read_bytes().split(b"\n")
  kept = []
  for line in lines:
    record = _parse(line)
    if record is not None and record["step"] <= resume_step:
      kept.append(line + b"\n")
  temporary = path.with_name(path.name + ".tmp")
  with open(temporary, "wb") as file:
    file.writelines(kept)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _scalar(name: str, value: Any) -> int | float:
  """`value` as a Python number."""
  if isinstance(value, numbers.Integral):
    return int(value)
  array = np.asarray(value)
  if array.size != 1:
    raise ValueError(f"`{name}` must be one number, got shape {array.shape}.")
  if array.dtype.kind in "iub":
    return int(array.item())
  try:
    return float(array.item())
  except (TypeError, ValueError):
    raise ValueError(f"`{name}` must be one number, got {value!r}.") from None
