import json
import math
import os
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxheads.errors import UserError
from jaxheads.training.metrics import MetricsWriter, read_metrics


def _steps(path):
  return [record["step"] for record in read_metrics(path)]


def _events(directory):
  """Every event of every file, in the order TensorBoard reads them."""
  events = []
  for path in sorted((directory / "tensorboard").iterdir()):
    assert "tfevents" in path.name
    raw = path.read_bytes()
    while raw:
      # A TFRecord: length, its checksum, the data, their checksum.
      length = int.from_bytes(raw[:8], "little")
      events.append(Event.FromString(raw[12 : 12 + length]))
      raw = raw[12 + length + 4 :]
  return events


def test_lines_are_json_with_step_and_time(tmp_path):
  with MetricsWriter(tmp_path / "new" / "run") as writer:
    writer.write(1, loss=2.5, tokens=jnp.int32(7))
    writer.write(2, **{"load/head_0": np.float32(0.1)})
  path = tmp_path / "new" / "run" / "metrics.jsonl"
  first, second = map(json.loads, path.read_text().splitlines())
  assert (first["step"], first["loss"], first["tokens"]) == (1, 2.5, 7)
  assert first["time_s"] <= second["time_s"]
  assert second["load/head_0"] == np.float32(0.1)
  assert read_metrics(path) == read_metrics(path.parent) == [first, second]


@hypothesis.given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_comes_back_exactly(tmp_path_factory, value):
  directory = tmp_path_factory.mktemp("run")
  with MetricsWriter(directory) as writer:
    writer.write(0, numpy=np.float32(value), jax=jnp.asarray([value]))
  [record] = read_metrics(directory)
  assert record["numpy"] == record["jax"] == value


def test_what_is_not_finite_is_null_and_reads_as_nan(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(3, loss=math.nan, norm=jnp.inf)
  text = (tmp_path / "metrics.jsonl").read_text()
  assert json.loads(text)["loss"] is None
  [record] = read_metrics(tmp_path)
  assert math.isnan(record["loss"])
  assert math.isnan(record["norm"])


def test_tensorboard_has_every_scalar(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(5, loss=2.5, accuracy=0.25)
  version, event = _events(tmp_path)
  assert version.file_version == "brain.Event:2"
  assert event.step == 5
  assert {value.tag: value.simple_value for value in event.summary.value} == {
    "loss": 2.5,
    "accuracy": 0.25,
  }


def test_resume_drops_later_lines_and_hides_later_events(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    for step in range(1, 6):
      writer.write(step, loss=step)
  before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:3]
  with MetricsWriter(tmp_path, resume_step=3) as writer:
    assert _steps(tmp_path) == [1, 2, 3]
    writer.write(4, loss=40)
  after = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
  assert after[:3] == before  # Byte for byte.
  assert [record["loss"] for record in read_metrics(tmp_path)] == [1, 2, 3, 40]
  starts = [event for event in _events(tmp_path) if event.session_log.status]
  assert [event.step for event in starts] == [4]
  assert sorted(path.name for path in tmp_path.iterdir()) == [
    "metrics.jsonl",
    "tensorboard",
  ]


def test_resume_before_the_first_line_keeps_none(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, loss=1)
  MetricsWriter(tmp_path, resume_step=0).close()
  assert _steps(tmp_path) == []


def test_resume_without_a_file_starts_one(tmp_path):
  with MetricsWriter(tmp_path, resume_step=7) as writer:
    writer.write(8, loss=1)
  assert _steps(tmp_path) == [8]


def test_file_cut_at_every_byte_reads_and_resumes(tmp_path):
  path = tmp_path / "metrics.jsonl"
  with MetricsWriter(tmp_path) as writer:
    for step in (1, 2):
      writer.write(step, loss=0.5)
  whole = path.read_bytes()
  second = whole.index(b"\n") + 1
  for cut in range(second, len(whole) + 1):
    path.write_bytes(whole[:cut])
    # Without its newline, the last line still has all it needs.
    expected = [1, 2] if cut >= len(whole) - 1 else [1]
    assert _steps(path) == expected
    if cut % 9 == 0 or cut >= len(whole) - 1:
      with MetricsWriter(tmp_path, resume_step=2) as writer:
        writer.write(3, loss=0.5)
      assert _steps(path) == [*expected, 3]
      assert path.read_bytes().endswith(b"}\n")


def test_nothing_written_is_lost_by_kill(tmp_path):
  program = f"""
import os, signal
from jaxheads.training.metrics import MetricsWriter
writer = MetricsWriter({str(tmp_path)!r})
for step in range(100):
  writer.write(step, loss=step)
os.kill(os.getpid(), signal.SIGKILL)
"""
  done = subprocess.run(
    [sys.executable, "-c", program],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    timeout=120,
    check=False,
  )
  assert done.returncode == -signal.SIGKILL
  assert _steps(tmp_path) == list(range(100))


def test_a_new_run_does_not_overwrite_another(tmp_path):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, loss=1)
  with pytest.raises(UserError, match="another run; resume"):
    MetricsWriter(tmp_path)
  assert _steps(tmp_path) == [1]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
  with pytest.raises(UserError, match=r"metrics.jsonl', line 2, is not"):
    read_metrics(path)
  MetricsWriter(tmp_path, resume_step=3).close()
  assert _steps(path) == [1, 3]


def test_missing_file_is_one_line(tmp_path):
  with pytest.raises(UserError, match="no metrics in .*No such file"):
    read_metrics(tmp_path)


def test_directory_that_is_a_file_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="metrics cannot be written"):
    MetricsWriter(tmp_path / "file")


@pytest.mark.parametrize(
  ("scalars", "message"),
  [
    ({"loss": np.zeros(2)}, r"`loss` must be one number, got shape \(2,\)"),
    ({"loss": "low"}, "`loss` must be one number, got 'low'"),
    ({"loss": None}, "`loss` must be one number, got None"),
    ({"time_s": 1.0}, "`time_s` is a name that the writer uses"),
  ],
)
def test_what_is_no_scalar_is_refused_and_leaves_no_line(
  tmp_path, scalars, message
):
  with MetricsWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=message):
      writer.write(1, **scalars)
    writer.write(2, loss=1.0)
  assert _steps(tmp_path) == [2]


class _FullDisk:
  """A file on a disk that takes `room` more bytes."""

  def __init__(self, file, room):
    self._file, self._room = file, room

  def __getattr__(self, name):
    return getattr(self._file, name)

  def write(self, data):
    if not self._room:
      raise OSError(28, "No space left on device")
    written = self._file.write(data[: self._room])
    self._room -= written
    return written


@pytest.mark.parametrize("room", [0, 10])
def test_full_disk_is_one_line_and_leaves_whole_lines(tmp_path, room):
  with MetricsWriter(tmp_path) as writer:
    writer.write(1, loss=1.0)
    whole = writer._file
    writer._file = _FullDisk(whole, room)
    with pytest.raises(UserError, match=r"metrics.jsonl'.*No space left"):
      writer.write(2, loss=1.0)
    writer._file = whole
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"{") == 1
    writer.write(3, loss=1.0)
  assert _steps(tmp_path) == [1, 3]
