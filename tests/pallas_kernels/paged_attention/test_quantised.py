"""Quantised pages, every implementation against NumPy in float64."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import (
  mosaic_tpu,
  paged_attention,
)
from tests.pallas_kernels.paged_attention.cases import (
  FORWARD,
  IMPLEMENTATIONS,
  draw,
  expected,
  run,
  small_turns,
)

_small_turns = pytest.fixture(autouse=True)(small_turns)

DTYPES = [
  pytest.param(jnp.int8, id="int8"),
  pytest.param(jnp.float8_e4m3fn, id="float8_e4m3fn"),
  pytest.param(jnp.float8_e5m2, id="float8_e5m2", marks=pytest.mark.exhaustive),
]
# The greatest number, and how far rounding moves a number: by at most half a
# step of the integers, or a fraction of a float.
GREATEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
ROUNDING = {"int8": 0.5 / 127, "float8_e4m3fn": 2**-4, "float8_e5m2": 2**-3}


def quantise(pool, dtype):
  """Pages of the dtype and their scales; NaN stays where it can."""
  name = jnp.dtype(dtype).name
  peak = np.nanmax(np.abs(pool), axis=(1, 2), initial=0)
  # A page that nobody uses has no scale.
  used = np.isfinite(pool).any(axis=(1, 2))
  scales = np.where(used, np.maximum(peak, 1e-6) / GREATEST[name], np.nan)
  scaled = pool / scales[:, None, None]
  if name == "int8":
    scaled = np.where(np.isnan(scaled), 99, np.rint(scaled))
  return (
    jnp.asarray(scaled, jnp.float32).astype(dtype),
    jnp.asarray(scales, jnp.float32),
  )


def dequantised(pages, scales):
  return np.asarray(pages, np.float64) * np.asarray(scales)[:, None, None]


def quantised_case(seed, lengths, dtype, **sizes):
  """Arrays, table, scales, and the rows before and after quantising."""
  (q, *pools), table, rows = draw(seed, lengths, **sizes)
  (k, k_scales), (v, v_scales) = (
    quantise(np.asarray(pool, np.float64), dtype) for pool in pools
  )
  numbers = np.asarray(table.pages)
  rounded = []
  for start, length in zip(table.starts, lengths, strict=True):
    count = -(-length // k.shape[1])
    mine = numbers[int(start) : int(start) + count]
    rounded.append(
      tuple(
        dequantised(x[mine], scales[mine]).reshape(-1, k.shape[2])[:length]
        for x, scales in ((k, k_scales), (v, v_scales))
      )
    )
  scales = {"k_scales": k_scales, "v_scales": v_scales}
  return (q, k, v), table, scales, rows, rounded


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.given(
  page=st.sampled_from([32, 64]),
  near=st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([-1, 0, 1])),
    min_size=1,
    max_size=4,
  ),
  seed=st.integers(0, 1000),
)
@hypothesis.settings(max_examples=2)
def test_equals_attention_over_the_dequantised_pool(
  implementation, dtype, page, near, seed
):
  # 0, 1, and a token less, as many as, and one more than fill pages. What no
  # row uses is NaN: tokens (but those of int8), and scales of pages.
  lengths = [max(0, pages * page + change) for pages, change in near]
  arrays, table, scales, _, rounded = quantised_case(
    seed, lengths, dtype, page=page
  )
  assert all(np.isnan(x).any() for x in scales.values())
  got = run(implementation, arrays, table, **scales)
  want = expected(arrays[0], rounded)
  np.testing.assert_allclose(got, want, atol=FORWARD)


@pytest.mark.parametrize("page", [1, 8, 24, 160])
def test_any_page_size(page):
  lengths = [0, 1, page - 1, page, page + 1, 3 * page - 1]
  arrays, table, scales, _, rounded = quantised_case(
    3, lengths, jnp.int8, page=page
  )
  want = expected(arrays[0], rounded)
  for implementation in ("reference", "xla"):
    got = run(implementation, arrays, table, **scales)
    np.testing.assert_allclose(got, want, atol=FORWARD)


@pytest.mark.slow
def test_tpu_pages_that_are_no_power_of_two(monkeypatch):
  # Scales of several registers, of which pages fill no whole number.
  monkeypatch.setattr(mosaic_tpu, "_TOKENS", 480)
  arrays, table, scales, _, rounded = quantised_case(
    3, [500, 97, 480], jnp.int8, page=96
  )
  got = run("mosaic_tpu", arrays, table, **scales)
  np.testing.assert_allclose(got, expected(arrays[0], rounded), atol=FORWARD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_rounding(dtype):
  name = jnp.dtype(dtype).name
  (q, k, v), table, scales, rows, _ = quantised_case(
    7, [64, 33], dtype, page=32
  )
  got = np.asarray(run("xla", (q, k, v), table, **scales))
  want = expected(q, rows)
  for r, (keys, values) in enumerate(rows):
    # Rounding moves a number by no more than this part of its page's peak,
    # a logit by that times the sum of its query, a weight by e to twice that.
    q_sum = np.abs(np.asarray(q[r], np.float64)).sum(-1).max()
    shift = ROUNDING[name] * np.abs(keys).max() * q_sum * q.shape[-1] ** -0.5
    peak = np.abs(values).max()
    bound = ROUNDING[name] * peak + np.expm1(2 * shift) * peak
    error = np.abs(got[r] - want[r]).max()
    assert FORWARD < error <= bound
    # Errors of tokens average out: far inside the bound, about a step.
    assert error <= 2 * ROUNDING[name] * peak


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_queries(implementation):
  (q, k, v), table, scales, _, rounded = quantised_case(
    4, [70, 7], jnp.int8, page=32
  )
  q = q.astype(jnp.bfloat16)
  want = expected(q, rounded)
  got = run(implementation, (q, k, v), table, **scales)
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    np.asarray(got, np.float64), want, atol=2**-8 * np.abs(want).max() * 2
  )


def test_bad_scales_are_named():
  (q, k, v), table, scales, _, _ = quantised_case(0, [9], jnp.int8, page=32)
  wide = k.astype(jnp.float32)
  for name, args, options in (
    ("k_scales", (q, k, v), {}),
    ("v_scales", (q, k, v), {"k_scales": scales["k_scales"]}),
    ("k_scales", (q, wide, wide), scales),
    ("k_scales", (q, k, v), scales | {"k_scales": scales["k_scales"][:1]}),
    ("v_scales", (q, k, v), scales | {"v_scales": jnp.ones(k.shape[0], int)}),
    ("k_pages", (q, *[k.astype(jnp.int32)] * 2), scales),
    ("k_pages", (q, *[k.astype(jnp.float8_e4m3b11fnuz)] * 2), {}),
  ):
    with pytest.raises(ValueError, match=name):
      paged_attention(*args, table, **options)
