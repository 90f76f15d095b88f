"""The server as a process: how it ends, gently and not."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import openai
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def serving(*options):
  """A server over a fake engine; its process and a client."""
  process = subprocess.Popen(
    [sys.executable, "-m", "tests.serve.fake_engine", *options],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    line = process.stdout.readline()
    assert line.startswith("serving fake at http://127.0.0.1:")
    url = line.split()[3]
    with openai.OpenAI(
      base_url=f"{url}v1", api_key="none", max_retries=0, timeout=20
    ) as client:
      yield process, client
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def streaming(client, max_tokens=100):
  stream = client.completions.create(
    model="fake", prompt="a", max_tokens=max_tokens, temperature=0, stream=True
  )
  next(stream)
  return stream


def test_sigterm_finishes_what_runs_within_the_grace_period():
  options = ("--turn-s", "0.02", "--grace-s", "2")
  with serving(*options) as (process, client):
    short = streaming(client, max_tokens=30)
    long = streaming(client, max_tokens=250)
    process.send_signal(signal.SIGTERM)
    assert list(short)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.APIError, match="stopped before the end"):
      list(long)
    assert process.wait(20) == 0
    said = process.stdout.read()
    assert "SIGTERM: finishing what runs" in said
    assert said.endswith("stopped\n")


def test_a_second_sigterm_ends_at_once_even_if_the_engine_hangs():
  with serving("--hang-at", "3") as (process, client):
    stream = streaming(client)
    process.send_signal(signal.SIGTERM)
    assert "finishing" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    with pytest.raises(Exception, match="onnection"):
      list(stream)
