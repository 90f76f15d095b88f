"""The pool: what is written is read, in place, also quantised."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.kvcache.names import make_policy
from jaxheads.kvcache.pages import QUANTISED, Pages
from jaxheads.kvcache.policy import CacheShape
from jaxheads.kvcache.rows import num_pages
from pallas_kernels.paged_attention import PageTable, paged_attention

H, PAGE, NUM = 4, 8, 6
# Half a step of 127 of the largest number; fp8 has 3 bits behind the first.
STEP = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127}
STEP["float8_e4m3fn"] = 2**-4


@jax.jit
def write(pages, numbers, k, v):
  return pages.write(numbers, k, v)


@jax.jit
def append(pages, numbers, offsets, is_new, k, v):
  return pages.append(numbers, offsets, is_new, k, v)


def draw(rng, *shape):
  return rng.normal(size=shape).astype(np.float32)


def close(got, want, dtype, roundings=1):
  most = np.abs(want).max(axis=(-2, -1), keepdims=True)
  error = np.abs(np.asarray(got, np.float32) - want) / np.maximum(most, 1e-9)
  assert error.max() <= roundings * STEP[dtype] * 1.001


@pytest.mark.parametrize("dtype", STEP)
def test_pages_hold_what_was_written(dtype):
  rng = np.random.default_rng(0)
  pages = Pages.empty(NUM, PAGE, H, dtype)
  k, v = draw(rng, 2, 2 * PAGE, H), draw(rng, 2, 2 * PAGE, H) * 1e3
  numbers = jnp.asarray([[3, 1], [5, 2]], jnp.int32)
  pages = write(pages, numbers, k, v)
  for got, want in zip(pages.gather(numbers), (k, v), strict=True):
    shape = (4, PAGE, H)
    close(
      np.asarray(got, np.float32).reshape(shape), want.reshape(shape), dtype
    )
  untouched = pages.gather(jnp.asarray([[4]], jnp.int32))
  np.testing.assert_array_equal(np.asarray(untouched, np.float32), 0)


@pytest.mark.parametrize("dtype", STEP)
@hypothesis.given(
  seed=st.integers(0, 1000), grows=st.sampled_from([True, False])
)
@hypothesis.settings(max_examples=4)
def test_tokens_one_by_one(dtype, seed, grows):
  """A new page may hold anything: NaN, or another's larger numbers."""
  rng = np.random.default_rng(seed)
  pages = Pages.empty(NUM, PAGE, H, dtype)
  numbers = jnp.asarray([[2], [4]], jnp.int32)
  if dtype in ("float32", "bfloat16"):
    before = np.full((2, PAGE, H), np.nan, np.float32)
  else:
    before = 1e6 * draw(rng, 2, PAGE, H)
  pages = write(pages, numbers, before, before)
  k, v = draw(rng, PAGE, 2, H), draw(rng, PAGE, 2, H)
  if grows:  # Every token needs a larger scale.
    k, v = (x * 2.0 ** np.arange(PAGE)[:, None, None] for x in (k, v))
    k, v = k.astype(np.float32), v.astype(np.float32)
  for at in range(PAGE):
    is_new = jnp.full(2, int(at == 0), jnp.int32)
    offsets = jnp.full(2, at, jnp.int32)
    pages = append(pages, numbers[:, 0], offsets, is_new, k[at], v[at])
  for got, want in zip(pages.gather(numbers), (k, v), strict=True):
    # Rounded again whenever the scale grew.
    roundings = 1 if dtype not in QUANTISED else 3
    close(got, want.swapaxes(0, 1), dtype, roundings)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_token_that_fits_changes_nothing_else(dtype):
  rng = np.random.default_rng(1)
  pages = Pages.empty(NUM, PAGE, H, dtype)
  numbers = jnp.asarray([[1], [3]], jnp.int32)
  pages = write(pages, numbers, *(draw(rng, 2, PAGE, H) for _ in "kv"))
  before = np.asarray(pages.gather(numbers))
  small = 0.01 * draw(rng, 2, H)
  offsets, old = jnp.asarray([5, 0], jnp.int32), jnp.zeros(2, jnp.int32)
  # A slot whose own number is the largest would let the scale stay too large,
  # never too small.
  pages = append(pages, numbers[:, 0], offsets, old, small, small)
  after = np.asarray(pages.gather(numbers))
  changed = (before != after).any(axis=(0, 3))
  assert not changed[0, np.arange(PAGE) != 5].any()
  assert not changed[1, np.arange(PAGE) != 0].any()


