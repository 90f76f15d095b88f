"""Pools on several devices: who owns which page of each."""

from typing import Any

import numpy as np
from jaxtyping import Int

from jaxheads.kvcache.allocator import OutOfPages, PageAllocator


class ShardedAllocator:
  """As many pages on every device, with a free list for each.

  On the host pages of all devices are numbered through: page n of shard s is
  number s * `pages_per_shard` + n. Devices know the n alone.

  Args:
    pages_per_shard: Pages of each device's pool, its dummy page 0 among them.
    num_shards: Devices.
  Raises:
    ValueError: `pages_per_shard` is below 2.

  Attributes:
    shards: The free list of each device.
  """

  def __init__(self, pages_per_shard: int, num_shards: int = 1) -> None:
    self.pages_per_shard = pages_per_shard
    self.shards = [PageAllocator(pages_per_shard) for _ in range(num_shards)]

  @property
  def pages_in_shard(self) -> int:
    """Pages that one device can give out."""
    return self.shards[0].num_pages

  @property
  def num_pages(self) -> int:
    """Pages that can be given out; dummies are none of them."""
    return len(self.shards) * self.pages_in_shard

  @property
  def num_free(self) -> Int[np.ndarray, " shards"]:
    return np.array([shard.num_free for shard in self.shards])

  @property
  def num_used(self) -> int:
    return sum(shard.num_used for shard in self.shards)

  @property
  def owners(self) -> Int[np.ndarray, " P"]:
    """A copy of how many owners each page has."""
    return np.concatenate([shard.owners for shard in self.shards])

  def allocate(self, counts: Any) -> Int[np.ndarray, " n"]:
    """Gives so many pages of each shard one owner each, shard after shard.

    Raises:
      OutOfPages: A shard has not so many; nothing has changed.
    """
    counts = np.broadcast_to(counts, len(self.shards))
    short = np.flatnonzero(counts > self.num_free)
    if short.size and len(self.shards) > 1:
      first = int(short[0])
      raise OutOfPages(
        f"{counts[first]} pages are needed on shard {first}, "
        f"{self.num_free[first]} of {self.pages_in_shard} are free."
      )
    return np.concatenate(
      [
        shard.allocate(int(count)) + np.int32(index * self.pages_per_shard)
        for index, (shard, count) in enumerate(
          zip(self.shards, counts, strict=True)
        )
      ]
    )

  def share(self, pages: Int[np.ndarray, " n"]) -> None:
    """Gives each page, named once, one more owner; see `PageAllocator`."""
    for shard, mine in self._split(pages):
      shard.share(mine)

  def free(self, pages: Int[np.ndarray, " n"]) -> None:
    """Takes one owner from each page, named once; see `PageAllocator`."""
    for shard, mine in self._split(pages):
      shard.free(mine)

  def local(self, pages: Any) -> Any:
    """Numbers as the devices know them; 0 stays 0."""
    return pages % self.pages_per_shard

  def _split(
    self, pages: Int[np.ndarray, " n"]
  ) -> list[tuple[PageAllocator, Int[np.ndarray, " n"]]]:
    if len(self.shards) == 1:
      return [(self.shards[0], pages)]
    owner, numbers = np.divmod(pages, self.pages_per_shard)
    return [
      (shard, numbers[owner == index])
      for index, shard in enumerate(self.shards)
    ]
