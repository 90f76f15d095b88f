"""A server in this process, on a free port."""

import asyncio
import contextlib
import http.client
import json
import threading
import time

import openai
import uvicorn

from jaxheads.data import ByteTokenizer
from jaxheads.serve.http import Served, create_app
from jaxheads.serve.runner import Runner
from tests.serve.fake_engine import ABOUT


class Live:
  """What a test knows of a running server."""

  def __init__(self, engine, port, runner, loop):
    self.engine = engine
    self.port = port
    self.url = f"http://127.0.0.1:{port}"
    self.runner = runner
    self.loop = loop

  def client(self, **options):
    return openai.OpenAI(**self._options(options))

  def async_client(self, **options):
    return openai.AsyncOpenAI(**self._options(options))

  def _options(self, options):
    return {
      "base_url": f"{self.url}/v1",
      "api_key": "none",
      "max_retries": 0,
      "timeout": 30.0,
      **options,
    }

  def ask(self, method, path, body=None, headers=None):
    """Status, headers and JSON (or text) of one plain request."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
    with contextlib.closing(connection):
      if isinstance(body, dict):
        body = json.dumps(body)
      connection.request(method, path, body, headers or {})
      response = connection.getresponse()
      text = response.read().decode()
      if response.headers.get_content_type() == "application/json":
        text = json.loads(text)
      return response.status, response.headers, text

  def metric(self, name):
    """The value of one line of /metrics."""
    _, _, text = self.ask("GET", "/metrics")
    for line in text.splitlines():
      if line.startswith(f"{name} "):
        return float(line.split()[-1])
    return None

  def in_loop(self, coroutine, timeout=30):
    """What `coroutine` returns in the server's own event loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(
      timeout
    )


@contextlib.contextmanager
def live(engine, *, limits=None, context=256, name="fake"):
  """Serves `engine` within; afterwards nothing of it is left."""
  ready = threading.Event()
  held = {}

  async def run():
    runner = Runner(engine)
    runner.start()
    served = Served(
      name=name, tokenizer=ByteTokenizer(), context=context, about=ABOUT
    )
    server = uvicorn.Server(
      uvicorn.Config(
        create_app(runner, served, limits),
        port=0,
        access_log=False,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=2,
        ws="none",
      )
    )
    held.update(server=server, runner=runner, loop=asyncio.get_running_loop())
    serving = asyncio.create_task(server.serve())
    while not server.started:
      await asyncio.sleep(0.005)
    held["port"] = server.servers[0].sockets[0].getsockname()[1]
    ready.set()
    await serving
    await runner.close(grace_s=0, stop_s=0.2)

  thread = threading.Thread(target=lambda: asyncio.run(run()))
  thread.start()
  assert ready.wait(30)
  try:
    yield Live(engine, held["port"], held["runner"], held["loop"])
  finally:
    held["server"].should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def wait_until(condition, seconds=10):
  """Returns when `condition()` holds; fails if it does not in time."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)
