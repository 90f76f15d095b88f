"""What the last queries tell: against loops, padded, short, and in bfloat16."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.kvcache.select import largest
from jaxheads.kvcache.window import (
  average_pool,
  over_group,
  pooled_attention,
  semantic_vectors,
  softmax_over,
  window_attention,
)
from tests.kvcache import oracle
from tests.kvcache.prompts import draw, window

FORWARD = 1e-5
# One token, around a window of 16, a bucket's edge and its end.
LENGTHS = [1, 15, 16, 17, 40, 64]
PARTS = {"sinks": np.int32(2), "recent": np.int32(5), "middle": np.int32(3)}

attention = jax.jit(window_attention)
pick = jax.jit(largest)


@functools.partial(
  jax.jit, static_argnames=("top", "space", "reduce", "renorm")
)
def vectors(window, **options):
  return semantic_vectors(window, window_attention(window), **options)


@functools.partial(jax.jit, static_argnames=("kernel", "scope"))
def pooled(window, kernel=7, **options):
  attention = over_group(window_attention(window), 4, "mean")
  return pooled_attention(
    attention, window.length, PARTS, kernel=kernel, **options
  )


@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_of_the_window(tokens):
  q, k, v, w_o = draw(tokens, tokens, rows=16)
  expected = oracle.window_attention(q, k, 16)
  got = np.asarray(attention(window(q, k, v, w_o, size=64)))
  np.testing.assert_allclose(got[:, :tokens], expected, atol=FORWARD)
  assert not np.any(got[:, tokens:])
  np.testing.assert_allclose(got.sum(axis=-1), 1, atol=FORWARD)


@jax.jit
def statistics(window):
  said = vectors(window, top=12)
  return pooled(window), window_attention(window), said, said.mean(axis=0)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_padding_changes_nothing(tokens):
  # Sums of another length may be added in another order, hence the tolerance.
  arrays = draw(tokens, tokens, rows=16)
  alone = tokens if tokens in (16, 17) else 96
  mine, theirs = (
    statistics(window(*arrays, size=size)) for size in (64, alone)
  )
  for x, y in zip(mine, theirs, strict=True):
    x, y = (np.asarray(x)[..., : min(64, alone)] for x in (x, y))
    np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize(
  ("space", "reduce", "renorm"),
  [
    ("value", "mean", False),
    ("value", "max", True),
    ("wo", "mean", True),
    ("wo", "max", False),
  ],
)
def test_semantic_vectors(space, reduce, renorm):
  options = dict(top=10, space=space, reduce=reduce, renorm=renorm)
  for tokens in (3, 12, 40):  # Fewer than the window, than the top; more.
    arrays = draw(tokens, tokens)
    got = vectors(window(*arrays, size=48), **options)
    expected = oracle.semantic_vectors(*arrays, 4, **options)
    np.testing.assert_allclose(got, expected, atol=FORWARD)


def test_more_top_tokens_than_there_is_room():
  arrays = draw(0, 9)
  got = vectors(window(*arrays, size=16), top=256)
  expected = oracle.semantic_vectors(*arrays, 4, 9)
  np.testing.assert_allclose(got, expected, atol=FORWARD)


@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_pooling_counts_zeros_at_the_ends(kernel, tokens):
  x = np.random.default_rng(0).random((2, tokens)).astype(np.float32)
  got = jax.jit(average_pool, static_argnums=1)(x, kernel)
  expected = [oracle.average_pool(row, kernel) for row in x]
  np.testing.assert_allclose(got, expected, atol=FORWARD)


@pytest.mark.parametrize("scope", ["middle", "all"])
def test_scores_of_the_middle(scope):
  q, k, v, w_o = draw(3, 30)
  C = oracle.by_group(oracle.window_attention(q, k, 4), 4)
  expected = [oracle.middle_scores(c, 2, 5, 7, scope) for c in C]
  got = pooled(window(q, k, v, w_o), scope=scope)
  np.testing.assert_allclose(got, expected, atol=FORWARD)


def test_rows_that_see_nothing_give_zeros():
  weights = jax.jit(softmax_over)(
    np.asarray([[False, False], [True, False]]),
    np.asarray([[np.nan, -1e30], [-1e30, np.nan]], np.float32),
  )
  np.testing.assert_array_equal(weights, [[0, 0], [1, 0]])


def test_statistics_of_bfloat16_are_float32():
  arrays = window(*draw(0, 20), dtype=jnp.bfloat16)
  for statistic in (
    pooled,
    functools.partial(vectors, top=8, space="value"),
    functools.partial(vectors, top=8, space="wo"),
  ):
    assert jax.eval_shape(statistic, arrays).dtype == jnp.float32


def test_bfloat16_is_not_rounded_again():
  # The same numbers as float32 give the same attention.
  rounded = window(*draw(0, 20), dtype=jnp.bfloat16)
  exact = rounded._replace(
    **{name: getattr(rounded, name).astype(np.float32) for name in "qkv"}
  )
  np.testing.assert_allclose(attention(rounded), attention(exact), atol=FORWARD)


@hypothesis.given(
  scores=st.lists(
    st.sampled_from([-np.inf, 0, 1, 2, np.inf]), min_size=5, max_size=5
  ),
  count=st.integers(-1, 7),
)
def test_the_largest_and_the_lowest_of_equals(scores, count):
  got = pick(np.asarray(scores, np.float32), np.int32([count]))
  expected = sorted(oracle.largest(scores, max(count, 0)))
  assert list(np.flatnonzero(got)) == expected
