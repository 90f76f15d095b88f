import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.serve.request import MOST_LOGPROBS, SamplingParams
from jaxheads.serve.sampling import Sampling, sample
from tests.strategies import sweep

V = 23
LOGITS = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)
# Two tokens that are equal to another, and one that cannot come.
LOGITS[[7, 11]] = LOGITS[3]
LOGITS[5] = -np.inf

run = jax.jit(sample)


def batch_of(params):
  return Sampling(*map(np.stack, zip(*map(Sampling.of, params), strict=True)))


def draw(params, logits, *, index=None, prompt=(), answer=()):
  """One call for a batch of settings; the same logits if they are [V]."""
  B = len(params)
  in_prompt = np.zeros((B, V), bool)
  in_prompt[:, list(prompt)] = True
  counts = np.tile(np.bincount(list(answer), minlength=V), (B, 1))
  return run(
    jnp.asarray(np.broadcast_to(logits, (B, V))),
    batch_of(params),
    np.arange(B, dtype=np.int32) if index is None else np.int32(index),
    in_prompt,
    counts.astype(np.int32),
  )


# The oracle: float64, token by token, as the parameters are defined.


def penalised(logits, params, prompt, answer):
  x = logits.astype(np.float64)
  for token in range(V):
    if token in prompt or token in answer:
      penalty = params.repetition_penalty
      x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    count = list(answer).count(token)
    x[token] -= params.frequency_penalty * count
    x[token] -= params.presence_penalty * (count > 0)
  return x


def softmax(x):
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def distribution(logits, params, prompt=(), answer=()):
  x = penalised(logits, params, prompt, answer)
  if params.temperature == 0:
    return np.eye(V)[x.argmax()]
  probs = softmax(x / params.temperature)
  probs[probs < params.min_p * probs.max()] = 0
  probs /= probs.sum()
  order = sorted(range(V), key=lambda token: (-probs[token], token))
  if params.top_k:
    for token in order[params.top_k :]:
      probs[token] = 0
    probs /= probs.sum()
  reached = 0.0
  kept = np.zeros(V)
  for token in order:
    if reached >= params.top_p:
      break
    kept[token] = probs[token]
    reached += probs[token]
  return kept / kept.sum()


PARAMS = [
  SamplingParams(),
  SamplingParams(temperature=0.3),
  SamplingParams(temperature=3.0),
  SamplingParams(temperature=0.0),
  SamplingParams(temperature=1e-40),
  SamplingParams(top_k=1),
  SamplingParams(top_k=4),  # Cuts between equals.
  SamplingParams(top_k=2**40),
  SamplingParams(top_p=0.6),
  SamplingParams(top_p=1e-6),
  SamplingParams(min_p=0.2),
  SamplingParams(min_p=1.0),
  SamplingParams(temperature=1.7, top_k=9, top_p=0.8, min_p=0.05),
  SamplingParams(repetition_penalty=1.8),
  SamplingParams(repetition_penalty=0.5, top_p=0.9),
  SamplingParams(presence_penalty=1.1, frequency_penalty=-0.4),
  SamplingParams(temperature=0.0, frequency_penalty=2.0),
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tokens_come_as_often_as_they_should(params):
  B = 4096
  prompt, answer = [2, 3, 9], [3, 4, 4, 4, 16]
  out = draw([params] * B, LOGITS, prompt=prompt, answer=answer)
  expected = distribution(LOGITS, params, prompt, answer)
  found = np.bincount(np.asarray(out.tokens), minlength=V) / B
  deviation = np.sqrt(expected * (1 - expected) / B)
  assert (found[expected == 0] == 0).all()
  # 23 tokens, 17 settings: one in 4.5 deviations is one chance in a thousand.
  np.testing.assert_array_less(abs(found - expected), 4.5 * deviation + 1e-9)


def test_a_batch_of_all_settings_draws_what_each_draws_alone():
  # Neither neighbours nor the slot change an answer, although every shortcut
  # is off here and on alone.
  prompt, answer = [2, 3], [4, 4]
  params = [dataclasses.replace(p, seed=i) for i, p in enumerate(PARAMS)]
  index = np.arange(len(params)) % 5
  rows = np.random.default_rng(1).normal(0, 2, (len(params), V))
  rows = rows.astype(np.float32)
  together = draw(params, rows, index=index, prompt=prompt, answer=answer)
  for i, one in enumerate(params):
    alone = draw(
      [one], rows[i], index=index[i : i + 1], prompt=prompt, answer=answer
    )
    assert alone.tokens[0] == together.tokens[i]
  turned = draw(
    params[::-1], rows[::-1], index=index[::-1], prompt=prompt, answer=answer
  )
  assert turned.tokens[::-1].tolist() == together.tokens.tolist()


def test_a_new_index_or_seed_draws_anew_and_the_same_draws_the_same():
  seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63 - 1]
  params = [SamplingParams(temperature=2.0, seed=seed) for seed in seeds]
  answers = np.stack(
    [
      np.asarray(draw(params, LOGITS, index=np.full(len(seeds), at)).tokens)
      for at in range(40)
    ]
  )
  again = draw(params, LOGITS, index=np.full(len(seeds), 7)).tokens
  assert again.tolist() == answers[7].tolist()
  assert len({tuple(column) for column in answers.T.tolist()}) == len(seeds)


