"""The server as a process: how it ends, gently and not."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

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


def streaming(client):
  stream = client.completions.create(
    model="fake", prompt="a", max_tokens=100, temperature=0, stream=True
  )
  next(stream)
  return stream


def test_sigterm_finishes_what_runs_and_exits_with_0():
  with serving("--turn-s", "0.01") as (process, client):
    stream = streaming(client)
    process.send_signal(signal.SIGTERM)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    assert process.wait(20) == 0
    said = process.stdout.read()
    assert "SIGTERM: finishing what runs" in said
    assert said.endswith("stopped\n")


def test_what_outlasts_the_grace_period_gets_an_error():
  options = ("--turn-s", "0.1", "--grace-s", "0.3")
  with serving(*options) as (process, client):
    stream = streaming(client)
    process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError, match="stopped before the end"):
      list(stream)
    assert process.wait(20) == 130


def test_a_second_sigterm_ends_at_once_even_if_the_engine_hangs():
  with serving("--hang-at", "3") as (process, client):
    stream = streaming(client)
    process.send_signal(signal.SIGTERM)
    assert "finishing" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    with pytest.raises((openai.APIError, OSError, Exception)):
      list(stream)


def test_clients_of_a_killed_server_get_an_error_and_no_hang():
  with serving("--turn-s", "0.05") as (process, client):
    outcomes = []

    def read(stream):
      try:
        outcomes.append(list(stream))
      except Exception as error:
        outcomes.append(error)

    streams = [streaming(client) for _ in range(3)]
    readers = [
      threading.Thread(target=read, args=(stream,)) for stream in streams
    ]
    for reader in readers:
      reader.start()
    time.sleep(0.2)
    process.kill()
    for reader in readers:
      reader.join(10)
      assert not reader.is_alive()
    assert len(outcomes) == 3
    assert all(isinstance(outcome, Exception) for outcome in outcomes)
    with pytest.raises(openai.APIConnectionError):
      streaming(client)
