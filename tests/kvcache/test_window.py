"""What the last queries tell: against loops, padded, short, and in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.kvcache.select import rank
from jaxheads.kvcache.window import (
  average_pool,
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
PARTS = {"sinks": jnp.int32(2), "recent": jnp.int32(5), "middle": jnp.int32(3)}


@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_of_the_window(tokens):
  q, k, v, w_o = draw(tokens, tokens, rows=16)
  expected = oracle.window_attention(q, k, 16)
  got = jax.jit(window_attention)(window(q, k, v, w_o, size=64))
  np.testing.assert_allclose(got[:, :tokens], expected, atol=FORWARD)
  assert not np.any(got[:, tokens:])
  np.testing.assert_allclose(got.sum(axis=-1), 1, atol=FORWARD)


@jax.jit
def statistics(window):
  vectors = semantic_vectors(window, top=12)
  return (
    pooled_attention(window, PARTS, kernel=7),
    window_attention(window),
    vectors,
    vectors.mean(axis=0),
  )


@pytest.mark.parametrize("tokens", LENGTHS)
def test_padding_changes_nothing(tokens):
  # Sums of another length may be added in another order, hence the tolerance.
  arrays = draw(tokens, tokens, rows=16)
  alone = statistics(window(*arrays))
  for size in (64, 96):
    padded = statistics(window(*arrays, size=size))
    for mine, theirs in zip(padded, alone, strict=True):
      mine = mine[..., : theirs.shape[-1]]
      np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize("space", ["value", "wo"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("renorm", [False, True])
def test_semantic_vectors(space, reduce, renorm):
  options = dict(top=10, space=space, reduce=reduce, renorm=renorm)
  run = jax.jit(lambda window: semantic_vectors(window, **options))
  for tokens in (3, 12, 40):  # Fewer than the window, than the top; more.
    arrays = draw(tokens, tokens)
    got = run(window(*arrays, size=48))
    expected = oracle.semantic_vectors(*arrays, 4, **options)
    np.testing.assert_allclose(got, expected, atol=FORWARD)


def test_more_top_tokens_than_there_are():
  arrays = draw(0, 9)
  got = semantic_vectors(window(*arrays, size=16), top=256)
  expected = oracle.semantic_vectors(*arrays, 4, 9)
  np.testing.assert_allclose(got, expected, atol=FORWARD)


@pytest.mark.parametrize("kernel", [1, 5, 7])
@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_pooling_counts_zeros_at_the_ends(kernel, tokens):
  x = np.random.default_rng(0).random((2, tokens)).astype(np.float32)
  got = average_pool(jnp.asarray(x), kernel)
  expected = [oracle.average_pool(row, kernel) for row in x]
  np.testing.assert_allclose(got, expected, atol=FORWARD)


@pytest.mark.parametrize("scope", ["middle", "all"])
def test_scores_of_the_middle(scope):
  q, k, v, w_o = draw(3, 30)
  C = oracle.by_group(oracle.window_attention(q, k, 4), 4)
  expected = [oracle.middle_scores(c, 2, 5, 7, scope) for c in C]
  got = pooled_attention(window(q, k, v, w_o), PARTS, kernel=7, scope=scope)
  np.testing.assert_allclose(got, expected, atol=FORWARD)


def test_rows_that_see_nothing_give_zeros():
  nothing = softmax_over(jnp.zeros((2, 4), bool), jnp.full((2, 4), jnp.nan))
  np.testing.assert_array_equal(nothing, np.zeros((2, 4)))
  large = softmax_over(jnp.asarray([[True, False]]), jnp.full((1, 2), -1e30))
  np.testing.assert_array_equal(large, [[1, 0]])


def test_statistics_of_bfloat16_are_float32():
  arrays = window(*draw(0, 20), dtype=jnp.bfloat16)
  assert window_attention(arrays).dtype == jnp.float32
  for space in ("value", "wo"):
    assert semantic_vectors(arrays, top=8, space=space).dtype == jnp.float32


def test_equal_scores_rank_by_index():
  scores = jnp.asarray([[1.0, 3, 3, 0, 3], [0.0, 0, 0, 0, 0]])
  np.testing.assert_array_equal(
    rank(scores), [[3, 0, 1, 4, 2], [0, 1, 2, 3, 4]]
  )
