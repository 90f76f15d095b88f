"""What a cache takes: tokens, pages and bytes, known before it exists."""

from typing import NamedTuple

from jaxheads.kvcache.policy import Plan

# Of a page in a table, and of a row's length.
_ENTRY_BYTES = 4


class CacheMemory(NamedTuple):
  """Memory of one prompt's cache.

  Attributes:
    pages: Pages that its rows fill or begin.
    logical_bytes: Keys and values of the tokens that are kept.
    paged_bytes: Keys and values of those pages.
    table_bytes: Entries of page tables and lengths.
  """

  pages: int
  logical_bytes: int
  paged_bytes: int
  table_bytes: int


def cache_memory(
  plan: Plan, *, page_size: int, head_dim: int, itemsize: int
) -> CacheMemory:
  """Memory of a prompt's cache, for rows on pages of their own.

  Args:
    plan: From `Policy.plan`.
    page_size: Tokens of a page.
    head_dim: Size of one key or value.
    itemsize: Bytes of one number.
  """
  token = 2 * head_dim * itemsize
  pages = int((-(-plan.lengths // page_size)).sum())
  return CacheMemory(
    pages=pages,
    logical_bytes=int(plan.lengths.sum()) * token,
    paged_bytes=pages * page_size * token,
    table_bytes=_ENTRY_BYTES * (pages + plan.lengths.size),
  )
