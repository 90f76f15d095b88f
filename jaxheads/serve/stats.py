"""How full the pool is, and who fills it."""

import dataclasses

import numpy as np
from jaxtyping import Int

from jaxheads.kvcache.rows import num_pages


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SequenceStats:
  """One running sequence.

  Attributes:
    id: Of its request.
    slot: Its sequence slot.
    tokens: Tokens that the full cache would hold.
    lengths, rings, pages: Of each of its rows, by row slot.
  """

  id: str
  slot: int
  tokens: int
  lengths: Int[np.ndarray, "R K"]
  rings: Int[np.ndarray, "R K"]
  pages: Int[np.ndarray, "R K"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Stats:
  """The scheduler at one moment.

  Attributes:
    waiting: Requests in the queue.
    running: Requests that hold a slot.
    pages_used: Pages of requests.
    pages_cached: Pages that only the prefix cache holds; they are given out
      when none is free.
    pages_free: Pages that nobody holds.
    preemptions: So far.
    page_size: Tokens of a page.
    sequences: Those whose rows are filled, first come first.
  """

  waiting: int
  running: int
  pages_used: int
  pages_cached: int
  pages_free: int
  preemptions: int
  page_size: int
  sequences: tuple[SequenceStats, ...]

  @property
  def kept_ratio(self) -> float:
    """Tokens in rows over those that the full cache would hold; 1 of none."""
    full = sum(s.tokens * s.lengths.size for s in self.sequences)
    kept = sum(int(s.lengths.sum()) for s in self.sequences)
    return kept / full if full else 1.0

  @property
  def kept_page_ratio(self) -> float:
    """The same in whole pages: what is really allocated."""
    full = sum(
      num_pages(s.tokens, self.page_size) * s.pages.size for s in self.sequences
    )
    kept = sum(int(s.pages.sum()) for s in self.sequences)
    return kept / full if full else 1.0
