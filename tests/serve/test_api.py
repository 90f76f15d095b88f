"""The server as clients of the OpenAI schema see it, over a fake engine."""

import concurrent.futures
import dataclasses
import json
import math
import pathlib
import re
import socket
import threading

import openai
import pytest

from jaxheads.data import ByteTokenizer
from jaxheads.serve.http import Limits
from jaxheads.serve.request import Request, SamplingParams
from tests.serve import fake_engine
from tests.serve.fake_engine import EOT, FakeEngine
from tests.serve.live import live, wait_until

LIMITS = Limits(body_bytes=20_000, body_s=0.5, answers=6, seconds=20.0)


@pytest.fixture(scope="module")
def server():
  with live(FakeEngine(), limits=LIMITS) as server:
    yield server


@pytest.fixture(scope="module")
def client(server):
  with server.client() as client:
    yield client


def offline(prompt, **params):
  """The events and the text that the engine alone would give."""
  params = {"max_tokens": 16, "stop_tokens": (EOT,), **params}
  request = Request(
    id="offline",
    prompt=tuple(ByteTokenizer().encode(prompt).tolist()),
    params=SamplingParams(**params),
  )
  events = fake_engine.answer(request)
  text = ByteTokenizer().decode([event.token for event in events])
  return events, text


def test_a_completion_is_what_the_engine_gives(client):
  answer = client.completions.create(
    model="fake", prompt="hi", max_tokens=60, seed=7
  )
  events, text = offline("hi", max_tokens=60, seed=7)
  (choice,) = answer.choices
  assert choice.text == text
  assert choice.finish_reason == events[-1].finish
  assert choice.logprobs is None
  assert answer.object == "text_completion"
  assert answer.model == "fake"
  assert answer.usage.prompt_tokens == 2
  assert answer.usage.completion_tokens == len(events)
  assert answer.usage.total_tokens == 2 + len(events)


def test_the_end_of_a_document_stops_and_is_not_shown(client):
  seed = next(
    seed
    for seed in range(100)
    if offline("x", max_tokens=60, seed=seed)[0][-1].finish == "stop"
  )
  events, text = offline("x", max_tokens=60, seed=seed)
  answer = client.completions.create(
    model="fake", prompt="x", max_tokens=60, seed=seed, logprobs=0
  )
  assert answer.choices[0].finish_reason == "stop"
  assert answer.choices[0].text == text
  assert answer.usage.completion_tokens == len(events)
  assert len(answer.choices[0].logprobs.token_logprobs) == len(events) - 1


def test_streamed_pieces_join_to_the_whole(client):
  options = dict(model="fake", prompt="né", max_tokens=90, seed=3, n=2)
  whole = client.completions.create(**options)
  texts, finishes, usage = ["", ""], [None, None], None
  for chunk in client.completions.create(
    **options, stream=True, stream_options={"include_usage": True}
  ):
    for choice in chunk.choices:
      assert finishes[choice.index] is None
      assert "\ufffd" not in choice.text
      texts[choice.index] += choice.text
      finishes[choice.index] = choice.finish_reason
    usage = chunk.usage or usage
  assert texts == [choice.text for choice in whole.choices]
  assert finishes == [choice.finish_reason for choice in whole.choices]
  assert usage == whole.usage


def test_answers_come_by_prompt_and_their_seeds_count_up(client):
  answer = client.completions.create(
    model="fake", prompt=["ab", "cd"], n=2, seed=5, max_tokens=8
  )
  assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
  assert [choice.text for choice in answer.choices] == [
    offline(prompt, seed=seed, max_tokens=8)[1]
    for prompt in ("ab", "cd")
    for seed in (5, 6)
  ]
  assert answer.usage.prompt_tokens == 4
  assert answer.usage.completion_tokens == 32
  assert answer.usage.kept_fraction == 0.5


def test_tokens_are_prompts_too(client):
  text = client.completions.create(model="fake", prompt="ab", seed=1)
  one = client.completions.create(model="fake", prompt=[97, 98], seed=1)
  many = client.completions.create(
    model="fake", prompt=[[97, 98], [99, 100]], seed=1
  )
  assert one.choices[0].text == text.choices[0].text
  assert many.choices[0].text == text.choices[0].text
  assert many.choices[1].text == offline("cd", seed=1)[1]


