"""The arithmetic of cached rows: what one generated token does to them.

The host predicts with it what the device computes; both call it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int


class RowStep(NamedTuple):
  """What a step does to rows; arrays of the rows' shape, in int32.

  Attributes:
    write: Slot of the row that the new token takes.
    new_page: 1 where that slot begins a page that the row does not have yet;
      it becomes the row's page number `write // page_size`.
    lengths: Tokens of the row afterwards, all of which the new token sees.
  """

  write: Any
  new_page: Any
  lengths: Any


def row_step(
  lengths: Any, rings: Any, written: Any, dropped: Any, page_size: int
) -> RowStep:
  """Where the next token goes; of NumPy arrays and JAX arrays alike.

  First a row may give up one full page, which shifts its later pages down. A
  row without a ring then takes the token at its end and grows. With a ring of
  g, the token overwrites the oldest of the last g, and the row never grows.

  Args:
    lengths: Tokens in each row, int32.
    rings: `Plan.rings`, int32; at most the row's length.
    written: Generated tokens that the sequence's rows have taken so far, the
      new one excluded, int32; broadcasts against `lengths`.
    dropped: 1 for rows that give up a page now, else 0, int32.
    page_size: Tokens of a page.
  """
  lengths = lengths - dropped * page_size
  grows = (rings == 0).astype(lengths.dtype)
  # For a row without a ring: lengths - 0 + written % 1.
  write = lengths - rings + written % (rings + grows)
  new_page = grows * (lengths % page_size == 0).astype(lengths.dtype)
  return RowStep(write, new_page, lengths + grows)


def num_pages(lengths: Any, page_size: int) -> Any:
  """Pages that hold so many tokens; of integers and arrays alike."""
  return -(-lengths // page_size)


def pages_by_shard(
  lengths: Int[np.ndarray, "R K"], page_size: int, shards: int
) -> Int[np.ndarray, " shards"]:
  """Pages that rows hold on each device, which has as many KV heads."""
  pages = num_pages(lengths, page_size)
  return pages.reshape(len(pages), shards, -1).sum(axis=(0, 2))


def check_rows(
  lengths: Int[np.ndarray, "R K"],
  rings: Int[np.ndarray, "R K"],
  shape: tuple[int, int],
  longest: int,
  shards: int = 1,
) -> None:
  """Refuses lengths and rings that no prompt of `longest` tokens can have.

  Raises:
    ValueError: They are not [R, K], out of range, ascend along the slots of
      a shard, or a ring is longer than its row.
  """
  if lengths.shape != shape or rings.shape != shape:
    raise ValueError(
      f"Lengths and rings of rows must be {list(shape)}, got "
      f"{list(lengths.shape)} and {list(rings.shape)}."
    )
  if (lengths < 0).any() or (lengths > longest).any():
    raise ValueError(
      f"Lengths of rows must be in [0, {longest}], got {lengths.min()} to "
      f"{lengths.max()}."
    )
  by_shard = lengths.reshape(len(lengths), shards, -1)
  if (by_shard[..., 1:] > by_shard[..., :-1]).any():
    raise ValueError("Lengths of rows must descend along the slots of a layer.")
  if (rings < 0).any() or (rings > lengths).any():
    raise ValueError("Rings must be 0 or more, and at most their row's length.")


def check_drops(
  drops: Int[np.ndarray, "R K"],
  lengths: Int[np.ndarray, "R K"],
  rings: Int[np.ndarray, "R K"],
  page_size: int,
) -> None:
  """Refuses to drop what is no full page before the row's ring.

  Raises:
    ValueError: As said.
  """
  if ((drops + 1) * page_size > lengths - rings)[drops >= 0].any():
    raise ValueError(
      "A row can only give up a full page that it has, outside of its ring."
    )


def drop_pages(table: Any, drops: Any, xp: Any = np) -> Any:
  """Page tables without page `drops` of each row; later pages move down.

  Args:
    table: Pages of each row, 0 after its last; [..., M].
    drops: Index of the page that goes, or -1 for none.
    xp: `numpy`, or `jax.numpy` for JAX arrays.
  """
  after = xp.concatenate(
    [table[..., 1:], xp.zeros_like(table[..., :1])], axis=-1
  )
  at = xp.arange(table.shape[-1])
  goes = drops[..., None]
  return xp.where((goes >= 0) & (at >= goes), after, table)


def most_pages(
  lengths: Int[np.ndarray, "R K"],
  rings: Int[np.ndarray, "R K"],
  *,
  first: int,
  count: int,
  page_size: int,
  drops: Callable[[int], Int[np.ndarray, "R K"] | None],
  shards: int = 1,
) -> Int[np.ndarray, " shards"]:
  """Pages that a sequence's rows hold at once, at most, on each device.

  Args:
    lengths: Tokens that each row keeps of the prompt.
    rings: `Plan.rings`.
    first: Position of the first generated token: the prompt's length.
    count: Generated tokens that the rows take.
    page_size: Tokens of a page.
    drops: `Policy.drops` of a position.
    shards: Devices that share the KV heads evenly.
  Raises:
    ValueError: `drops` names what is no full page.
  """
  most = pages_by_shard(lengths, page_size, shards)
  grows = (rings == 0).astype(np.int32)
  position, end = first, first + count
  while position < end:
    if position % page_size == 0:
      gone = drops(position)
      if gone is None:  # Never any: straight to the end.
        lengths = lengths + (end - position) * grows
        last = pages_by_shard(lengths, page_size, shards)
        return np.maximum(most, last)
      check_drops(gone, lengths, rings, page_size)
      lengths = lengths - page_size * (gone >= 0)
    step = min(end, (position // page_size + 1) * page_size) - position
    lengths = lengths + step * grows
    position += step
    most = np.maximum(most, pages_by_shard(lengths, page_size, shards))
  return most
