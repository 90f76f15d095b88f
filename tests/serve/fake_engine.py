"""An engine without a model: deterministic, quick, and bad when told to be.

As a program it serves: python -m tests.serve.fake_engine --help
"""

import argparse
import collections
import dataclasses
import random
import sys
import time
from collections.abc import Iterator

from jaxheads.serve.engine import EngineStats
from jaxheads.serve.request import Event, QueueFull, Request

VOCAB = 257
EOT = 256
ABOUT = {"policy": "fixed", "budget": 1.0, "num_layers": 3, "num_kv_heads": 4}
# A text as a byte-level model might write it: also characters of several bytes.
_TEXT = "the cat sat on the mat; né, 😀 x = [1, 2]\n".encode()


def answer(request: Request) -> list[Event]:
  """All events of a request: what an engine gives offline."""
  return list(events_of(request))


def events_of(request: Request) -> Iterator[Event]:
  """The same, one by one."""
  params = request.params
  draw = random.Random(f"{request.prompt} {params.seed}")
  start = 0 if params.temperature == 0 else draw.randrange(len(_TEXT))
  for index in range(params.max_tokens):
    token = _TEXT[(start + index) % len(_TEXT)]
    if params.temperature > 0 and draw.random() < 0.01:
      token = EOT
    stopped = token in params.stop_tokens
    finish = "stop" if stopped else None
    if not stopped and index == params.max_tokens - 1:
      finish = "length"
    told = params.logprobs
    yield Event(
      request_id=request.id,
      token=token,
      logprob=None if told is None else -0.5 - index % 4,
      top_logprobs=tuple(
        ((token + offset) % VOCAB, -0.5 - offset) for offset in range(told or 0)
      ),
      finish=finish,
    )
    if finish:
      return


@dataclasses.dataclass
class _Running:
  request: Request
  events: Iterator[Event]
  generated: int = 0


class FakeEngine:
  """Continues prompts with a fixed text that begins where the seed says.

  Args:
    context: Tokens of prompt and answer together.
    batch: Requests that run at once.
    queue: Requests that may wait.
    turn_s: What a turn takes.
    fail_at: The turn that raises.
    hang_at: The turn that never ends.
  """

  def __init__(
    self,
    *,
    context: int = 256,
    batch: int = 8,
    queue: int = 1000,
    turn_s: float = 0.0,
    fail_at: int | None = None,
    hang_at: int | None = None,
  ) -> None:
    self.context = context
    self.batch = batch
    self.queue = queue
    self.turn_s = turn_s
    self.fail_at = fail_at
    self.hang_at = hang_at
    self.turns = 0
    self.cancelled: list[str] = []
    self.submitted: list[Request] = []
    self._generated = 0
    self._waiting: collections.deque[Request] = collections.deque()
    self._running: dict[str, _Running] = {}

  def check(self, request: Request) -> None:
    if request.budget is not None and not 0 < request.budget <= 1:
      raise ValueError(f"`budget` must be in (0, 1], got {request.budget}.")
    if len(request.prompt) + request.params.max_tokens > self.context:
      raise ValueError("`prompt` is too long.")

  def submit(self, request: Request) -> None:
    self.check(request)
    if len(self._waiting) >= self.queue:
      raise QueueFull
    self.submitted.append(request)
    self._waiting.append(request)

  def kept_fraction(self, request: Request) -> float:
    return 0.5 if request.budget is None else request.budget

  def cancel(self, request_id: str) -> None:
    self.cancelled.append(request_id)
    self._running.pop(request_id, None)
    self._waiting = collections.deque(
      request for request in self._waiting if request.id != request_id
    )

  def step(self) -> list[Event]:
    self.turns += 1
    if self.turns == self.fail_at:
      raise RuntimeError("out of smoke")
    while self.turns == self.hang_at:
      time.sleep(1)
    time.sleep(self.turn_s)
    while self._waiting and len(self._running) < self.batch:
      request = self._waiting.popleft()
      self._running[request.id] = _Running(request, events_of(request))
    told = [next(running.events) for running in self._running.values()]
    for event in told:
      self._running[event.request_id].generated += 1
      if event.finish:
        del self._running[event.request_id]
    self._generated += len(told)
    return told

  def has_work(self) -> bool:
    return bool(self._waiting or self._running)

  def stats(self) -> EngineStats:
    return EngineStats(
      waiting=len(self._waiting),
      running=len(self._running),
      pages_total=100,
      pages_used=10 * len(self._running),
      pages_cached=0,
      preemptions=0,
      compilations=2,
      tokens_generated=self._generated,
    )

  def snapshot(self) -> list[dict]:
    """Two of four heads are full, the others keep what the budget leaves."""
    told = []
    for running in self._running.values():
      request, generated = running.request, running.generated
      prompt = len(request.prompt)
      budget = 0.5 if request.budget is None else request.budget
      kept = max(1, round(prompt * max(0.0, 2 * budget - 1)))
      full = budget >= 1
      heads = range(4)
      whole = [
        [full or head < 2 - layer % 2 for head in heads] for layer in range(3)
      ]
      tokens = [
        [(prompt if is_full else kept) + generated for is_full in row]
        for row in whole
      ]
      told.append(
        {
          "id": request.id,
          "prompt_tokens": prompt,
          "generated_tokens": generated,
          "budget": budget,
          "kept_fraction": sum(map(sum, tokens)) / (12 * (prompt + generated)),
          "kept_page_fraction": 0.75,
          "tokens": tokens,
          "pages": [[1 + count // 16 for count in row] for row in tokens],
          "full": whole,
        }
      )
    return told


def main() -> None:
  from jaxheads.data import ByteTokenizer
  from jaxheads.serve.http import Served, serve

  parser = argparse.ArgumentParser()
  parser.add_argument("--turn-s", type=float, default=0.0)
  parser.add_argument("--grace-s", type=float, default=30.0)
  parser.add_argument("--hang-at", type=int)
  parser.add_argument("--port", type=int, default=0)
  options = parser.parse_args()
  engine = FakeEngine(turn_s=options.turn_s, hang_at=options.hang_at)
  served = Served(
    name="fake", tokenizer=ByteTokenizer(), context=256, about=ABOUT
  )
  status = serve(
    engine,
    served,
    host="127.0.0.1",
    port=options.port,
    grace_s=options.grace_s,
    say=lambda line: print(line, flush=True),
  )
  sys.exit(status)


if __name__ == "__main__":
  main()