@pytest.mark.parametrize("dtype", STEP)
def test_memory_follows_the_dtype(dtype):
  pages = Pages.empty(NUM, PAGE, H, dtype)
  size = 2 * NUM * PAGE * H * jnp.dtype(dtype).itemsize
  assert pages.nbytes == size + (8 * NUM if dtype in QUANTISED else 0)


@pytest.mark.parametrize("dtype", STEP)
def test_updates_are_in_place(dtype):
  """In a loop over layers, no second pool is made."""
  pages = Pages.empty(1024, 64, 64, dtype)

  def layers(pages, numbers, offsets, new):
    def layer(pages, xs):
      numbers, offsets, new = xs
      pages = pages.append(numbers, offsets, jnp.zeros(8, jnp.int32), new, new)
      return pages, None

    return jax.lax.scan(layer, pages, (numbers, offsets, new))[0]

  ints = jax.ShapeDtypeStruct((4, 8), jnp.int32)
  new = jax.ShapeDtypeStruct((4, 8, 64), jnp.float32)
  compiled = (
    jax.jit(layers, donate_argnums=0).lower(pages, ints, ints, new).compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < pages.nbytes / 20


def test_several_tokens_at_once_equal_one_by_one():
  """A question after a prompt whose heads keep unequal parts of it."""
  rng = np.random.default_rng(2)
  kept, new = (11, 3), 4
  pages = Pages.empty(NUM, PAGE, H, "float32")
  numbers = jnp.asarray([[4, 1], [2, 0]], jnp.int32)
  pages = write(pages, numbers, draw(rng, 2, 16, H), draw(rng, 2, 16, H))
  q, k, v = (draw(rng, new, 2, H) for _ in "qkv")
  single = []
  for at in range(new):
    write_at = np.asarray(kept) + at
    page = jnp.asarray(np.asarray(numbers)[np.arange(2), write_at // PAGE])
    offset = jnp.asarray(write_at % PAGE, jnp.int32)
    pages = append(pages, page, offset, jnp.zeros(2, jnp.int32), k[at], v[at])
    table = PageTable(
      numbers.reshape(-1),
      jnp.asarray([0, 2], jnp.int32),
      jnp.asarray(write_at + 1, jnp.int32),
    )
    out = paged_attention(
      jnp.asarray(q[at])[:, None], pages.k.stored, pages.v.stored, table
    )
    single.append(np.asarray(out)[:, 0])
  seen = np.asarray(kept)[:, None] + 1 + np.arange(new)
  together = paged_attention(
    jnp.asarray(q.swapaxes(0, 1)),
    pages.k.stored,
    pages.v.stored,
    table,
    seen=jnp.asarray(seen, jnp.int32),
  )
  np.testing.assert_allclose(
    np.asarray(together).swapaxes(0, 1), np.asarray(single), atol=1e-6
  )


def test_pages_of_an_8k_prompt_at_40_percent():
  """The figure that the README states: at most 0.42 of the full cache's."""
  shape = CacheShape(4, 8)
  plan = make_policy("task_kv").plan(8192, 0.4, shape)
  for page_size in (64, 128):
    full = 4 * 8 * 8192 // page_size
    assert num_pages(plan.lengths, page_size).sum() <= 0.42 * full
  assert plan.kept_fraction(8192) <= 0.4