def test_every_sampling_field_reaches_the_engine(server, client):
  client.completions.create(
    model="fake",
    prompt="",
    max_tokens=3,
    temperature=0.5,
    top_p=0.9,
    presence_penalty=0.25,
    frequency_penalty=-0.25,
    seed=11,
    logprobs=4,
    user="someone",
    extra_body={
      "top_k": 9,
      "min_p": 0.125,
      "repetition_penalty": 1.5,
      "budget": 0.75,
    },
  )
  request = server.engine.submitted[-1]
  assert request.prompt == (EOT,)
  assert request.budget == 0.75
  assert request.params == SamplingParams(
    max_tokens=3,
    temperature=0.5,
    top_k=9,
    top_p=0.9,
    min_p=0.125,
    repetition_penalty=1.5,
    presence_penalty=0.25,
    frequency_penalty=-0.25,
    seed=11,
    stop_tokens=(EOT,),
    logprobs=4,
  )
  client.completions.create(model="fake", prompt="a")
  request = server.engine.submitted[-1]
  defaults = SamplingParams(stop_tokens=(EOT,), seed=request.params.seed)
  assert request.params == defaults
  assert request.budget is None
  client.completions.create(model="fake", prompt="a")
  assert server.engine.submitted[-1].params.seed != request.params.seed


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["sat", ["mat;", "on"], "😀 x", "never"])
def test_stop_strings(server, client, stream, stop):
  _, text = offline("q", temperature=0, max_tokens=90)
  stops = [stop] if isinstance(stop, str) else stop
  ends = [text.index(stop) for stop in stops if stop in text]
  expected = text[: min(ends)] if ends else text
  cancelled = len(server.engine.cancelled)
  answer = client.completions.create(
    model="fake",
    prompt="q",
    temperature=0,
    max_tokens=90,
    stop=stop,
    stream=stream,
    logprobs=1,
  )
  chunks = list(answer) if stream else [answer]
  choices = [choice for chunk in chunks for choice in chunk.choices]
  assert "".join(choice.text for choice in choices) == expected
  assert choices[-1].finish_reason == ("stop" if ends else "length")
  tokens = [token for choice in choices for token in choice.logprobs.tokens]
  assert len(tokens) == len(expected.encode())
  # The engine does not go on for nobody.
  wait_until(lambda: len(server.engine.cancelled) == cancelled + bool(ends))


def test_logprobs_of_completions(client):
  events, text = offline("l", temperature=0, max_tokens=35, logprobs=2)
  answer = client.completions.create(
    model="fake", prompt="l", temperature=0, max_tokens=35, logprobs=2
  )
  told = answer.choices[0].logprobs
  assert told.token_logprobs == [event.logprob for event in events]
  # The é and the first three bytes of the emoji are two tokens and three.
  assert told.tokens[:3] == ["t", "h", "e"]
  assert "token_id:195" in told.tokens
  plain = [
    (offset, token)
    for offset, token in zip(told.text_offset, told.tokens, strict=True)
    if not token.startswith("token_id:")
  ]
  assert plain
  assert all(text[offset] == token for offset, token in plain)
  assert told.top_logprobs[0] == {"t": -0.5, "u": -1.5}


def test_chat(server, client):
  messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hello!"}]},
  ]
  options = dict(model="fake", messages=messages, temperature=0)
  answer = client.chat.completions.create(**options, max_completion_tokens=20)
  prompt = "system: Be brief.\nuser: Hello!\nassistant:"
  request = server.engine.submitted[-1]
  assert ByteTokenizer().decode(request.prompt) == prompt
  (choice,) = answer.choices
  assert choice.message.role == "assistant"
  assert choice.message.content == "the cat sat on the m"
  assert choice.finish_reason == "length"
  assert answer.usage.completion_tokens == 20
  # Without a limit an answer may fill the context.
  client.chat.completions.create(**options)
  limit = server.engine.submitted[-1].params.max_tokens
  assert limit == 256 - len(prompt)


