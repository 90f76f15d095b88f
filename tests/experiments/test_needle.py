"""The needle experiment, small: trains, asks, draws, and can be resumed."""

import dataclasses
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from jaxheads.errors import UserError

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments/needle.py"


@pytest.fixture(scope="module")
def needle():
  spec = importlib.util.spec_from_file_location("needle", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules["needle"] = module  # The help is read off its source.
  spec.loader.exec_module(module)
  yield module
  del sys.modules["needle"]


@pytest.fixture
def smoke(needle, tmp_path):
  flags = ["--preset", "smoke", "--model.implementation", "reference"]
  return needle.parse([*flags, "--out", str(tmp_path / "out")])


@pytest.mark.exhaustive
def test_smoke_run_leaves_its_results_and_resumes_to_the_same(
  needle, smoke, capsys
):
  results = needle.run(smoke)
  assert json.loads((smoke.out / "needle.json").read_text()) == results
  assert (smoke.out / "needle.png").stat().st_size > 1000
  assert list(results["models"]) == ["S2 hybrid", "dense"]
  sharded, dense = results["models"].values()
  assert sharded["num_params"] == dense["num_params"]
  assert sharded["visible_keys_fraction"] < dense["visible_keys_fraction"] == 1
  for model in (sharded, dense):
    exact = np.array(model["exact"])
    assert exact.shape == (2, 3)
    assert ((exact >= 0) & (exact <= 1)).all()
  text = capsys.readouterr().out
  assert "% of keys visible" in text
  assert str(smoke.out / "needle.png") in text
  with pytest.raises(UserError, match="continue it with `--resume`"):
    needle.run(smoke)
  again = needle.run(dataclasses.replace(smoke, resume=True))
  for name, model in results["models"].items():
    assert again["models"][name]["exact"] == model["exact"]
  other = dataclasses.replace(smoke.needle, samples=3)
  with pytest.raises(UserError, match="changed are: samples"):
    needle.run(dataclasses.replace(smoke, resume=True, needle=other))


def test_presets_build_and_hold_their_needles(needle):
  for preset in needle.PRESETS.values():
    longest = max(*preset.lengths, *preset.ask_lengths)
    model = dataclasses.replace(preset.model, max_seq_len=longest + 8)
    config = model.build(393)
    assert any(config.contexts)
    assert not all(config.contexts)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--preset tiny", "`--preset` must be one of cpu, 32k, smoke"),
    ("--steps 3", "`--steps` must have one number for each of `--lengths`"),
    ("--samples 0", "`--samples` must be at least 1"),
  ],
)
def test_mistakes_are_one_line(needle, flags, message):
  with pytest.raises(UserError, match=message):
    needle.parse(flags.split())


def test_nothing_to_resume(needle, smoke):
  with pytest.raises(UserError, match="holds no experiment"):
    needle.run(dataclasses.replace(smoke, resume=True))
