"""The work list: one step for every few pages of a row that is read."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.paged_attention.table import PageTable


class Steps(NamedTuple):
  """Steps of a row follow each other, rows in order.

  Attributes:
    row: Row of each step; the number of rows past the last step.
    first: The first token of the row that the step reads.
    num_steps: Steps in use.
  """

  row: Int[Array, " W"]
  first: Int[Array, " W"]
  num_steps: Int[Array, ""]


def make_steps(table: PageTable, tokens: int, page_size: int) -> Steps:
  """Cuts every row into steps.

  Rows of no tokens have no step. The length W of the list is static: what the
  table's entries can fill at most.

  Args:
    table: The rows.
    tokens: Tokens of a step, a multiple of `page_size`.
    page_size: Tokens of a page.
  """
  rows, entries = table.lengths.shape[0], table.pages.shape[0]
  pages = tokens // page_size
  most = min(rows * -(-entries // pages), entries // pages + rows)
  steps = -(-table.lengths // tokens)
  ends = jnp.cumsum(steps)
  row = jnp.repeat(
    jnp.arange(rows, dtype=jnp.int32), steps, total_repeat_length=most
  )
  index = jnp.arange(most, dtype=jnp.int32)
  used = index < ends[-1]
  first = (index - (ends - steps)[row]) * tokens
  return Steps(jnp.where(used, row, rows), jnp.where(used, first, 0), ends[-1])
