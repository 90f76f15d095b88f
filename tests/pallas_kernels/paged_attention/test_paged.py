"""Paged attention, every implementation against NumPy in float64."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platform
from pallas_kernels.paged_attention import (
  PageTable,
  mosaic_tpu,
  paged_attention,
)
from pallas_kernels.paged_attention.steps import make_steps
from tests.pallas_kernels.paged_attention.cases import (
  FORWARD,
  IMPLEMENTATIONS,
  draw,
  expected,
  run,
  small_turns,
)

_small_turns = pytest.fixture(autouse=True)(small_turns)
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@hypothesis.given(
  lengths=st.lists(st.integers(0, 45), min_size=1, max_size=5),
  seed=st.integers(0, 1000),
  queries=st.sampled_from([1, 3, 8]),
  partly=st.booleans(),
)
@hypothesis.settings(max_examples=6)
def test_equals_softmax_over_the_row(
  implementation, lengths, seed, queries, partly
):
  arrays, table, rows = draw(seed, lengths, Q=queries)
  seen = None
  if partly:
    rng = np.random.default_rng(seed)
    limits = rng.integers(0, 50, (len(lengths), queries))
    seen = jnp.asarray(limits, jnp.int32)
  got = run(implementation, arrays, table, seen=seen)
  want = expected(arrays[0], rows, seen)
  np.testing.assert_allclose(got, want, atol=FORWARD)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_by_its_bits(implementation):
  """As CPUs update it in place; short pages, several a step."""
  (q, *pool), table, _ = draw(4, [45, 7, 0, 8], page=16, dtype=jnp.bfloat16)
  bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in pool]
  want = run(implementation, (q, *pool), table)
  got = run(implementation, (q, *bits), table)
  np.testing.assert_array_equal(got, want)


def test_nothing_is_read_of_rows_of_no_tokens():
  arrays, table, _ = draw(0, [0, 0])
  for implementation in IMPLEMENTATIONS:
    got = run(implementation, arrays, table)
    np.testing.assert_array_equal(got, np.zeros_like(got), implementation)


# Cores, and bytes of the queries and outputs of a grid step.
@pytest.mark.parametrize(("cores", "row_bytes"), [(1, 1), (2, 1), (2, 1 << 20)])
def test_tpu_cores_share_the_rows(monkeypatch, cores, row_bytes):
  monkeypatch.setattr(mosaic_tpu, "_cores", lambda: cores)
  monkeypatch.setattr(mosaic_tpu, "_ROW_BYTES", row_bytes)
  monkeypatch.setattr(mosaic_tpu, "_SHARED_ROWS", 2)
  arrays, table, rows = draw(1, [0, 3, 0, 0, 39, 17, 70])
  got = run("mosaic_tpu", arrays, table)
  np.testing.assert_allclose(got, expected(arrays[0], rows), atol=FORWARD)


@pytest.mark.slow
def test_no_races_and_nothing_uninitialised_is_read(monkeypatch):
  # Rows of part of a page, whole turns, several turns, and none; copies that
  # begin in one grid step and end in another.
  monkeypatch.setattr(mosaic_tpu, "_ROW_BYTES", 1 << 14)
  arrays, table, rows = draw(1, [3, 16, 0, 39, 90])
  got = run("mosaic_tpu", arrays, table, interpret=RACES)
  np.testing.assert_allclose(got, expected(arrays[0], rows), atol=FORWARD)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation):
  arrays, table, _ = draw(2, [40, 7, 33], page=16, dtype=jnp.bfloat16)
  wide = tuple(x.astype(jnp.float32) for x in arrays)
  exact = run("reference", wide, table)
  # The same sums with every step rounded.
  plain = run("reference", arrays, table)
  worst = np.abs(np.asarray(plain, np.float32) - exact).max()
  got = run(implementation, arrays, table)
  assert got.dtype == jnp.bfloat16
  assert np.abs(np.asarray(got, np.float32) - exact).max() <= 2 * worst


@hypothesis.given(
  lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
  pages=st.sampled_from([1, 2, 3]),
)
@hypothesis.settings(max_examples=5)
def test_steps_cover_every_token_once(lengths, pages):
  page = 4
  _, table, _ = draw(0, lengths, page=page)
  steps = make_steps(table, pages * page, page)
  read = []
  for row, first in zip(steps.row, steps.first, strict=True):
    if row < len(lengths):
      last = min(int(first) + pages * page, lengths[row])
      read += [(int(row), token) for token in range(first, last)]
  assert read == [(r, t) for r, n in enumerate(lengths) for t in range(n)]
  assert int(steps.num_steps) == sum(-(-n // (pages * page)) for n in lengths)


def test_contiguous_caches_are_pages():
  rng = np.random.default_rng(0)
  cache = rng.normal(size=(2, 3, 32, 8))
  q = rng.normal(size=(6, 2, 8))
  lengths = [32, 0, 9, 16, 1, 31]
  pools = [jnp.asarray(cache.reshape(-1, 8, 8), jnp.float32)] * 2
  table = PageTable.contiguous(jnp.asarray(lengths), pages_per_row=4)
  got = run("xla", (jnp.asarray(q, jnp.float32), *pools), table)
  rows = [
    (kv[:n], kv[:n])
    for kv, n in zip(cache.reshape(6, 32, 8), lengths, strict=True)
  ]
  np.testing.assert_allclose(got, expected(q, rows), atol=FORWARD)


def test_bad_input_is_named():
  (q, k, v), table, _ = draw(0, [9, 3])

  def call(q=q, k=k, v=v, table=table, **options):
    return paged_attention(q, k, v, table, **options)

  def changed(**fields):
    return dataclasses.replace(table, **fields)

  for name, bad in {
    "q": {"q": q[0]},
    "k_pages": {"k": k[..., :4]},
    "v_pages": {"v": v[:, :3]},
    "k_pages's dtype": {"v": v.astype(jnp.bfloat16)},
    "table.lengths": {"table": changed(lengths=table.lengths[:1])},
    "table.pages": {"table": changed(pages=table.pages.astype(jnp.float32))},
    "seen": {"seen": jnp.zeros((2, 1), jnp.int32)},
    "implementation": {"implementation": "cuda"},
  }.items():
    with pytest.raises(ValueError, match=name):
      call(**bad)
  with pytest.raises(NotImplementedError, match="needs a TPU"):
    call(implementation="mosaic_tpu")
  (q, k, v), small, _ = draw(0, [9], page=4)
  with (
    platform.interpreting(),
    pytest.raises(NotImplementedError, match="multiple of 8 tokens, got 4"),
  ):
    call(q, k, v, small, implementation="mosaic_tpu")


def test_page_numbers_out_of_range_read_some_page():
  (q, k, v), table, _ = draw(0, [9, 20])
  k, v = (jnp.nan_to_num(x) for x in (k, v))
  wrong = table.pages.at[0].set(-1).at[1].set(10**6)
  bad = dataclasses.replace(table, pages=wrong)
  for implementation in IMPLEMENTATIONS:
    got = run(implementation, (q, k, v), bad)
    good = run(implementation, (q, k, v), table)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[1], good[1])
