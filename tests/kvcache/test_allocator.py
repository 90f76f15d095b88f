import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads.kvcache.allocator import OutOfPages, PageAllocator


def pages(*numbers):
  return np.array(numbers, np.int32)


def test_a_new_pool_gives_out_1_2_3():
  allocator = PageAllocator(5)
  given = allocator.allocate(3)
  assert given.tolist() == [1, 2, 3] and given.dtype == np.int32
  assert (allocator.num_pages, allocator.num_free, allocator.num_used) == (
    4, 1, 3,
  )  # fmt: skip


def test_the_page_freed_last_comes_first():
  allocator = PageAllocator(9)
  allocator.allocate(8)
  allocator.free(pages(3))
  allocator.free(pages(7, 2))
  assert allocator.allocate(3).tolist() == [7, 2, 3]


def test_all_or_nothing():
  allocator = PageAllocator(4)
  allocator.allocate(1)
  with pytest.raises(OutOfPages, match="3 pages are needed, 2 of 3"):
    allocator.allocate(3)
  assert allocator.num_free == 2
  assert allocator.allocate(2).tolist() == [2, 3]
  assert allocator.allocate(0).tolist() == []


def test_a_shared_page_is_freed_by_its_last_owner():
  allocator = PageAllocator(3)
  mine = allocator.allocate(2)
  allocator.share(mine[:1])
  allocator.free(mine)
  assert allocator.owners.tolist() == [0, 1, 0]
  allocator.free(mine[:1])
  assert allocator.num_free == 2


@pytest.mark.parametrize("method", ["free", "share"])
@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (pages(1, 3), "Page 3 is free"),
    (pages(2, 1, 2), "Page 2 is named twice"),
    (pages(0), r"must be in \[1, 3\]"),
    (pages(4), r"must be in \[1, 3\]"),
    (pages(-1, 1), r"must be in \[1, 3\]"),
  ],
)
def test_refused_and_nothing_changed(method, bad, message):
  allocator = PageAllocator(4)
  allocator.allocate(2)
  with pytest.raises(ValueError, match=message):
    getattr(allocator, method)(bad)
  assert allocator.owners.tolist() == [0, 1, 1, 0]
  assert allocator.num_free == 1


def test_double_free():
  allocator = PageAllocator(4)
  mine = allocator.allocate(2)
  allocator.free(mine)
  with pytest.raises(ValueError, match="is free: nobody owns it"):
    allocator.free(mine)
  assert allocator.num_free == 3


def test_a_pool_needs_a_page_beside_the_dummy():
  with pytest.raises(ValueError, match="at least 2"):
    PageAllocator(1)


@hypothesis.given(data=st.data(), size=st.integers(2, 12))
def test_any_order_equals_counting_by_hand(data, size):
  allocator = PageAllocator(size)
  owners = collections.Counter()
  for _ in range(30):
    owned = sorted(page for page, count in owners.items() if count)
    what = data.draw(st.sampled_from(["allocate", "free", "share"]))
    if what == "allocate":
      count = data.draw(st.integers(0, size))
      if count > size - 1 - len(owned):
        with pytest.raises(OutOfPages):
          allocator.allocate(count)
        continue
      given = allocator.allocate(count).tolist()
      assert len(set(given)) == count and 0 not in given
      assert not set(given) & set(owned)
      owners.update(given)
    else:
      some = data.draw(st.permutations(owned))
      some = some[: data.draw(st.integers(0, len(some)))]
      getattr(allocator, what)(pages(*some))
      owners.update(dict.fromkeys(some, 1 if what == "share" else -1))
    assert allocator.owners.tolist() == [owners[page] for page in range(size)]
    assert allocator.num_used == sum(count > 0 for count in owners.values())
