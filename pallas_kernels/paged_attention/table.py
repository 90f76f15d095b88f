"""Which pages hold the cached tokens of a row."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTable:
  """Rows of uneven length, as one flat list of pages.

  A row is one KV head of one sequence (of one layer). Its tokens fill pages in
  order, only the last of them in part. Rows share no entry of `pages`; they
  may share pages.

  Attributes:
    pages: Page numbers, the pages of a row next to each other, int32.
    starts: Where in `pages` each row begins, int32.
    lengths: Tokens of each row, int32; 0 for a row that is not read.
  """

  pages: Int[Array, " entries"]
  starts: Int[Array, " R"]
  lengths: Int[Array, " R"]

  @classmethod
  def contiguous(
    cls, lengths: Int[Array, " R"], *, pages_per_row: int
  ) -> "PageTable":
    """Rows that lie one after the other, each with room for as many pages.

    A cache [B, K, S, H] is pages [B K S / page, page, H] of this table, with
    rows in the order of B K.
    """
    rows = lengths.shape[0]
    return cls(
      jnp.arange(rows * pages_per_row, dtype=jnp.int32),
      jnp.arange(rows, dtype=jnp.int32) * pages_per_row,
      lengths,
    )
