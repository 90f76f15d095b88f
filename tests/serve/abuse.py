"""Many clients at once: some are good, some leave, some send rubbish."""

import asyncio
import collections
import dataclasses
import json
import random
import urllib.parse
from collections.abc import Callable, Sequence

import openai

_WORDS = "def return self né 😀 for x in range(10): print('a') \n".split(" ")

# Path and body, and never an answer.
_RUBBISH = (
  b"",
  b"{",
  b'{"prompt": "\xff"}',
  b'{"prompt": "\\udc00"}',
  b"[1, 2",
  b"null",
  b'{"prompt": 3}',
  b'{"prompt": "a", "max_tokens": -1}',
  b'{"prompt": "a", "temperature": "hot"}',
  b'{"prompt": "a", "budget": 2}',
  b'{"prompt": "a", "unknown": 1}',
  b'{"prompt": "a", "n": 1000000000}',
  b'{"prompt": "a", "max_tokens": 1000000}',
  b'{"prompt": "' + b"long " * 5000 + b'"}',
  b'{"prompt": ' + b"[" * 1000,
  b'{"messages": []}',
  b'{"model": "another", "prompt": "a"}',
)


@dataclasses.dataclass(frozen=True)
class Ask:
  """A good request."""

  prompt: str
  max_tokens: int
  temperature: float
  seed: int
  stream: bool


@dataclasses.dataclass
class Tally:
  """What happened, by kind; `wrong` says what should not have."""

  answered: int = 0
  left: int = 0
  refused: int = 0
  retried: int = 0
  wrong: list[str] = dataclasses.field(default_factory=list)


async def abuse(
  url: str,
  *,
  model: str,
  offline: Callable[[Sequence[Ask]], Sequence[str]],
  requests: int,
  clients: int = 64,
  seed: int = 0,
  longest_prompt: int = 100,
  longest_answer: int = 40,
) -> Tally:
  """Sends `requests` requests from `clients` clients.

  Args:
    offline: The texts that the engine alone gives.
  """
  rng = random.Random(seed)
  tally = Tally()
  kinds = rng.choices(("good", "leaves", "rubbish"), (7, 2, 2), k=requests)
  plan = collections.deque()
  for kind in kinds:
    words = "".join(rng.choices(_WORDS, k=rng.randint(1, longest_prompt)))
    ask = Ask(
      prompt=words.encode()[:longest_prompt].decode(errors="ignore"),
      max_tokens=rng.randint(1, longest_answer),
      temperature=rng.choice((0, 1)),
      seed=rng.randrange(2**31),
      stream=rng.random() < 0.5,
    )
    plan.append((kind, ask, rng.choice(_RUBBISH), rng.random()))
  # Before, because the clients' event loop must not stand still.
  good = [ask for kind, ask, *_ in plan if kind == "good"]
  expected = dict(zip(good, offline(good), strict=True))

  async def client_(client: openai.AsyncOpenAI) -> None:
    while plan:
      kind, ask, rubbish, share = plan.popleft()
      try:
        if kind == "good":
          await _good(client, model, ask, expected[ask], tally)
        elif kind == "leaves":
          await _leaves(client, model, ask, share, tally)
        else:
          await _rubbish(url, rubbish, tally)
      except Exception as error:
        tally.wrong.append(f"{kind} {ask}: {error!r}")

  async with openai.AsyncOpenAI(
    base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120
  ) as client:
    await asyncio.gather(*(client_(client) for _ in range(clients)))
  return tally


async def _good(
  client: openai.AsyncOpenAI,
  model: str,
  ask: Ask,
  expected: str,
  tally: Tally,
) -> None:
  while True:
    try:
      answer = await client.completions.create(
        model=model, **dataclasses.asdict(ask)
      )
      break
    except openai.RateLimitError as error:
      tally.retried += 1
      await asyncio.sleep(int(error.response.headers["retry-after"]) / 10)
  if ask.stream:
    choices = [choice async for chunk in answer for choice in chunk.choices]
  else:
    choices = answer.choices
  text = "".join(choice.text for choice in choices)
  ends = [choice.finish_reason for choice in choices if choice.finish_reason]
  if text != expected or len(ends) != 1:
    tally.wrong.append(f"{ask}: {text!r} for {expected!r}, {ends}")
  tally.answered += 1


async def _leaves(
  client: openai.AsyncOpenAI, model: str, ask: Ask, share: float, tally: Tally
) -> None:
  """Leaves at a random time, before or during the answer."""
  try:
    async with asyncio.timeout(share * share / 2):
      answer = await client.completions.create(
        model=model, **{**dataclasses.asdict(ask), "stream": True}
      )
      async for _ in answer:
        await asyncio.sleep(share / 20)
  except (TimeoutError, openai.RateLimitError):
    pass
  tally.left += 1


async def _rubbish(url: str, body: bytes, tally: Tally) -> None:
  parts = urllib.parse.urlsplit(url)
  reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
  writer.write(
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n" % len(body)
  )
  writer.write(body)
  await writer.drain()
  told = await reader.read()
  writer.close()
  head, _, body = told.partition(b"\r\n\r\n")
  status = int(head.split()[1])
  error = json.loads(body)["error"]
  assert 400 <= status < 500, (status, error)
  assert error.keys() == {"message", "type", "param", "code"}, error
  assert error["message"], error
  tally.refused += 1
