"""Packed layout of sparse queries: only active (token, head) pairs are rows.

Rows of one head and one sequence form a segment, in the order of positions.
Segments come head by head, and each ends at a multiple of `block_rows`, so
that a block of rows belongs to one head and one sequence: one tile of queries.
Unused rows come first in a segment, among the early positions, where a causal
query is cheapest.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from pallas_kernels.value_checks import check_values, wanted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
  """Where each active (token, head) pair lies among the packed rows.

  The number of rows is static: it is what the worst distribution of the same
  number of pairs needs. Blocks past `num_blocks` are empty.

  Attributes:
    row_token: Flat token `b * T + t` of each row, int32; B * T if unused.
    row_of: Row of each pair, int32; the number of rows if inactive.
    block_head: Head of each block, int32.
    block_batch: Sequence of each block, int32.
    num_blocks: Blocks in use, int32 scalar.
    block_rows: Rows in a block (static).
  """

  row_token: Int[Array, " rows"]
  row_of: Int[Array, "B T N"]
  block_head: Int[Array, " blocks"]
  block_batch: Int[Array, " blocks"]
  num_blocks: Int[Array, ""]
  block_rows: int = dataclasses.field(metadata={"static": True})

  @property
  def num_rows(self) -> int:
    """Rows, used or not (static)."""
    return self.row_token.shape[0]

  @property
  def num_heads(self) -> int:
    """Query heads (static)."""
    return self.row_of.shape[2]

  @property
  def row_head(self) -> Int[Array, " rows"]:
    """Head of each row."""
    return jnp.repeat(self.block_head, self.block_rows)

  @property
  def row_batch(self) -> Int[Array, " rows"]:
    """Sequence of each row."""
    return jnp.repeat(self.block_batch, self.block_rows)

  @property
  def row_valid(self) -> Bool[Array, " rows"]:
    """Whether each row holds a pair."""
    batch, length, _ = self.row_of.shape
    return self.row_token < batch * length

  @property
  def row_position(self) -> Int[Array, " rows"]:
    """Index of each row's token in its sequence, -1 for unused rows."""
    length = self.row_of.shape[1]
    return jnp.where(self.row_valid, self.row_token % length, -1)


