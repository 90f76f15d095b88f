"""The same clients against the real engine, and what is left of them."""

import asyncio
import gc
import pathlib
from collections.abc import Sequence

import jax
import pytest

from jaxheads.data import ByteTokenizer
from jaxheads.kvcache import make_policy
from jaxheads.serve.engine import Engine, EngineConfig
from jaxheads.serve.request import Request, SamplingParams
from tests.models.builders import ROUTED, small_config, small_model
from tests.serve.abuse import Ask, abuse
from tests.serve.live import live, wait_until

CONFIG = small_config(
  ROUTED, None, vocab_size=ByteTokenizer.vocab_size, max_seq_len=256
)


def engine(max_waiting, num_pages):
  policy = make_policy(
    "task_kv", window=8, kernel=5, sinks=4, recent=16, top=32
  )
  sizes = EngineConfig(
    max_batch=8,
    max_waiting=max_waiting,
    page_size=16,
    num_pages=num_pages,
  )
  return Engine(small_model(CONFIG), policy=policy, budget=0.5, config=sizes)


def resident_bytes():
  gc.collect()
  pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
  return int(pages) * 4096


@pytest.fixture(scope="module")
def alone():
  alone = engine(max_waiting=2000, num_pages=500)
  alone.warm_up()
  return alone


@pytest.fixture(scope="module")
def served():
  # So few pages that requests have to give theirs up for a while.
  served = engine(max_waiting=16, num_pages=36)
  served.warm_up()
  return served


@pytest.mark.exhaustive
def test_2000_requests_from_64_clients(alone, served):
  """Every good one as the engine alone answers it; then nothing is left."""
  tokenizer = ByteTokenizer()

  def offline(asks: Sequence[Ask]) -> list[str]:
    requests = [
      Request(
        id=str(number),
        prompt=tuple(tokenizer.encode(ask.prompt).tolist()),
        params=SamplingParams(
          max_tokens=ask.max_tokens,
          temperature=ask.temperature,
          seed=ask.seed,
          stop_tokens=(tokenizer.eot,),
        ),
      )
      for number, ask in enumerate(asks)
    ]
    answers = alone.generate(requests)
    return [
      # A stop token is no text.
      tokenizer.decode([e.token for e in events if e.finish != "stop"])
      for events in answers.values()
    ]

  def run(requests, seed):
    tally = asyncio.run(
      abuse(
        server.url,
        model="fake",
        offline=offline,
        requests=requests,
        seed=seed,
      )
    )
    assert tally.wrong == []
    assert tally.answered + tally.left + tally.refused == requests
    wait_until(lambda: not served.has_work())
    wait_until(lambda: server.runner._idle.is_set())
    return tally

  with live(served) as server:
    run(200, seed=1)
    before = resident_bytes(), sum(x.nbytes for x in jax.live_arrays())
    programs = served.stats().compilations
    tally = run(2000, seed=2)
    after = resident_bytes(), sum(x.nbytes for x in jax.live_arrays())
    stats = served.stats()
  print(tally, stats, before, after)
  assert stats.pages_used == stats.running == stats.waiting == 0
  assert stats.preemptions > 0
  assert stats.compilations == programs
  assert after[1] <= before[1]
  assert after[0] <= 1.05 * before[0]
