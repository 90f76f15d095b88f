"""`experiments/sample.py`: what it prints, where it looks, how it fails."""

import importlib.util
import io
import pathlib
import sys

import pytest

from jaxheads.data import ByteTokenizer
from jaxheads.models import generate
from jaxheads.training import ModelOptions, RunFolder, TrainConfig
from tests.experiments.checkpoints import save_checkpoints
from tests.models.builders import ROUTED, small_config, small_model

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "sample.py"
CONFIG = small_config(
  ROUTED, None, vocab_size=ByteTokenizer.vocab_size, max_seq_len=32
)


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("sample", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules["sample"] = module
  spec.loader.exec_module(module)
  yield module
  del sys.modules["sample"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder with an old run, a newer one, and one without checkpoint."""
  root = tmp_path_factory.mktemp("runs")
  for seed, name in enumerate(("train_moh-1", "train_moh-2", "train_moh-3")):
    run = RunFolder(root / name)
    run.create(TrainConfig(model=ModelOptions(max_seq_len=32)), CONFIG)
    if name == "train_moh-3":
      continue
    save_checkpoints(run, small_model(CONFIG, seed), steps=(10, 20))
  return root


def run_script(script, monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
  script.main()


@pytest.mark.slow
def test_continues_the_prompt_with_the_newest_run(
  script, runs, monkeypatch, capsys
):
  run_script(
    script,
    monkeypatch,
    *("--runs", runs, "--prompt", "né", "--temperature", 0),
    *("--max-new-tokens", 6),
  )
  out, err = capsys.readouterr()
  tokenizer = ByteTokenizer()
  tokens = generate(
    small_model(CONFIG, seed=1),
    tokenizer.encode("né")[None],
    max_new_tokens=6,
    temperature=0,
    stop_token=tokenizer.eot,
  )
  text = tokenizer.decode([int(token[0]) for token in tokens])
  assert out == f"né{text}\n"
  assert "train_moh-2, step 20" in err
  # Layer 1 uses 3 of its 4 heads, layer 2 all.
  assert f"{CONFIG.num_params:,} parameters, 7 of 8 heads active" in err


def test_run_step_and_empty_prompt(script, runs, monkeypatch, capsys):
  run_script(
    script,
    monkeypatch,
    *("--run", runs / "train_moh-1", "--step", "best", "--prompt", ""),
    *("--max-new-tokens", 2),
  )
  out, err = capsys.readouterr()
  assert "train_moh-1, step 10" in err
  assert out.endswith("\n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--run", "{runs}/none"], "there is no folder"),
    (["--run", "{runs}/train_moh-3"], "holds no checkpoint"),
    (["--runs", "{runs}/train_moh-1"], "holds no run with a checkpoint"),
    (["--step", "15"], "must be one of the saved steps 10, 20"),
    (["--temperature", "-1"], "`temperature` must be 0 or more"),
    (["--top-p", "0"], "`top_p` must be in (0, 1]"),
    (["--max-new-tokens", "40"], "must fit in `max_seq_len` (32)"),
    (["--prompt", "x" * 32], "32 tokens and the model's context is 32"),
  ],
)
def test_mistakes_are_told_in_one_line(
  script, runs, monkeypatch, capsys, arguments, message
):
  with pytest.raises(SystemExit) as exit_:
    run_script(
      script,
      monkeypatch,
      *("--runs", runs),
      *(argument.format(runs=runs) for argument in arguments),
    )
  out, err = capsys.readouterr()
  assert exit_.value.code == 2
  assert out == ""
  lines = [line for line in err.splitlines() if "parameters," not in line]
  assert len(lines) == 1
  assert lines[0].startswith("error: ")
  assert message in lines[0]


def test_ctrl_c_ends_the_line_and_exits_with_130(
  script, runs, monkeypatch, capsys
):
  def interrupted(*_):
    yield ord("a")
    raise KeyboardInterrupt

  monkeypatch.setattr(script, "continuation", interrupted)
  with pytest.raises(SystemExit) as exit_:
    run_script(script, monkeypatch, "--runs", runs, "--prompt", "p")
  out, err = capsys.readouterr()
  assert exit_.value.code == 130
  assert out == "pa\n"
  assert err.splitlines()[-1] == "interrupted"
  assert "Traceback" not in err


def test_control_characters_do_not_reach_a_terminal(script, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  for stream, expected in (
    (Terminal(), "a\t\n\u241b[2J\ufffd\u2421é"),
    (io.StringIO(), "a\t\n\x1b[2J\x9b\x7fé"),
  ):
    monkeypatch.setattr(sys, "stdout", stream)
    script.show("a\t\n\x1b[2J\x9b\x7fé")
    assert stream.getvalue() == expected
