"""Generation: same tokens as the slow way, one compile, sane sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import generate
from jaxheads.models.generate import _sample, step
from tests.models.builders import (
  BY_NORM,
  ROUTED,
  VOCAB,
  forward,
  random_tokens,
  small_config,
  small_model,
)


@pytest.fixture(scope="module")
def model():
  return small_model(small_config(ROUTED, ROUTED, BY_NORM))


def tokens_of(stream):
  return np.stack(list(stream), axis=1)


def test_greedy_equals_the_argmax_of_the_full_forward(model):
  prompt = random_tokens(3, 5)
  new = tokens_of(generate(model, prompt, max_new_tokens=6, temperature=0))
  assert new.shape == (3, 6)
  assert new.dtype == np.int32
  # Causal: the logits of the whole text are those of each of its beginnings.
  logits = forward(model, jnp.concatenate([prompt, new], axis=1))
  np.testing.assert_array_equal(new, jnp.argmax(logits[:, 4:-1], axis=-1))


def test_model_is_left_as_it_was(model):
  before = jax.tree.map(lambda x: np.array(x), nnx.state(model))
  graphdef = nnx.graphdef(model)
  list(generate(model, random_tokens(3, 5), max_new_tokens=3, temperature=0))
  assert nnx.graphdef(model) == graphdef
  jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_compiles_once_for_any_number_of_tokens(model):
  prompt = random_tokens(3, 5)
  key = jax.random.key(0)
  list(generate(model, prompt, max_new_tokens=2, key=key))
  compiled = step._cache_size()
  # More tokens, other numbers, another key, the same shapes.
  stream = generate(
    model, prompt, max_new_tokens=20, temperature=0.3, key=jax.random.key(1)
  )
  assert len(list(stream)) == 20
  assert step._cache_size() == compiled


def test_same_key_same_text_and_another_key_another_text(model):
  prompt = random_tokens(3, 5)

  def sample(seed):
    return tokens_of(
      generate(
        model,
        prompt,
        max_new_tokens=16,
        temperature=2.0,
        key=jax.random.key(seed),
      )
    )

  np.testing.assert_array_equal(sample(0), sample(0))
  assert (sample(0) != sample(1)).any()
  # The key changes from step to step: not one token over and over.
  assert len(set(sample(0)[0].tolist())) > 1


def test_streams_one_token_at_a_time(model):
  stream = generate(model, random_tokens(3, 5), max_new_tokens=5, temperature=0)
  assert next(stream).shape == (3,)
  assert len(list(stream)) == 4


def test_can_fill_the_context_to_the_last_token(model):
  prompt = random_tokens(3, 28)
  new = tokens_of(generate(model, prompt, max_new_tokens=4, temperature=0))
  assert new.shape == (3, 4)


def test_stop_token_ends_each_sequence_and_then_the_stream(model):
  prompt = random_tokens(3, 5)
  free = tokens_of(generate(model, prompt, max_new_tokens=8, temperature=0))
  stop = int(free[0, 2])
  stopped = tokens_of(
    generate(model, prompt, max_new_tokens=8, temperature=0, stop_token=stop)
  )
  ends = [row.tolist().index(stop) if stop in row else len(row) for row in free]
  assert ends[0] <= 2
  for row, (full, end) in enumerate(zip(free, ends, strict=True)):
    np.testing.assert_array_equal(
      stopped[row, : end + 1], full[: stopped.shape[1]][: end + 1]
    )
    assert (stopped[row, end:] == stop).all()
  assert stopped.shape[1] == min(8, max(ends) + 1)


PROBS = np.array([0.1, 0.5, 0.05, 0.35])


def draws(temperature, top_p, *, count=4000):
  logits = jnp.broadcast_to(
    jnp.log(jnp.asarray(PROBS, jnp.float32)), (count, 4)
  )
  tokens = _sample(
    logits,
    jax.random.key(0),
    jnp.float32(temperature),
    jnp.float32(top_p),
    nucleus=top_p < 1,
  )
  return np.bincount(np.asarray(tokens), minlength=4) / count


@pytest.mark.parametrize(
  ("temperature", "top_p", "kept"),
  [
    (1.0, 1.0, [0, 1, 2, 3]),
    (0.5, 1.0, [0, 1, 2, 3]),
    (1.0, 0.8, [1, 3]),  # 0.5 falls short of 0.8, 0.85 does not.
    (1.0, 0.9, [0, 1, 3]),
    (2.0, 0.2, [1]),  # One token is always kept.
  ],
)
def test_sampled_frequencies(temperature, top_p, kept):
  expected = np.zeros(4)
  expected[kept] = PROBS[kept] ** (1 / temperature)
  expected /= expected.sum()
  # Four standard deviations of a frequency over 4000 draws are below 0.032.
  np.testing.assert_allclose(draws(temperature, top_p), expected, atol=0.032)
  assert (draws(temperature, top_p)[expected == 0] == 0).all()


def test_temperature_zero_takes_the_lowest_of_equal_tokens():
  logits = jnp.asarray([[0.0, 2.0, 2.0]])
  for nucleus in (False, True):
    token = _sample(
      logits,
      jax.random.key(3),
      jnp.float32(0),
      jnp.float32(0.5),
      nucleus=nucleus,
    )
    assert token.tolist() == [1]


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"max_new_tokens": 0}, "`max_new_tokens` must be at least 1"),
    (
      {"max_new_tokens": 29},
      r"prompt \(4 tokens\).*\(29\) must fit in `max_seq_len` \(32\)",
    ),
    ({"temperature": -0.1}, "`temperature` must be 0 or more"),
    ({"temperature": float("nan")}, "`temperature` must be 0 or more"),
    ({"top_p": 0.0}, r"`top_p` must be in \(0, 1\]"),
    ({"top_p": 1.1}, r"`top_p` must be in \(0, 1\]"),
    ({"stop_token": VOCAB}, r"`stop_token` must be in \[0, 13\)"),
    ({"key": None}, "`key` must be given"),
    ({"prompt_tokens": [1, 2]}, r"`prompt_tokens` must have shape \[B, T\]"),
    ({"prompt_tokens": np.zeros((1, 0), np.int32)}, "at least one token"),
  ],
)
def test_bad_arguments_are_refused_at_the_call(model, fields, message):
  arguments = {
    "prompt_tokens": random_tokens(1, 4),
    "max_new_tokens": 2,
    "key": jax.random.key(0),
    **fields,
  }
  with pytest.raises(ValueError, match=message):
    generate(model, arguments.pop("prompt_tokens"), **arguments)


def test_prompt_must_be_integers(model):
  with pytest.raises(TypeError, match="`prompt_tokens` must be integers"):
    generate(model, np.zeros((1, 2), np.float32), max_new_tokens=1)
