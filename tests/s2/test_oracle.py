"""The oracle itself: closed forms against the formula, gradients by steps."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from tests import oracles_s2
from tests.oracles import assert_close, directional_derivative


@pytest.mark.parametrize("soft_cap", [None, 1.3])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_by_finite_differences(soft_cap, with_sinks):
  rng = np.random.default_rng(0)
  B, T, S, N, K, H, Hv = 2, 7, 9, 4, 2, 3, 5
  arrays = {
    "q": rng.standard_normal((B, T, N, H)),
    "k": rng.standard_normal((B, S, K, H)),
    "v": rng.standard_normal((B, S, K, Hv)),
  }
  sinks = rng.standard_normal(N) if with_sinks else None
  seen = rng.random((B, N, T, S)) < 0.5
  seen[0, 1, 2] = False
  d_out = rng.standard_normal((B, T, N, Hv))
  d_lse = rng.standard_normal((B, T, N))
  options = {"scale": 0.7, "soft_cap": soft_cap}

  def value(**changed):
    given = {**arrays, "sinks": sinks, **changed}
    out, lse = oracles_s2.attention(seen=seen, **given, **options)
    finite = np.isfinite(lse)
    return (out * d_out).sum() + (lse[finite] * d_lse[finite]).sum()

  grads = oracles_s2.attention_grads(
    **arrays, seen=seen, d_out=d_out, d_lse=d_lse, sinks=sinks, **options
  )
  every = {**arrays, "sinks": sinks} if with_sinks else arrays
  for (name, array), grad in zip(every.items(), grads, strict=False):
    direction = rng.standard_normal(array.shape)
    slope = directional_derivative(
      lambda x, name=name: value(**{name: x}), array, direction
    )
    assert_close(slope, (grad * direction).sum(), 1e-7, f"d{name}")


def test_attention_of_one_query_by_hand():
  # Logits ln 1, ln 3: weights 1/4 and 3/4; a sink of ln 4 halves them.
  q = np.ones((1, 1, 1, 1))
  k = np.log([1.0, 3.0]).reshape(1, 2, 1, 1)
  v = np.array([8.0, 16.0]).reshape(1, 2, 1, 1)
  seen = np.ones((1, 1, 1, 2), bool)
  out, lse = oracles_s2.attention(q, k, v, seen, scale=1.0)
  np.testing.assert_allclose(out.ravel(), 14.0)
  np.testing.assert_allclose(lse.ravel(), np.log(4))
  out, lse = oracles_s2.attention(q, k, v, seen, scale=1.0, sinks=np.log([4.0]))
  np.testing.assert_allclose(out.ravel(), 7.0)
  np.testing.assert_allclose(lse.ravel(), np.log(8))


@hypothesis.given(
  local=st.integers(1, 5), stride=st.integers(1, 7), offset=st.integers(0, 6)
)
def test_closed_forms_of_rows_and_columns(local, stride, offset):
  rows = 19
  mask = oracles_s2.strided_blocks(
    1, rows, rows, local=local, stride=stride, offset=offset
  )[0]
  residue = -offset % stride
  form = {"local": local, "stride": stride, "residue": residue}
  for i in range(rows):
    kept = oracles_s2.row_blocks(i, **form)
    assert kept == list(np.nonzero(mask[i])[0]), f"row {i}"
  for j in range(rows):
    first, last = oracles_s2.column_rows(j, rows, **form)
    run = list(range(first, last + 1))
    assert run == list(np.nonzero(mask[:, j])[0]), f"column {j}"


@pytest.mark.parametrize("sign", [-1, 1])
def test_both_signs_have_the_same_union(sign):
  mask = oracles_s2.strided_blocks(8, 40, 40, local=2, stride=8, sign=sign)
  assert oracles_s2.union_complete(mask)