def test_chat_streams_and_tells_logprobs(client):
  chunks = list(
    client.chat.completions.create(
      model="fake",
      messages=[{"role": "user", "content": "x"}],
      temperature=0,
      max_tokens=27,
      logprobs=True,
      top_logprobs=1,
      stream=True,
      stream_options={"include_usage": True},
    )
  )
  assert chunks[0].choices[0].delta.role == "assistant"
  choices = [choice for chunk in chunks for choice in chunk.choices]
  text = "".join(choice.delta.content or "" for choice in choices)
  assert text == "the cat sat on the mat; né"
  assert choices[-1].finish_reason == "length"
  assert chunks[-1].usage.completion_tokens == 27
  entries = [entry for choice in choices for entry in choice.logprobs.content]
  assert [entry.token for entry in entries[:3]] == ["t", "h", "e"]
  assert entries[0].bytes == [ord("t")]
  assert entries[0].top_logprobs[0].logprob == -0.5
  assert [entry.bytes for entry in entries[-2:]] == [None, None]


def test_an_answer_in_a_chat_ends_at_the_next_turn(server, client, monkeypatch):
  monkeypatch.setattr(fake_engine, "_TEXT", b"fine.\nuser: and you?")
  answer = client.chat.completions.create(
    model="fake", messages=[{"role": "user", "content": "x"}], temperature=0
  )
  assert answer.choices[0].message.content == "fine."
  assert answer.choices[0].finish_reason == "stop"


def test_models(client):
  assert [model.id for model in client.models.list()] == ["fake"]
  assert client.models.retrieve("fake").owned_by == "jaxheads"
  with pytest.raises(openai.NotFoundError) as error:
    client.models.retrieve("gpt-9")
  assert error.value.code == "model_not_found"


def is_error(body, param=None):
  """Whether `body` has the shape of an OpenAI error."""
  assert body.keys() == {"error"}
  assert body["error"].keys() == {"message", "type", "param", "code"}
  assert body["error"]["message"]
  assert body["error"]["param"] == param
  return True


