"""The host's picture of all rows: their lengths, rings and pages."""

import numpy as np
from jaxtyping import Bool, Int

from jaxheads.kvcache.policy import CacheShape
from jaxheads.kvcache.rows import RowStep, drop_pages, num_pages, row_step


class RowTable:
  """Rows of every layer, sequence slot and row slot; what the device holds too.

  Knows no allocator: pages come in and go out as numbers.

  Args:
    shape: Layers R and KV heads K.
    num_slots: Sequence slots B.
    max_length: Tokens of a row at most.
    page_size: Tokens of a page.

  Attributes:
    lengths: Tokens in each row, 0 in slots without a sequence.
    rings: `Plan.rings` of each row.
    pages: Page numbers of each row in order, then 0.
  """

  def __init__(
    self, shape: CacheShape, num_slots: int, max_length: int, page_size: int
  ) -> None:
    rows = (shape.num_layers, num_slots, shape.num_kv_heads)
    self.page_size = page_size
    self.lengths: Int[np.ndarray, "R B K"] = np.zeros(rows, np.int32)
    self.rings: Int[np.ndarray, "R B K"] = np.zeros(rows, np.int32)
    self.pages: Int[np.ndarray, "R B K M"] = np.zeros(
      (*rows, num_pages(max_length, page_size)), np.int32
    )

  def place(
    self,
    slot: int,
    lengths: Int[np.ndarray, "R K"],
    rings: Int[np.ndarray, "R K"],
    pages: Int[np.ndarray, " n"],
  ) -> Int[np.ndarray, "R K m"]:
    """Gives an empty slot its rows; returns their pages, padded with 0.

    Args:
      slot: Sequence slot.
      lengths, rings: Of its rows.
      pages: As many as the rows need, row after row.
    """
    counts = num_pages(lengths, self.page_size)
    most = int(counts.max())
    mine = np.zeros((*counts.shape, most), np.int32)
    mine[np.arange(most) < counts[..., None]] = pages
    self.lengths[:, slot] = lengths
    self.rings[:, slot] = rings
    self.pages[:, slot, :, :most] = mine
    return mine

  def settle(
    self,
    slot: int,
    lengths: Int[np.ndarray, "R K"],
    rings: Int[np.ndarray, "R K"],
  ) -> Int[np.ndarray, " n"]:
    """Exact lengths and rings of a slot placed by bounds; what pages are over.

    Devices may still name these pages, after the last one of a row.
    """
    rows = self.pages[:, slot]
    at = np.arange(rows.shape[-1])
    over = (rows > 0) & (at >= num_pages(lengths, self.page_size)[..., None])
    pages = rows[over]
    rows[over] = 0
    self.lengths[:, slot] = lengths
    self.rings[:, slot] = rings
    return pages

  def clear(self, slot: int) -> Int[np.ndarray, " n"]:
    """Empties a slot; returns the pages it had."""
    rows = self.pages[:, slot]
    pages = rows[rows > 0]
    rows[...] = 0
    self.lengths[:, slot] = 0
    self.rings[:, slot] = 0
    return pages

  def drop(
    self, slot: int, drops: Int[np.ndarray, "R K"]
  ) -> Int[np.ndarray, " n"]:
    """Takes one page from each row of a slot; returns those pages.

    Args:
      slot: Sequence slot.
      drops: Index of the page among the row's, -1 for none.
    """
    rows = self.pages[:, slot]
    layer, row = np.nonzero(drops >= 0)
    pages = rows[layer, row, drops[layer, row]]
    self.pages[:, slot] = drop_pages(rows, drops)
    self.lengths[:, slot] -= self.page_size * (drops >= 0)
    return pages

  def next_step(self, written: Int[np.ndarray, " B"]) -> RowStep:
    """What one more token in every slot would do; nothing is dropped now."""
    return row_step(
      self.lengths, self.rings, written[:, None], 0, self.page_size
    )

  def take_step(
    self,
    step: RowStep,
    active: Bool[np.ndarray, " B"],
    pages: Int[np.ndarray, " n"],
  ) -> Int[np.ndarray, "R B K"]:
    """One more token in the active slots; returns the new page of each row.

    Args:
      step: `next_step`.
      active: Slots that take a token.
      pages: As many as active rows need new ones, in the order of the result.
    """
    needs = (step.new_page > 0) & active[:, None]
    new_pages = np.zeros_like(self.lengths)
    new_pages[needs] = pages
    at = np.nonzero(needs)
    self.pages[(*at, step.write[needs] // self.page_size)] = pages
    np.copyto(self.lengths, step.lengths, where=active[:, None])
    return new_pages

  def listed(self, active: Bool[np.ndarray, " B"], shards: int = 1) -> int:
    """Pages of the active slots' rows, in the layer and shard with most."""
    pages = num_pages(self.lengths[:, active], self.page_size)
    by_shard = pages.reshape(*pages.shape[:2], shards, -1)
    return int(by_shard.sum(axis=(1, 3)).max())
