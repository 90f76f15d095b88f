import hypothesis
import hypothesis.strategies as st
import numpy as np

from jaxheads.kvcache.allocator import PageAllocator
from jaxheads.kvcache.prefix import PrefixCache, block_keys

HEADS = 2


def letter_keys(prompt):
  return block_keys(tuple(prompt), 1)


def cache_with(*prompts, num_pages=99):
  """A cache that has read prompts, each block of one token."""
  allocator = PageAllocator(num_pages)
  cache = PrefixCache(allocator)
  for prompt in prompts:
    keys = letter_keys(prompt)
    pages = allocator.allocate(HEADS * len(keys))
    cache.insert(keys, pages.reshape(-1, HEADS))
    allocator.free(pages)
  return allocator, cache


@hypothesis.given(
  a=st.lists(st.integers(0, 1), max_size=12),
  b=st.lists(st.integers(0, 1), max_size=12),
  page_size=st.integers(1, 4),
)
def test_keys_are_equal_as_long_as_prompts_are(a, b, page_size):
  keys = block_keys(a, page_size), block_keys(b, page_size)
  assert len(keys[0]) == len(a) // page_size
  for i, (x, y) in enumerate(zip(*keys, strict=False)):
    end = (i + 1) * page_size
    assert (x == y) == (a[:end] == b[:end])


def test_a_prompt_finds_its_beginning():
  _, cache = cache_with(b"abc")
  assert cache.match(letter_keys(b"abcd")) == (3, 3 * HEADS)
  assert cache.match(letter_keys(b"abx")) == (2, 2 * HEADS)
  assert cache.match(letter_keys(b"bc")) == (0, 0)
  assert cache.match([]) == (0, 0)


def test_who_takes_pages_owns_them_until_they_are_released():
  allocator, cache = cache_with(b"abc")
  keys = letter_keys(b"ab")
  pages = np.concatenate(cache.take(keys))
  assert (allocator.owners[pages] == 2).all()
  assert cache.num_idle_pages == HEADS and cache.num_pages == 3 * HEADS
  assert cache.match(keys) == (2, 0)
  cache.evict(99)
  assert allocator.num_used == 2 * HEADS
  cache.release(keys)
  allocator.free(pages)
  assert cache.num_idle_pages == 2 * HEADS
  cache.evict(99)
  assert allocator.num_used == 0 and not cache.keys


def test_the_end_of_the_chain_used_longest_ago_goes_first():
  allocator, cache = cache_with(b"abc", b"xyz")
  keys = letter_keys(b"abc")
  pages = np.concatenate(cache.take(keys))
  cache.release(keys)
  allocator.free(pages)
  order = [letter_keys(b"xyz")[i] for i in (2, 1, 0)]
  order += [keys[i] for i in (2, 1, 0)]
  for key in order:
    assert key in cache.keys
    cache.evict(allocator.num_free + 1)
    assert key not in cache.keys


def test_no_more_goes_than_is_needed():
  _, cache = cache_with(b"abc", num_pages=1 + 4 * HEADS)
  cache.evict(HEADS)
  assert cache.num_idle_pages == 3 * HEADS
  cache.evict(HEADS + 1)
  assert cache.num_idle_pages == 2 * HEADS


def test_a_block_that_is_there_keeps_its_pages():
  allocator, cache = cache_with(b"ab", b"abc")
  assert allocator.num_used == cache.num_pages == 3 * HEADS
