"""The folder of a run: where everything lies, and who may write there."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

from jaxheads.errors import UserError
from jaxheads.models import ModelConfig
from jaxheads.training import configfile, distributed
from jaxheads.training.config import TrainConfig

# Network storage may remember for a while that a file is not there.
_SHARED_WITHIN_S = 40.0


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """Paths of one run.

  ```
  config.json      the whole TrainConfig and ModelConfig
  checkpoints/     one folder per saved step, one .crc32.json beside each
  metrics.jsonl    one record per logged step; tensorboard/ holds the same
  figures/         loss.png, head_load.png, contexts.png
  sample.txt  summary.json
  baseline/        the same again for the dense model, with --baseline
  ```
  """

  path: pathlib.Path

  @property
  def config_file(self) -> pathlib.Path:
    return self.path / "config.json"

  @property
  def checkpoints(self) -> pathlib.Path:
    return self.path / "checkpoints"

  @property
  def metrics_file(self) -> pathlib.Path:
    return self.path / "metrics.jsonl"

  @property
  def figures(self) -> pathlib.Path:
    return self.path / "figures"

  @property
  def sample_file(self) -> pathlib.Path:
    return self.path / "sample.txt"

  @property
  def summary_file(self) -> pathlib.Path:
    return self.path / "summary.json"

  @property
  def baseline(self) -> "RunFolder":
    return RunFolder(self.path / "baseline")

  @property
  def holds_run(self) -> bool:
    return self.config_file.exists()

  def create(self, config: TrainConfig, model_config: ModelConfig) -> None:
    """Makes the folder and records what the run is.

    Raises:
      UserError: The folder already holds a run, or cannot be written.
    """
    if self.holds_run:
      raise UserError(
        f"`--out` {str(self.path)!r} already holds a run; continue it with "
        f"`--resume {self.path}`, or choose another folder"
      )
    try:
      self.figures.mkdir(parents=True, exist_ok=True)
      self.record(config, model_config)
    except OSError as error:
      raise UserError(
        f"`--out` {str(self.path)!r} cannot be written: {error.strerror}; "
        "choose another folder"
      ) from error

  def check_shared(self) -> None:
    """`UserError` unless every process sees the folder that process 0 made."""
    distributed.everyone(None)
    deadline = time.monotonic() + _SHARED_WITHIN_S
    while not self.holds_run:
      if time.monotonic() > deadline:
        raise UserError(
          f"{self.path} is not on storage that all processes share; choose a "
          "folder that is with `--out`"
        )
      time.sleep(1.0)

  def record(self, config: TrainConfig, model_config: ModelConfig) -> None:
    """Writes config.json."""
    write_json(
      self.config_file,
      {
        "train": config.to_dict(),
        "model": model_config.to_dict(),
        "versions": versions(),
      },
    )

  def read_config(self) -> tuple[TrainConfig, ModelConfig]:
    """What config.json says; `UserError` if it is missing or damaged."""
    try:
      record = json.loads(self.config_file.read_text(encoding="utf-8"))
      where = str(self.config_file)
      return (
        configfile.override(TrainConfig(), record["train"], where=where),
        ModelConfig.from_dict(record["model"]),
      )
    except FileNotFoundError:
      raise UserError(
        f"{str(self.path)!r} holds no run: it has no config.json"
      ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
      reason = " ".join(str(error).split())
      raise UserError(
        f"{self.config_file} cannot be read ({reason}); start a new run"
      ) from error


def versions() -> dict[str, str]:
  """Of the libraries that numbers and files depend on."""
  return {
    name: importlib.metadata.version(name)
    for name in ("jax", "flax", "optax", "orbax-checkpoint")
  }


def default_path(
  root: str | pathlib.Path = "runs", *, script: str = "train_moh"
) -> pathlib.Path:
  """runs/<script>-<date>-<time>, a name not taken yet."""
  stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
  path = pathlib.Path(root) / f"{script}-{stamp}"
  for attempt in range(2, 100):
    if not path.exists():
      break
    path = path.with_name(f"{script}-{stamp}-{attempt}")
  return path


def newest(
  root: str | pathlib.Path = "runs", *, script: str = "train_moh"
) -> RunFolder:
  """The script's run started last under `root`; `UserError` if none is."""
  runs = [
    RunFolder(file.parent)
    for file in pathlib.Path(root).glob(f"{script}-*/config.json")
  ]
  if not runs:
    raise UserError(
      f"`--resume` found no run under {str(root)!r}; name one with "
      "`--resume DIR`, or start one without `--resume`"
    )
  return max(runs, key=lambda run: run.path.name)


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes `value`; a reader sees the old file or the new one, never half."""
  temporary = path.with_name(f"{path.name}.tmp")
  temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
  os.replace(temporary, path)