@pytest.mark.parametrize(
  ("change", "param", "message"),
  [
    ({"foo": 1}, "foo", "unknown field `foo`"),
    ({"max_token": 1}, "max_token", "unknown field"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": []}, "prompt", "none of them empty"),
    ({"prompt": [1, "a"]}, "prompt", "must be a string"),
    ({"prompt": [1, True]}, "prompt", "must be a string"),
    ({"prompt": [257]}, "prompt", "in [0, 257), got 257"),
    ({"prompt": [-1]}, "prompt", "got -1"),
    ({"prompt": [10**400]}, "prompt", "got 1000"),
    ({"prompt": {"a": 1}}, "prompt", "must be a string"),
    ({"prompt": "x" * 256}, "prompt", "context is 256 tokens"),
    ({"max_tokens": 256}, "prompt", "the prompt has 1 and 256 to generate"),
    ({"max_tokens": 0}, "max_tokens", "at least 1, got 0"),
    ({"max_tokens": -5}, "max_tokens", "at least 1"),
    ({"max_tokens": "5"}, "max_tokens", "integer"),
    ({"max_tokens": 1.5}, "max_tokens", "integer"),
    ({"max_tokens": True}, "max_tokens", "integer"),
    ({"temperature": -1}, "temperature", "0 or more"),
    ({"temperature": "hot"}, "temperature", "number"),
    ({"temperature": math.nan}, "temperature", "finite"),
    ({"temperature": 1e300}, "temperature", "less than or equal"),
    ({"presence_penalty": -1e300}, "presence_penalty", "greater than"),
    ({"top_p": 0}, "top_p", "in (0, 1]"),
    ({"top_k": -1}, "top_k", "0 or more"),
    ({"top_k": 2**40}, "top_k", "less than"),
    ({"min_p": 2}, "min_p", "in [0, 1]"),
    ({"repetition_penalty": 0}, "repetition_penalty", "positive"),
    ({"seed": -1}, "seed", "[0, 2**63)"),
    ({"seed": 2**63}, "seed", "[0, 2**63)"),
    ({"logprobs": 21}, "logprobs", "[0, 20]"),
    ({"budget": 0}, "budget", "in (0, 1]"),
    ({"budget": 1.01}, "budget", "in (0, 1]"),
    ({"budget": "all"}, "budget", "number"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 7}, "n", "at most 6, got 7"),
    ({"n": 10**30}, "n", "less than or equal"),
    ({"prompt": ["a"] * 4, "n": 2}, "n", "at most 6, got 8"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 strings"),
    ({"stop": ""}, "stop", "1 to 256 characters"),
    ({"stop": 3}, "stop", "must be a string"),
    ({"echo": True}, "echo", "not supported"),
    ({"suffix": "x"}, "suffix", "not supported"),
    ({"best_of": 2}, "best_of", "not supported"),
    ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
    ({"stream": "yes"}, "stream", "boolean"),
    ({"stream_options": {"include_usage": True}}, None, "needs `stream`"),
    ({"stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
  ],
)
def test_what_a_completion_cannot_be(server, change, param, message):
  status, _, body = server.ask(
    "POST", "/v1/completions", {"prompt": "a", **change}
  )
  assert status == 400
  assert is_error(body, param)
  assert message in body["error"]["message"]


def test_the_readme_s_request_is_one(server):
  readme = pathlib.Path(__file__).parents[2] / "README.md"
  command = re.search(
    r"^\$ curl localhost:8000(\S+) -d '(.*)'$", readme.read_text("utf-8"), re.M
  )
  status, _, answer = server.ask("POST", command[1], command[2])
  assert status == 200
  assert answer["choices"][0]["text"]


def test_fields_that_ask_for_nothing_are_no_error(client):
  client.completions.create(
    model="fake",
    prompt="a",
    echo=False,
    suffix=None,
    best_of=1,
    logit_bias={},
    stop=None,
    n=None,
    max_tokens=None,
  )


@pytest.mark.parametrize(
  ("change", "param"),
  [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "root", "content": ""}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
    (
      {"messages": [{"role": "user", "content": "a", "name": "b"}]},
      "messages[0].name",
    ),
    ({"messages": [{"role": "user", "content": "x" * 256}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"prompt": "a"}, "prompt"),
  ],
)
def test_what_a_chat_cannot_be(server, change, param):
  good = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}
  status, _, body = server.ask(
    "POST", "/v1/chat/completions", {**good, **change}
  )
  assert status == 400
  assert is_error(body, param)


@pytest.mark.parametrize(
  "body",
  [
    b"",
    b"{",
    b'{"prompt": "a"',
    b"prompt=a",
    b'{"prompt": "\xff"}',
    b"\xff\xfe{",
    b'{"prompt": "\\ud800"}',
    b"[" * 10_000,
    b"null",
    b"[]",
    b'"prompt"',
    b'{"prompt": "a"} {}',
  ],
)
def test_bodies_that_are_no_request(server, body):
  for path in ("/v1/completions", "/v1/chat/completions"):
    status, _, told = server.ask("POST", path, body)
    assert status == 400
    assert is_error(told)


def test_paths_methods_and_models_that_are_not_there(server, client):
  for method, path, expected in (
    ("GET", "/v1/nothing", 404),
    ("POST", "/v1/embeddings", 404),
    ("GET", "/v1/completions", 405),
    ("DELETE", "/health", 405),
  ):
    status, _, body = server.ask(method, path)
    assert (status, is_error(body)) == (expected, True)
  with pytest.raises(openai.NotFoundError, match="no model 'gpt-9' here"):
    client.completions.create(model="gpt-9", prompt="a")


def test_a_huge_body_is_refused(server):
  body = b'{"prompt": "' + b"x" * 30_000 + b'"}'
  status, _, told = server.ask("POST", "/v1/completions", body)
  assert (status, is_error(told)) == (413, True)
  # Without a length, and more than anyone would throw away.
  with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
    connection.sendall(
      b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
      b"transfer-encoding: chunked\r\n\r\n"
    )
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    try:
      for _ in range(1000):
        connection.sendall(chunk)
    except OSError:
      pass  # The server does not listen any more.
    else:
      pytest.fail("16 MB were taken")
  # With a question before it: not sent at all.
  with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
    connection.sendall(
      b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
      b"expect: 100-continue\r\ncontent-length: 100000000\r\n\r\n"
    )
    assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_waited_for(server):
  with socket.create_connection(("127.0.0.1", server.port), 10) as connection:
    connection.sendall(
      b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
      b'content-length: 100\r\n\r\n{"prompt"'
    )
    assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_metrics_count(server, client):
  names = {
    "ok": 'jaxheads_requests_total{outcome="ok"}',
    "invalid": 'jaxheads_requests_total{outcome="invalid"}',
    "prompt": "jaxheads_prompt_tokens_total",
    "generated": "jaxheads_generated_tokens_total",
    "first": "jaxheads_time_to_first_token_seconds_count",
    "inter": "jaxheads_inter_token_seconds_count",
  }
  client.completions.create(model="fake", prompt="a")
  server.ask("POST", "/v1/completions", b"{")
  before = {key: server.metric(name) for key, name in names.items()}
  client.completions.create(
    model="fake", prompt="abc", max_tokens=5, temperature=0
  )
  list(
    client.completions.create(
      model="fake", prompt="abc", max_tokens=5, temperature=0, stream=True
    )
  )
  server.ask("POST", "/v1/completions", b"{")
  after = {key: server.metric(name) for key, name in names.items()}
  assert {key: after[key] - before[key] for key in names} == {
    "ok": 2,
    "invalid": 1,
    "prompt": 6,
    "generated": 10,
    "first": 2,
    "inter": 8,
  }
  assert server.metric('jaxheads_pages{state="total"}') == 100
  assert server.metric("jaxheads_queue_length") == 0


# What follows needs an engine of its own.


def test_a_full_queue_is_429_and_takes_all_of_a_request_or_none():
  engine = FakeEngine(batch=1, queue=2, turn_s=0.02)
  with live(engine) as server, server.client() as client:
    stream = client.completions.create(
      model="fake", prompt="a", max_tokens=200, temperature=0, stream=True
    )
    next(stream)  # It runs now, and two may wait.
    with pytest.raises(openai.RateLimitError) as error:
      client.completions.create(model="fake", prompt="a", n=3, max_tokens=5)
    assert error.value.response.headers["retry-after"] == "1"
    assert error.value.code == "queue_full"
    assert is_error({"error": error.value.body})
    # The two that had been taken are not left behind.
    stream.close()
    client.completions.create(model="fake", prompt="a", n=2, max_tokens=5)
    assert server.metric('jaxheads_requests_total{outcome="busy"}') == 1
    assert server.metric("jaxheads_queue_length") == 0


def test_what_nobody_waits_for_is_cancelled():
  engine = FakeEngine(turn_s=0.02)
  with live(engine) as server, server.client() as client:
    options = dict(model="fake", prompt="a", max_tokens=200, temperature=0)
    stream = client.completions.create(**options, stream=True)
    next(stream)
    stream.close()
    wait_until(lambda: not engine.has_work())
    with pytest.raises(openai.APITimeoutError):
      client.with_options(timeout=0.3).completions.create(**options, n=2)
    wait_until(lambda: not engine.has_work())
    assert len(engine.cancelled) == 3
    outcome = 'jaxheads_requests_total{outcome="cancelled"}'
    wait_until(lambda: server.metric(outcome) == 2)
    assert engine.turns < 100


def test_time_is_limited():
  engine = FakeEngine(turn_s=0.05)
  limits = dataclasses.replace(LIMITS, seconds=0.4)
  with live(engine, limits=limits) as server, server.client() as client:
    options = dict(model="fake", prompt="a", max_tokens=200, temperature=0)
    with pytest.raises(openai.InternalServerError) as error:
      client.completions.create(**options)
    assert error.value.status_code == 504
    assert is_error({"error": error.value.body})
    stream = client.completions.create(**options, stream=True)
    with pytest.raises(openai.APIError, match="longer than 0.4 seconds"):
      list(stream)
    wait_until(lambda: not engine.has_work())
    assert server.metric('jaxheads_requests_total{outcome="timeout"}') == 2


def test_a_client_that_does_not_read_holds_up_nobody():
  """Its answers are made, wait in a bounded buffer, and are thrown away."""
  engine = FakeEngine(context=100_000, batch=8)
  limits = dataclasses.replace(LIMITS, seconds=3.0)
  with live(engine, limits=limits, context=100_000) as server:
    request = json.dumps(
      {
        "prompt": "a",
        "max_tokens": 20_000,
        "temperature": 0,
        "stream": True,
        "n": 6,
        "logprobs": 20,
      }
    ).encode()
    with socket.socket() as connection:
      connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
      connection.connect(("127.0.0.1", server.port))
      connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
        b"content-length: %d\r\n\r\n" % len(request) + request
      )
      connection.recv(100)
      with server.client() as client:
        for _ in range(20):
          answer = client.completions.create(model="fake", prompt="b", seed=1)
          assert answer.choices[0].text == offline("b", seed=1)[1]
      wait_until(lambda: not engine.has_work(), 20)
      outcome = 'jaxheads_requests_total{outcome="timeout"}'
      wait_until(lambda: server.metric(outcome) == 1)


def test_an_engine_that_fails_fails_everything_at_once(caplog):
  engine = FakeEngine(turn_s=0.01, fail_at=20)
  with live(engine) as server, server.client() as client:
    options = dict(model="fake", prompt="a", max_tokens=200, temperature=0)

    def streamed():
      return list(client.completions.create(**options, stream=True))

    def whole():
      return client.completions.create(**options)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      running = [pool.submit(ask) for ask in (streamed, whole, streamed)]
      for future in running:
        with pytest.raises(openai.APIError, match="the engine has failed"):
          future.result(10)
    status, _, health = server.ask("GET", "/health")
    assert status == 503
    assert health["status"] == "failed"
    assert "out of smoke" in health["error"]
    for path, body in (
      ("/v1/completions", {"prompt": "a"}),
      ("/v1/heads", None),
    ):
      method = "GET" if body is None else "POST"
      status, _, told = server.ask(method, path, body)
      assert (status, is_error(told)) == (500, True)
    assert server.metric('jaxheads_requests_total{outcome="error"}') == 4
    assert server.ask("GET", "/v1/models")[0] == 200
  assert "out of smoke" in caplog.text


def test_draining_refuses_new_work_and_finishes_the_old():
  engine = FakeEngine(turn_s=0.01)
  with live(engine) as server, server.client() as client:
    stream = client.completions.create(
      model="fake", prompt="a", max_tokens=100, temperature=0, stream=True
    )
    first = next(stream).choices[0].text
    closing = threading.Thread(
      target=lambda: server.in_loop(server.runner.close(grace_s=20))
    )
    closing.start()
    wait_until(lambda: server.runner.draining)
    status, headers, body = server.ask("POST", "/v1/completions", {})
    assert (status, is_error(body)) == (503, True)
    assert int(headers["retry-after"]) > 0
    status, _, body = server.ask("GET", "/health")
    assert (status, body["status"]) == (503, "draining")
    rest = "".join(chunk.choices[0].text for chunk in stream)
    assert first + rest == offline("a", temperature=0, max_tokens=100)[1]
    closing.join(10)
    assert not closing.is_alive()


def test_an_engine_that_hangs_does_not_hang_the_end():
  engine = FakeEngine(hang_at=5)
  with live(engine) as server, server.client() as client:
    stream = client.completions.create(
      model="fake", prompt="a", max_tokens=100, temperature=0, stream=True
    )
    next(stream)
    assert not server.in_loop(server.runner.close(grace_s=0.1, stop_s=0.1))
    with pytest.raises(openai.APIError, match="stopped before the end"):
      list(stream)
    engine.hang_at = None
