"""Prompts that begin alike share the pages of their common beginning."""

import collections
import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxheads.kvcache.allocator import PageAllocator
from jaxheads.kvcache.shards import ShardedAllocator


@dataclasses.dataclass(slots=True)
class _Entry:
  pages: Int[np.ndarray, " RK"]
  users: int


def block_keys(prompt: Sequence[int], page_size: int) -> tuple[bytes, ...]:
  """One key for each full page of a prompt: of its tokens and all before.

  A chain of hashes: equal keys mean equal prompts up to the page's end, up to
  a collision of 128 bits.
  """
  tokens = np.asarray(prompt, np.int64)
  keys = []
  key = b""
  for end in range(page_size, tokens.size + 1, page_size):
    block = tokens[end - page_size : end].tobytes()
    key = hashlib.blake2b(key + block, digest_size=16).digest()
    keys.append(key)
  return tuple(keys)


class PrefixCache:
  """Pages of prompts that were read, by the key of their block of tokens.

  An entry is one page for each head of each layer: R * K pages, which hold
  all tokens of the block, uncompressed. It owns its pages; whoever uses them
  owns them too, so that neither takes them from the other. Entries that
  nobody uses are given up when pages are short, the one used longest ago
  first. An entry in use has all blocks before it in use, and is always younger
  than they are: what is given up is an end of a chain, never its middle.

  Args:
    allocator: Whose pages they are.
  """

  def __init__(self, allocator: PageAllocator | ShardedAllocator) -> None:
    self._allocator = allocator
    self._used: dict[bytes, _Entry] = {}
    self._idle: collections.OrderedDict[bytes, _Entry] = (
      collections.OrderedDict()
    )
    self._idle_pages = 0

  @property
  def num_pages(self) -> int:
    """Pages of all entries."""
    return self._idle_pages + sum(e.pages.size for e in self._used.values())

  @property
  def num_idle_pages(self) -> int:
    """Pages that `evict` can free; as many on every device."""
    return self._idle_pages

  @property
  def keys(self) -> frozenset[bytes]:
    return frozenset(self._used) | frozenset(self._idle)

  def match(self, keys: Sequence[bytes]) -> tuple[int, int]:
    """How many of a prompt's first blocks are here, and their idle pages."""
    found = idle = 0
    for key in keys:
      if key in self._idle:
        idle += self._idle[key].pages.size
      elif key not in self._used:
        break
      found += 1
    return found, idle

  def take(self, keys: Sequence[bytes]) -> list[Int[np.ndarray, " RK"]]:
    """Pages of blocks that are here, which the caller then owns too.

    The caller ends it with `release`, and frees its share of the pages itself.
    """
    pages = []
    for key in keys:
      entry = self._idle.pop(key, None)
      if entry is None:
        entry = self._used[key]
      else:
        self._idle_pages -= entry.pages.size
        self._used[key] = entry
      entry.users += 1
      pages.append(entry.pages)
    if pages:
      self._allocator.share(np.concatenate(pages))
    return pages

  def release(self, keys: Sequence[bytes]) -> None:
    """One user less of blocks that `take` gave."""
    # The last block first: the first one is then the one used latest.
    for key in reversed(keys):
      entry = self._used[key]
      entry.users -= 1
      if not entry.users:
        self._idle[key] = self._used.pop(key)
        self._idle_pages += entry.pages.size

  def insert(
    self, keys: Sequence[bytes], pages: Int[np.ndarray, "n RK"]
  ) -> None:
    """Keeps a prompt's blocks, all of them from its first on.

    Blocks that are here already stay as they are, and count as used now. The
    caller keeps its ownership of `pages`.
    """
    new = []
    for key, block in reversed(list(zip(keys, pages, strict=True))):
      if key in self._idle:
        self._idle.move_to_end(key)
      elif key not in self._used:
        self._idle[key] = _Entry(block.copy(), 0)
        self._idle_pages += block.size
        new.append(block)
    if new:
      self._allocator.share(np.concatenate(new))

  def evict(self, count: Any) -> None:
    """Frees idle entries until `count` pages are free or none is idle.

    Args:
      count: Pages; of each device, where there are several.
    """
    while self._idle and np.any(self._allocator.num_free < count):
      _, entry = self._idle.popitem(last=False)
      self._idle_pages -= entry.pages.size
      self._allocator.free(entry.pages)
