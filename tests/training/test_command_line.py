import pathlib

import pytest

from jaxheads.errors import UserError
from jaxheads.training import parse, presets
from jaxheads.training.run_folder import RunFolder, newest
from tests.training import small


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def hold_a_run(path: str) -> RunFolder:
  config = small.config()
  run = RunFolder(pathlib.Path(path))
  run.create(config, config.model.build(257))
  return run


def test_no_argument_is_the_tiny_preset():
  request = parse([])
  assert request.config == presets.TINY
  assert not request.resume
  assert request.run.path.parent.name == "runs"
  assert not request.run.path.exists()


def test_flags_override_the_file_which_overrides_the_preset(tmp_path):
  (tmp_path / "run.yaml").write_text(
    "preset: smoke\nsteps: 7\noptimizer: {warmup_steps: 1}\n"
  )
  config = parse(
    ["--config", "run.yaml", "--optimizer.warmup-steps", "3"]
  ).config
  assert config.steps == 7
  assert config.optimizer.warmup_steps == 3
  assert config.seq_len == presets.SMOKE.seq_len


def test_lists_and_switches():
  config = parse(
    "--model.shared 2 2 4 4 --model.top-k=3 --baseline".split()
  ).config
  assert config.model.shared == (2, 2, 4, 4)
  assert config.model.top_k == (3,)
  assert config.baseline


@pytest.mark.parametrize("prefix", ["--", "--model."])
def test_execution_and_implementation_have_short_names(prefix):
  model = parse(
    [f"{prefix}execution", "dispatch", f"{prefix}implementation", "xla"]
  ).config.model
  assert (model.execution, model.implementation) == ("dispatch", "xla")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--implementation cuda", "'cuda'.*--implementation"),
    ("--stpes 4", "--stpes.*did you mean `--steps`"),
    ("--steps four", "--steps.*'four'"),
    ("--model.gates soft", "--model.gates.*scaled.*paper"),
    ("--preset smok", "no 'smok', did you mean `smoke`"),
    ("--preset", "`--preset` needs a value"),
    ("--config none.yaml", "none.yaml.*No such file"),
    ("--steps 0", "`--steps` must be at least 1, got 0"),
    ("--resume", "found no run under 'runs'"),
    ("--resume here", "there is no folder 'here'"),
    ("--resume . --preset tiny", "leave out `--preset`"),
    ("--resume .", "has no config.json"),
    ("--resume . --out there", "leave out `--out`"),
  ],
)
def test_mistakes_are_one_line(flags, message):
  with pytest.raises(UserError, match=message) as error:
    parse(flags.split())
  assert "\n" not in str(error.value)


def test_a_folder_with_a_run_is_not_overwritten():
  hold_a_run("mine")
  with pytest.raises(UserError, match="already holds a run.*--resume mine"):
    parse(["--out", "mine"])


@pytest.mark.parametrize("flags", ["--resume mine", "--out mine --resume"])
def test_resume_takes_the_config_of_the_run(flags):
  hold_a_run("mine")
  request = parse([*flags.split(), "--steps", "9"])
  assert request.resume
  assert request.run.path == pathlib.Path("mine")
  assert request.config == small.config(steps=9)


def test_resume_without_a_folder_takes_the_newest():
  hold_a_run("runs/train_moh-20260101-000000")
  run = hold_a_run("runs/train_moh-20260102-000000")
  hold_a_run("runs/other")
  assert newest() == run
  assert parse(["--resume", "--baseline"]).run == run
  assert parse(["--resume"]).run == run


def test_damaged_config_is_named():
  hold_a_run("mine").config_file.write_text("{")
  with pytest.raises(UserError, match="mine/config.json cannot be read"):
    parse(["--resume", "mine"])


@pytest.mark.parametrize(
  "path",
  sorted((pathlib.Path(__file__).parents[2] / "experiments/configs").iterdir()),
  ids=lambda path: path.name,
)
def test_example_configs_parse_and_have_a_header(path):
  config = parse(["--config", str(path)]).config
  config.model.build(257)
  header = path.read_text().split("\n\n")[0].lower()
  for word in ("source", "hardware", "expected", "command"):
    assert f"# {word}" in header
