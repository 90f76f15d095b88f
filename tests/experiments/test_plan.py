"""The planning script: what it takes, and one small plan by the compiler."""

import json

import pytest

from experiments import plan, plan_weak_scaling
from jaxheads.errors import UserError
from jaxheads.planning import chips
from jaxheads.planning.chips import CHIPS, Topology
from jaxheads.planning.memory import TooLarge


@pytest.fixture
def no_compiler(monkeypatch):
  """Slices without devices of their own: sizes are checked before."""

  def find(name):
    chip, _, sizes = name.partition(":")
    shape = tuple(map(int, sizes.split("x")))
    count = shape[0] * shape[1]
    return Topology(name, CHIPS[chip], shape, (None,) * count)

  monkeypatch.setattr(chips, "find", find)


def resolved(text):
  command = plan.parse(text.split())
  return command, plan.resolve(command)


def test_the_issues_command_is_understood(no_compiler):
  command, problem = resolved(
    "--preset moh-llama3-8b --topology v5e:16x16 --mesh fsdp=256 --batch 256 "
    "--seq 8192"
  )
  assert (problem.batch_size, problem.seq_len) == (256, 8192)
  assert problem.config.num_params == 8_030_261_248 + 2 * 4096 * 32_640
  assert problem.config.head_plans[0].router == "query_norm"
  assert problem.config.remat
  # The preset's own optimizer.
  assert command.optimizer.learning_rate == 2e-5


def test_what_is_not_given_comes_from_preset_and_mesh(no_compiler):
  _, problem = resolved("--topology v5e:4x4 --mesh data=2,heads=4")
  assert (problem.shape.data, problem.shape.fsdp) == (2, 2)
  assert (problem.batch_size, problem.seq_len) == (4, 8192)


def test_a_plan_may_ask_for_longer_sequences_than_the_preset(no_compiler):
  _, problem = resolved("--topology v5e:16x16 --seq 131072")
  assert problem.config.max_seq_len == 131072


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--preset llama", "--preset. must be one of"),
    ("--batch 0", "--batch. must be at least 1"),
    ("--mesh data=3", "needs a multiple of 3 devices, there are 16"),
    ("--mesh heads=16", "heads=16 does not divide the model's 8"),
    ("--mesh fsdp=16 --batch 24", "multiple of data x fsdp = 16.*nearest is"),
    (
      "--batch 16 --optimizer.accumulate 2",
      "multiple of data x fsdp x accumulate = 32.*nearest is 32",
    ),
    ("--mesh context=4 --seq 8190", "8190"),
  ],
)
def test_mistakes_are_told_in_one_line(no_compiler, flags, message):
  with pytest.raises(UserError, match=message) as caught:
    plan.plan(*resolved(f"--topology v5e:4x4 {flags}"))
  assert "\n" not in str(caught.value)


def test_a_plan_that_does_not_fit_is_an_answer(no_compiler, capsys):
  command, problem = resolved("--topology v5e:4x4")
  found = TooLarge(
    arguments={"parameters": 3 * 2**30}, used=20.0 * 2**30, limit=2.0**34
  )
  plan.show(command, problem, found, plan.rich.console.Console(width=200))
  told = capsys.readouterr().out
  assert "does NOT fit: a device needs 20.00 GiB, it has 16.00 GiB" in told
  assert "17.00 GiB" in told  # All else.
  record = plan.to_dict(found)
  assert record["fits"] is False
  assert json.dumps(record)


@pytest.mark.parametrize(
  ("kind", "sent"),
  [
    ("all-gather", 7 * 100),
    ("reduce-scatter", 7 * 100),
    ("all-reduce", 2 * 7 * 100),
    ("collective-permute", 800),
  ],
)
def test_the_same_array_counts_the_same_however_it_is_exchanged(kind, sent):
  # Of 800 bytes, on eight devices.
  assert plan_weak_scaling.exchanged(kind, sent, 8) == 800


@pytest.mark.compile
@pytest.mark.parametrize("what", ["train", "decode"])
def test_a_small_plan(what, tmp_path, monkeypatch, capsys):
  path = tmp_path / "plan.json"
  arguments = (
    "--preset smoke --topology v5e:2x2 --mesh fsdp=2,heads=2 --batch 4 "
    f"--seq 64 --what {what} --json {path}"
  )
  monkeypatch.setattr("sys.argv", ["plan.py", *arguments.split()])
  plan.main()
  told = capsys.readouterr().out
  assert "fits" in told
  record = json.loads(path.read_text())
  assert record["fits"]
  memory = record["memory_bytes"]
  # Most parameters are split over two or four devices.
  whole = 4 * record["parameters"]
  assert whole / 4 < memory["parameters"] < whole / 1.8
  if what == "train":
    # Two sums of AdamW, and its counters.
    assert memory["optimizer state"] >= 2 * memory["parameters"]
    assert memory["optimizer state"] < 2.1 * memory["parameters"]
  assert any("heads" in kind for kind in record["sent_bytes"])
  assert record["roofline_s"]["bound"] in ("compute", "hbm", "ici")