def test_keys_are_those_of_jax():
  # A seed of up to 31 bits means what it means to `jax.random.key`.
  out = draw([SamplingParams(seed=77)], LOGITS, index=[3])
  key = jax.random.fold_in(jax.random.key(77, impl="threefry2x32"), 3)
  assert out.tokens[0] == jax.random.categorical(key, jnp.asarray(LOGITS))


@sweep(10)
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_only_kept_tokens_are_drawn(seed):
  rng = np.random.default_rng(seed)
  # Multiples of 1/4 have ties, and no sum of them is near a border by rounding.
  logits = (rng.integers(-20, 20, (100, V)) / 4).astype(np.float32)
  params = [
    SamplingParams(
      temperature=float(rng.choice([0.0, 0.5, 1.0, 2.0])),
      top_k=int(rng.integers(0, V + 3)),
      top_p=float(rng.uniform(0.05, 1)),
      min_p=float(rng.choice([0.0, rng.uniform(0.01, 0.9)])),
      repetition_penalty=float(rng.choice([1.0, 2.0, 0.5])),
      presence_penalty=float(rng.choice([0.0, 0.5])),
      frequency_penalty=float(rng.choice([0.0, 0.25])),
      seed=int(rng.integers(2**62)),
    )
    for _ in logits
  ]
  prompt, answer = rng.integers(0, V, 5), rng.integers(0, V, 5)
  out = draw(params, logits, prompt=prompt, answer=answer)
  for row, one, token in zip(
    logits, params, np.asarray(out.tokens), strict=True
  ):
    assert distribution(row, one, prompt, answer)[token] > 0


def test_greedy_takes_the_lowest_of_equals():
  logits = np.zeros((3, V), np.float32)
  logits[0, [4, 9]] = 1.0
  logits[1] = -np.inf
  logits[1, [20, 22]] = -5.0
  out = draw([SamplingParams(temperature=0.0)] * 3, logits)
  assert out.tokens.tolist() == [4, 20, 0]


def test_log_probabilities_are_the_models_own():
  rows = np.random.default_rng(2).normal(0, 3, (4, V)).astype(np.float32)
  rows[2] = LOGITS
  params = [
    SamplingParams(
      temperature=0.3, top_k=2, presence_penalty=2.0, logprobs=logprobs
    )
    for logprobs in (None, 0, 5, MOST_LOGPROBS)
  ]
  out = jax.tree.map(np.asarray, draw(params, rows, answer=[1, 2]))
  for i, row in enumerate(rows):
    expected = np.log(softmax(row.astype(np.float64)) + 1e-300)
    order = sorted(range(V), key=lambda token: (-row[token], token))
    order = order[:MOST_LOGPROBS]
    assert out.top_tokens[i].tolist() == order
    np.testing.assert_allclose(out.top_logprobs[i], expected[order], atol=1e-5)
    np.testing.assert_allclose(
      out.logprobs[i], expected[out.tokens[i]], atol=1e-5
    )


def test_a_vocabulary_smaller_than_the_report():
  logits = jnp.asarray([[0.0, 1.0, 0.0]])
  out = run(
    logits,
    batch_of([SamplingParams(temperature=0.0, logprobs=3)]),
    np.zeros(1, np.int32),
    np.zeros((1, 3), bool),
    np.zeros((1, 3), np.int32),
  )
  assert out.top_tokens[0, :4].tolist() == [1, 0, 2, -1]
  assert out.top_logprobs[0, 3] == -np.inf


def test_new_settings_compile_nothing():
  traces = 0

  def counted(*arguments):
    nonlocal traces
    traces += 1
    return sample(*arguments)

  step = jax.jit(counted)
  for params in (*PARAMS, SamplingParams(logprobs=3)):
    step(
      jnp.asarray(LOGITS[None]),
      batch_of([params]),
      np.zeros(1, np.int32),
      np.zeros((1, V), bool),
      np.zeros((1, V), np.int32),
    )
  assert traces == 1


def unconditional(jaxpr):
  for equation in jaxpr.eqns:
    yield equation.primitive.name
    if equation.primitive.name != "cond":
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from unconditional(inner)


def test_what_costs_is_done_on_demand():
  B = 2
  jaxpr = jax.make_jaxpr(sample)(
    jnp.zeros((B, V)),
    Sampling.idle(B),
    np.zeros(B, np.int32),
    np.zeros((B, V), bool),
    np.zeros((B, V), np.int32),
  )
  always = set(unconditional(jaxpr.jaxpr))
  assert "argmax" in always and "cond" in always
  assert not always & {"sort", "top_k", "cumsum", "random_bits", "exp", "log"}


def test_idle_slots_are_greedy():
  out = run(
    jnp.asarray(np.tile(LOGITS, (2, 1))),
    Sampling.idle(2),
    np.zeros(2, np.int32),
    np.zeros((2, V), bool),
    np.zeros((2, V), np.int32),
  )
  assert out.tokens.tolist() == [LOGITS.argmax()] * 2
  assert not out.logprobs.any() and not out.top_logprobs.any()
