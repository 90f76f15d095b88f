"""`experiments/serve.py`: a checkpoint over HTTP, with the real engine."""

import contextlib
import hashlib
import importlib.util
import os
import pathlib
import signal
import subprocess
import sys

import openai
import pytest

from jaxheads.data import ByteTokenizer
from jaxheads.kvcache import make_policy
from jaxheads.training import ModelOptions, RunFolder, TrainConfig
from tests.experiments.checkpoints import save_checkpoints
from tests.models.builders import ROUTED, small_config, small_model

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "serve.py"
# The last one counts.
COUNT = "--xla_force_host_platform_device_count"
CONFIG = small_config(
  ROUTED, None, vocab_size=ByteTokenizer.vocab_size, max_seq_len=256
)


@pytest.fixture(scope="module")
def script():
  spec = importlib.util.spec_from_file_location("serve", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  sys.modules["serve"] = module
  spec.loader.exec_module(module)
  yield module
  del sys.modules["serve"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  run = RunFolder(root / "train_moh-1")
  run.create(TrainConfig(model=ModelOptions(max_seq_len=256)), CONFIG)
  save_checkpoints(run, small_model(CONFIG), steps=(10,))
  return root


@contextlib.contextmanager
def serving(runs, *options, devices=1):
  """The script as a process, on so many devices; it and a client."""
  flags = os.environ["XLA_FLAGS"] + f" {COUNT}={devices}"
  process = subprocess.Popen(
    [
      *(sys.executable, SCRIPT, "--runs", runs, "--port", "0"),
      *("--max-batch", "2", *options),
    ],
    env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags},
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    said = []
    for line in process.stderr:
      said.append(line)
      if line.startswith("serving"):
        break
    assert said and said[-1].startswith("serving train_moh-1 at"), said
    url = said[-1].split()[3]
    with openai.OpenAI(
      base_url=f"{url}v1", api_key="none", max_retries=0, timeout=120
    ) as client:
      yield process, client
  finally:
    process.kill()
    process.wait()
    process.stderr.close()


def fingerprint(folder):
  return {
    str(path): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(folder.rglob("*"))
    if path.is_file()
  }


@pytest.mark.slow
def test_killed_in_mid_stream_and_started_again(runs, tmp_path, monkeypatch):
  # The second start need not compile what the first one has.
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
  before = fingerprint(runs)
  ask = dict(
    model="train_moh-1",
    prompt="def f(x):\n" * 8,
    max_tokens=40,
    seed=3,
    extra_body={"budget": 0.5},
  )
  with serving(runs) as (process, client):
    first = client.completions.create(**ask)
    # More than two at a time: surely not done when the first token is here.
    longer = {**ask, "max_tokens": 170, "n": 10, "stream": True}
    stream = client.completions.create(**longer)
    next(stream)
    process.kill()
    with pytest.raises(Exception, match="onnection"):
      list(stream)
  assert fingerprint(runs) == before
  with serving(runs) as (process, client):
    second = client.completions.create(**ask)
    assert second.choices[0].text == first.choices[0].text
    # What the policy makes of half the cache.
    assert 0.4 < second.usage.kept_fraction <= 0.5
    with pytest.raises(openai.BadRequestError, match="context is 256 tokens"):
      client.completions.create(model="train_moh-1", prompt="x" * 256)
    with pytest.raises(openai.BadRequestError, match="`budget` must be in"):
      client.completions.create(
        model="train_moh-1", prompt="x", extra_body={"budget": 2}
      )
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
  assert fingerprint(runs) == before


@pytest.mark.exhaustive
def test_replicas_of_two_devices(runs):
  ask = dict(
    model="train_moh-1", prompt="x" * 20, max_tokens=6, n=4, temperature=0
  )
  with serving(runs) as (process, client):
    want = client.completions.create(**ask).choices[0].text
  mesh = ("--mesh", "data=2,heads=2")
  with serving(runs, *mesh, devices=4) as (process, client):
    answer = client.completions.create(**ask)
    assert [choice.text for choice in answer.choices] == [want] * 4
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--run", "{runs}/none"], "there is no folder"),
    (["--policy", "magic"], "`policy` must be one of"),
    (["--budget", "0"], "`budget` must be in (0, 1]"),
    (["--max-length", "1000"], "`max_length` must be in [2, 256]"),
    (["--mesh", "heads=4"], "heads=4 does not divide the model's 2"),
    (["--mesh", "heads=3"], "heads=2 fits: `--mesh heads=2`"),
    (["--mesh", "data=2"], "fsdp must be 1 to serve, got 4 (the devices that"),
    (
      ["--mesh", "data=4,context=2"],
      "context must be 1 to serve, got 2: a turn",
    ),
    (["--mesh", "context=2"], "the nearest is `--mesh data=8,heads=1`"),
    (["--mesh", "rows=2"], "of data, fsdp, context, heads; got 'rows=2'"),
    (["--port", "70000"], "`--port` must be in [0, 65535]"),
    (["--host", "203.0.113.1"], "cannot listen there"),
    (["--preset", "magic", "--runs", "{runs}/none"], "`--preset` has no"),
  ],
)
def test_mistakes_are_told_in_one_line(
  script, runs, monkeypatch, capsys, arguments, message
):
  monkeypatch.setattr(
    sys,
    "argv",
    [
      *("serve.py", "--runs", str(runs)),
      *(argument.format(runs=runs) for argument in arguments),
    ],
  )
  with pytest.raises(SystemExit) as exit_:
    script.main()
  assert exit_.value.code == 2
  errors = [
    line
    for line in capsys.readouterr().err.splitlines()
    if line.startswith("error: ")
  ]
  assert len(errors) == 1
  assert message in errors[0]


def test_without_a_run_one_is_trained_first(
  script, tmp_path, monkeypatch, capsys
):
  jobs = []
  monkeypatch.setattr("jaxheads.training.run_job", jobs.append)
  options = script.Options(runs=tmp_path / "runs", preset="smoke")
  run = script.find_run(options)
  (job,) = jobs
  assert job.run.path == run
  assert run.parent == tmp_path / "runs"
  assert job.config.steps == 20
  assert "holds no run with a checkpoint: training the smoke preset first" in (
    capsys.readouterr().err
  )


def test_settings_follow_the_context(script):
  settings = script.policy_settings("task_kv", 1024, 10_000.0)
  assert settings == {
    **{"window": 16, "kernel": 5, "sinks": 4, "recent": 32, "top": 64}
  }
  published = script.policy_settings("task_kv", 8192, 10_000.0)
  assert published == {
    **{"window": 32, "kernel": 7, "sinks": 16, "recent": 256, "top": 512}
  }
  for name in ("snapkv", "ada_pyramid", "expected", "full", "streaming"):
    make_policy(name, **script.policy_settings(name, 256, 10_000.0))
