"""The server as a process: its socket, its signals, its end."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from jaxheads.errors import UserError
from jaxheads.serve.http.app import create_app
from jaxheads.serve.http.served import Limits, Served
from jaxheads.serve.runner import AnyEngine, Runner

# So long a connection may be idle: longer than clients keep theirs, or they
# would ask on one that is being closed.
_IDLE_S = 75
# So long may connections take to send what is left for them at the end.
_LAST_BYTES_S = 5


def serve(
  engine: AnyEngine,
  served: Served,
  *,
  host: str,
  port: int,
  limits: Limits | None = None,
  grace_s: float = 30.0,
  say: Callable[[str], None] = print,
) -> int:
  """Serves until SIGTERM or Ctrl-C; then finishes what runs.

  From the signal on new requests are refused with 503. What runs may take
  `grace_s`; what then still runs gets an error. A second signal ends the
  process at once.

  Args:
    host, port: Where to listen; port 0 takes a free one.
    limits: What one request may ask for.
    say: Told where the server listens, and why it ends.
  Returns:
    Exit status: 0 after SIGTERM, 130 after Ctrl-C, 1 if the engine hangs.
  Raises:
    UserError: It cannot listen there.
  """
  if not 0 <= port < 2**16:
    raise UserError(f"`--port` must be in [0, 65535], got {port}")
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    listener = socket.create_server((host, port), family=family, backlog=2048)
  except OSError as error:
    raise UserError(
      f"`--host` {host} `--port` {port}: cannot listen there: {error}"
    ) from error
  with listener:
    return asyncio.run(
      _serve(engine, served, listener, limits, grace_s=grace_s, say=say)
    )


class _Server(uvicorn.Server):
  """Leaves signals alone."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    yield


async def _serve(
  engine: AnyEngine,
  served: Served,
  listener: socket.socket,
  limits: Limits | None,
  *,
  grace_s: float,
  say: Callable[[str], None],
) -> int:
  runner = Runner(engine)
  runner.start()
  server = _Server(
    uvicorn.Config(
      create_app(runner, served, limits),
      access_log=False,
      lifespan="off",
      log_config=None,
      server_header=False,
      timeout_graceful_shutdown=_LAST_BYTES_S,
      timeout_keep_alive=_IDLE_S,
      ws="none",
    )
  )
  asked: list[signal.Signals] = []
  stop = asyncio.Event()

  def on_signal(number: signal.Signals) -> None:
    if asked:
      say(f"{number.name} again: ending at once")
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(128 + number)
    asked.append(number)
    say(
      f"{number.name}: finishing what runs, for at most {grace_s:g} seconds; "
      "again to end at once"
    )
    stop.set()

  loop = asyncio.get_running_loop()
  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, on_signal, number)
  serving = asyncio.create_task(server.serve(sockets=[listener]))
  serving.add_done_callback(lambda _: stop.set())
  address, port = listener.getsockname()[:2]
  shown = f"[{address}]" if ":" in address else address
  say(f"serving {served.name} at http://{shown}:{port}/ (API: /v1)")
  await stop.wait()
  ended = await runner.close(grace_s=grace_s)
  server.should_exit = True
  await serving
  if not ended:
    # Python would wait for the thread, or crash in it.
    say("the engine does not end its turn; ending without it")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
  say("stopped")
  return 130 if asked == [signal.SIGINT] else 0
