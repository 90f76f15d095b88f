"""64 clients at once, some of which leave or send rubbish."""

import asyncio
from collections.abc import Sequence

import pytest

from jaxheads.data import ByteTokenizer
from jaxheads.serve.request import Request, SamplingParams
from tests.serve import fake_engine
from tests.serve.abuse import Ask, abuse
from tests.serve.fake_engine import EOT, FakeEngine
from tests.serve.live import live, wait_until


def offline(asks: Sequence[Ask]) -> list[str]:
  return [_offline(ask) for ask in asks]


def _offline(ask: Ask) -> str:
  tokenizer = ByteTokenizer()
  request = Request(
    id="offline",
    prompt=tuple(tokenizer.encode(ask.prompt).tolist()),
    params=SamplingParams(
      max_tokens=ask.max_tokens,
      temperature=ask.temperature,
      seed=ask.seed,
      stop_tokens=(EOT,),
    ),
  )
  events = fake_engine.answer(request)
  return tokenizer.decode([event.token for event in events])


@pytest.mark.parametrize(
  "requests", [400, pytest.param(2000, marks=pytest.mark.exhaustive)]
)
def test_good_requests_are_answered_once_and_bad_ones_refused(
  requests,
):
  engine = FakeEngine(batch=8, queue=16, turn_s=0.0005)
  with live(engine) as server:
    tally = asyncio.run(
      abuse(server.url, model="fake", offline=offline, requests=requests)
    )
    assert tally.wrong == []
    total = tally.answered + tally.left + tally.refused
    assert total == requests
    assert min(tally.answered, tally.left, tally.refused) > requests // 8
    assert tally.retried > 0  # The queue was full at times.
    # Nothing is left of any of them.
    wait_until(lambda: not engine.has_work())
    wait_until(lambda: server.runner._idle.is_set())
    assert not server.runner._owners
    assert server.metric("jaxheads_queue_length") == 0
    assert server.metric('jaxheads_requests_total{outcome="error"}') is None
    assert server.ask("GET", "/health")[0] == 200
