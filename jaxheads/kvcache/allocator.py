"""Who owns which page of the pool; numbers only, on the host."""

import numpy as np
from jaxtyping import Int


class OutOfPages(RuntimeError):
  """Fewer pages are free than were asked for; none was given out."""


class PageAllocator:
  """A free list of pages with reference counts.

  Page 0 is the dummy that padding points at: never given out. The page freed
  last is given out first: a stack, so that giving n pages out or taking them
  back is one copy of n numbers however large the pool is, while the lowest
  number first would need a search. No kernel gains from neighbouring pages.

  Args:
    num_pages: Pages of the pool, the dummy among them; at least 2.
  Raises:
    ValueError: `num_pages` is below 2.
  """

  def __init__(self, num_pages: int) -> None:
    if num_pages < 2:
      raise ValueError(
        "`num_pages` must be at least 2, the dummy and one to give out, got "
        f"{num_pages}."
      )
    self._owners = np.zeros(num_pages, np.int32)
    # The stack's top is its end: a new pool gives out 1, 2, 3, ...
    self._stack = np.arange(num_pages, 0, -1, dtype=np.int32)[1:]
    self._num_free = num_pages - 1

  @property
  def num_pages(self) -> int:
    """Pages that can be given out; the dummy is none of them."""
    return self._stack.size

  @property
  def num_free(self) -> int:
    return self._num_free

  @property
  def num_used(self) -> int:
    return self.num_pages - self._num_free

  @property
  def owners(self) -> Int[np.ndarray, " P"]:
    """A copy of how many owners each page has."""
    return self._owners.copy()

  def allocate(self, count: int) -> Int[np.ndarray, " n"]:
    """Gives `count` pages one owner each.

    Raises:
      OutOfPages: There are not so many; nothing has changed.
    """
    if count > self._num_free:
      raise OutOfPages(
        f"{count} pages are needed, {self._num_free} of {self.num_pages} are "
        "free."
      )
    left = self._num_free - count
    pages = self._stack[left : self._num_free][::-1].copy()
    self._num_free = left
    self._owners[pages] = 1
    return pages

  def share(self, pages: Int[np.ndarray, " n"]) -> None:
    """Gives each page, named once, one more owner.

    Raises:
      ValueError: A page has no owner or is named twice; nothing has changed.
    """
    self._check_owned(pages)
    self._owners[pages] += 1

  def free(self, pages: Int[np.ndarray, " n"]) -> None:
    """Takes one owner from each page, named once; the last one frees it.

    Raises:
      ValueError: A page has no owner or is named twice; nothing has changed.
    """
    self._check_owned(pages)
    self._owners[pages] -= 1
    freed = pages[self._owners[pages] == 0]
    self._stack[self._num_free : self._num_free + freed.size] = freed[::-1]
    self._num_free += freed.size

  def _check_owned(self, pages: Int[np.ndarray, " n"]) -> None:
    if not pages.size:
      return
    ordered = np.sort(pages)
    if ordered[0] < 1 or ordered[-1] > self.num_pages:
      raise ValueError(
        f"Pages must be in [1, {self.num_pages}], got {ordered[0]} to "
        f"{ordered[-1]}."
      )
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if twice.size:
      raise ValueError(f"Page {twice[0]} is named twice.")
    if not self._owners[pages].all():
      page = pages[self._owners[pages] == 0][0]
      raise ValueError(f"Page {page} is free: nobody owns it.")
