import dataclasses
import io
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from jaxheads.errors import UserError
from jaxheads.training import Interrupted, Reporter, restore_model
from jaxheads.training.checkpoint import best_step, saved_steps
from jaxheads.training.metrics import read_metrics
from tests.training import small


@pytest.fixture(scope="module", autouse=True)
def _compile_once(tmp_path_factory):
  """The runs below share their programs."""
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update(names[0], str(tmp_path_factory.mktemp("cache")))
  jax.config.update(names[1], 0.1)
  yield
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of six steps: its summary, its folder and what it said."""
  said = io.StringIO()
  config = small.config()
  config = dataclasses.replace(
    config,
    evaluation=dataclasses.replace(config.evaluation, sample_tokens=8),
  )
  summary, run = small.run(
    config, tmp_path_factory.mktemp("run"), reporter=Reporter(said)
  )
  return summary, run, said.getvalue()


def test_what_a_run_leaves_behind(finished):
  summary, run, said = finished
  for path in (
    run.config_file,
    run.figures / "loss.png",
    run.figures / "head_load.png",
    run.sample_file,
  ):
    assert path.stat().st_size > 0, path
  assert any((run.path / "tensorboard").iterdir())
  assert json.loads(run.summary_file.read_text()) == summary
  assert saved_steps(run.checkpoints) == [3, 6]
  assert best_step(run.checkpoints) == summary["best_step"]
  assert run.sample_file.read_text().startswith("def ")
  assert "step 6/6" in said
  assert "bits/byte" in said


def test_metrics_of_every_step(finished):
  summary, run, _ = finished
  records = read_metrics(run.metrics_file)
  steps = [record["step"] for record in records if "loss" in record]
  assert steps == [1, 2, 3, 4, 5, 6]
  validated = [r["step"] for r in records if "validation_loss" in r]
  assert validated == [3, 6]
  # Untrained: 257 choices whose logits are normal, of the deviation 0.88 that a
  # truncated normal keeps; then it falls.
  untrained = np.log(257) + 0.88**2 / 2
  np.testing.assert_allclose(records[0]["loss"], untrained, rtol=0.05)
  assert summary["validation_loss"] < records[0]["loss"]
  # One byte a token; only document ends carry nats and no byte.
  ratio = summary["validation_bits_per_byte"] * np.log(2)
  assert 1.0 <= ratio / summary["validation_loss"] < 1.05
  assert summary["active_heads_fraction"] == 0.75


def test_the_model_comes_back_for_serving(finished):
  _, run, _ = finished
  model, config, tokenizer, step = restore_model(run.path)
  assert step == 6
  assert config == small.config().model.build(257)
  tokens = np.asarray(tokenizer.encode("def main"))[None]
  assert model(tokens).shape == (1, 8, 257)
  assert restore_model(run.path, step=3)[3] == 3
  assert restore_model(run.path, step="best")[3] in (3, 6)


def test_a_damaged_checkpoint_is_skipped_and_said(finished, tmp_path):
  copy = tmp_path / "copy"
  shutil.copytree(finished[1].path, copy)
  data = max(
    (path for path in (copy / "checkpoints/6/params").rglob("*")),
    key=lambda path: path.stat().st_size if path.is_file() else 0,
  )
  data.write_bytes(data.read_bytes()[:-5])
  said = []
  assert restore_model(copy, say=said.append)[3] == 3
  assert "checkpoint 6 cannot be used" in said[0]
  with pytest.raises(UserError, match="step 6: .* is truncated"):
    restore_model(copy, step=6)


@pytest.mark.parametrize(
  ("step", "message"), [(4, "one of the saved steps 3, 6, got 4")]
)
def test_a_step_that_was_not_saved(finished, step, message):
  with pytest.raises(UserError, match=message):
    restore_model(finished[1].path, step=step)


def test_no_run_to_restore(tmp_path):
  with pytest.raises(UserError, match="there is no folder"):
    restore_model(tmp_path / "none")
  with pytest.raises(UserError, match="holds no run"):
    restore_model(tmp_path)


class SignalAt(Reporter):
  """Sends this process a signal once a line contains `text`."""

  def __init__(self, text: str, number: int) -> None:
    super().__init__(io.StringIO())
    self._text, self._number = text, number

  def say(self, text: str) -> None:
    if self._text in text:
      os.kill(os.getpid(), self._number)
    super().say(text)


@pytest.mark.parametrize(
  ("when", "number", "saved_at"),
  [
    # Between two checkpoints.
    ("step 4/6", signal.SIGTERM, 5),
    # While the step is validated that is due to be saved.
    ("step 3/6  validation", signal.SIGINT, 3),
  ],
)
def test_stopped_and_resumed_equals_uninterrupted(
  finished, tmp_path, when, number, saved_at
):
  config = small.config()
  with pytest.raises(Interrupted) as stop:
    small.run(config, tmp_path, reporter=SignalAt(when, number))
  assert stop.value.signal_name == signal.Signals(number).name
  assert stop.value.step == saved_at
  assert saved_steps(tmp_path / "checkpoints")[-1] == saved_at
  summary, run = small.run(config, tmp_path, resume=True)
  expected = small.untimed(read_metrics(finished[1].metrics_file))
  assert small.untimed(read_metrics(run.metrics_file)) == expected
  assert summary["validation_loss"] == finished[0]["validation_loss"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  config = small.config(
    checkpoint=dataclasses.replace(small.config().checkpoint, every=1),
    optimizer=dataclasses.replace(
      small.config().optimizer, learning_rate=1e38, warmup_steps=0
    ),
  )
  with pytest.raises(UserError) as error:
    small.run(config, tmp_path)
  message = str(error.value)
  assert "\n" not in message
  assert "is nan at step 2" in message or "is inf at step 2" in message
  assert "last good checkpoint is step 1" in message
  assert "--optimizer.learning-rate" in message
  assert saved_steps(tmp_path / "checkpoints") == [1]
  # The file says what happened up to there.
  steps = [record["step"] for record in read_metrics(tmp_path)]
  assert steps == [1]


def test_fewer_steps_than_are_done(finished, tmp_path):
  shutil.copytree(finished[1].path, tmp_path / "copy")
  with pytest.raises(UserError, match="`--steps` must be at least 6.*got 5"):
    small.run(small.config(steps=5), tmp_path / "copy", resume=True)


def test_sequence_longer_than_the_model_allows(tmp_path):
  with pytest.raises(UserError, match="`--seq-len` must be at most.*64.*65"):
    small.run(small.config(seq_len=65), tmp_path)


def test_batch_that_devices_cannot_share(tmp_path):
  with pytest.raises(UserError, match="got 12; the nearest is 8"):
    small.run(small.config(batch_size=12), tmp_path)