def pack(
  mask: Bool[Array, "B T N"], *, num_active: int, block_rows: int
) -> Packing:
  """Packs the active pairs of `mask`.

  Args:
    mask: True where (token, head) is active.
    num_active: Most active heads of any token (static); trusted under jit,
      where pairs beyond the room for that many may have no row.
    block_rows: Rows in a block.

  Raises:
    TypeError: `mask` is not bool.
    ValueError: `num_active` or `block_rows` is out of range, or a token has
      more active heads.
  """
  if mask.dtype != jnp.bool_:
    raise TypeError(f"`mask` must be bool, got {mask.dtype}.")
  batch, length, heads = mask.shape
  if not 0 <= num_active <= heads:
    raise ValueError(
      f"`num_active` must be in [0, {heads}], the number of heads, "
      f"got {num_active}."
    )
  if block_rows < 1:
    raise ValueError(f"`block_rows` must be at least 1, got {block_rows}.")
  check_active("mask", mask, num_active)
  segments = heads * batch
  blocks = min(
    batch * length * num_active // block_rows + segments,
    segments * -(-length // block_rows),
  )
  return _place(mask, blocks=blocks, block_rows=block_rows)


def _place(
  mask: Bool[Array, "B T N"], *, blocks: int, block_rows: int
) -> Packing:
  """Packs into so many blocks; pairs that they do not hold have no row."""
  batch, length, heads = mask.shape
  segments, rows = heads * batch, blocks * block_rows
  counts = mask.sum(axis=1, dtype=jnp.int32).T.reshape(-1)  # [N * B]
  segment_blocks = -(-counts // block_rows)
  block_ends = jnp.cumsum(segment_blocks)
  starts = (block_ends * block_rows - counts).reshape(heads, batch)
  rank = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
  row_of = jnp.where(mask, starts.T[:, None, :] + rank, rows)
  row_of = jnp.minimum(row_of, rows)

  # Segment of each block: how many segments end at or before it.
  segment = jnp.searchsorted(block_ends, jnp.arange(blocks), side="right")
  segment = jnp.minimum(segment, segments - 1).astype(jnp.int32)
  tokens = jnp.arange(batch * length, dtype=jnp.int32)
  row_token = (
    jnp.full((rows,), batch * length, jnp.int32)
    .at[row_of.reshape(batch * length, heads)]
    .set(tokens[:, None], mode="drop")
  )
  return Packing(
    row_token=row_token,
    row_of=row_of,
    block_head=segment // batch,
    block_batch=segment % batch,
    num_blocks=jnp.minimum(block_ends[-1], blocks),
    block_rows=block_rows,
  )


def check_active(
  name: str, mask: Bool[Array, "B T N"], num_active: int
) -> None:
  """Refuses tokens with more active heads than there is room for.

  Args:
    name: The argument, for the message.
    mask: True where (token, head) is active.
    num_active: Most active heads of any token.
  Raises:
    ValueError: A token has more; see `check_values`.
  """

  def allowed(mask: Any) -> tuple[Any, Any]:
    counts = mask.sum(axis=2)
    return counts <= num_active, counts

  check_values(
    name,
    (mask,),
    allowed,
    f"have at most `num_active` = {num_active} active heads for each token",
  )


def check_packing(packing: Packing) -> None:
  """Refuses packings that are not as `pack` makes them.

  Raises:
    ValueError: A field is not what the pairs that have a row make it; see
      `check_values`.
  """
  if not wanted(*jax.tree.leaves(packing)):
    return
  expected = _place(
    packing.row_of < packing.num_rows,
    blocks=packing.block_head.shape[0],
    block_rows=packing.block_rows,
  )
  for name in "row_of row_token block_head block_batch num_blocks".split():
    check_values(
      f"packing.{name}",
      (getattr(packing, name), getattr(expected, name)),
      lambda got, made: (got == made, got),
      "be what `pack` makes of the pairs that have a row in it",
    )


@jax.custom_vjp
def gather_rows(
  values: Shaped[Array, "B T N *rest"], packing: Packing
) -> Shaped[Array, "rows *rest"]:
  """Rows of the active pairs of a dense array; unused rows are 0.

  Differentiable in `values`; the gradient is a gather too, not a scatter.
  """
  batch, length, heads, *rest = values.shape
  flat = values.reshape(batch * length * heads, *rest)
  # Unused rows point past the end, hence are filled.
  index = packing.row_token * heads + packing.row_head
  return flat.at[index].get(mode="fill", fill_value=0)


def _gather_rows_fwd(values: Array, packing: Packing) -> tuple[Array, Packing]:
  return gather_rows(values, packing), packing


def _gather_rows_bwd(packing: Packing, rows: Array) -> tuple[Any, None]:
  return scatter_rows(rows, packing), None


gather_rows.defvjp(_gather_rows_fwd, _gather_rows_bwd)


@jax.custom_vjp
def scatter_rows(
  rows: Shaped[Array, "rows *rest"], packing: Packing
) -> Shaped[Array, "B T N *rest"]:
  """Dense array of the packed rows; 0 for inactive pairs.

  Differentiable in `rows`; both ways are gathers, which TPUs compile faster
  than scatters.
  """
  return rows.at[packing.row_of].get(mode="fill", fill_value=0)


def _scatter_rows_fwd(rows: Array, packing: Packing) -> tuple[Array, Packing]:
  return scatter_rows(rows, packing), packing


def _scatter_rows_bwd(packing: Packing, values: Array) -> tuple[Any, None]:
  return gather_rows(values, packing), None


scatter_rows.defvjp(_scatter_rows_fwd, _scatter_rows_bwd)
