"""What the device remembers of the sequences that it decodes."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxheads.kvcache.policy import CacheShape
from jaxheads.kvcache.rows import RowStep, drop_pages, num_pages, row_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """The rows of all sequence slots; the host's `RowTable` holds the same.

  Attributes:
    pages: Page numbers of each row in order, then 0.
    lengths: Tokens in each row, 0 in slots without a sequence.
    rings: `Plan.rings` of each row.
    head_of_slot: Which KV head each row belongs to.
    written: Generated tokens that each sequence's rows have taken.
    positions: Where each sequence's next token stands.
  """

  pages: Int[Array, "R B K M"]
  lengths: Int[Array, "R B K"]
  rings: Int[Array, "R B K"]
  head_of_slot: Int[Array, "R B K"]
  written: Int[Array, " B"]
  positions: Int[Array, " B"]

  @classmethod
  def empty(
    cls, shape: CacheShape, num_slots: int, max_length: int, page_size: int
  ) -> "Rows":
    """Slots without sequences."""
    rows = (shape.num_layers, num_slots, shape.num_kv_heads)
    heads = jnp.arange(shape.num_kv_heads, dtype=jnp.int32)
    return cls(
      pages=jnp.zeros((*rows, num_pages(max_length, page_size)), jnp.int32),
      lengths=jnp.zeros(rows, jnp.int32),
      rings=jnp.zeros(rows, jnp.int32),
      head_of_slot=jnp.broadcast_to(heads, rows),
      written=jnp.zeros(num_slots, jnp.int32),
      positions=jnp.zeros(num_slots, jnp.int32),
    )

  def place(
    self,
    slot: Int[Array, ""],
    *,
    pages: Int[Array, "R K m"],
    lengths: Int[Array, "R K"],
    rings: Int[Array, "R K"],
    head_of_slot: Int[Array, "R K"],
    position: Int[Array, ""],
  ) -> "Rows":
    """Gives a slot the rows of a prompt that has been read."""
    more = self.pages.shape[-1] - pages.shape[-1]
    pages = jnp.pad(pages, ((0, 0), (0, 0), (0, max(0, more))))
    return Rows(
      pages=self.pages.at[:, slot].set(pages[..., : self.pages.shape[-1]]),
      lengths=self.lengths.at[:, slot].set(lengths),
      rings=self.rings.at[:, slot].set(rings),
      head_of_slot=self.head_of_slot.at[:, slot].set(head_of_slot),
      written=self.written.at[slot].set(0),
      positions=self.positions.at[slot].set(position),
    )

  def first(self, num_slots: int) -> "Rows":
    """The first slots alone."""
    return jax.tree.map(
      lambda x: x[:num_slots] if x.ndim == 1 else x[:, :num_slots], self
    )

  def with_first(self, some: "Rows") -> "Rows":
    """The first slots replaced by others."""

    def put(mine: Array, new: Array) -> Array:
      if mine.ndim == 1:
        return mine.at[: new.shape[0]].set(new)
      return mine.at[:, : new.shape[1]].set(new)

    return jax.tree.map(put, self, some)

  def take_token(
    self,
    active: Int[Array, " B"],
    new_pages: Int[Array, "R B K"],
    drop: Int[Array, "R B K"],
    page_size: int,
  ) -> tuple["Rows", RowStep]:
    """Makes room for one token in every row of the active slots.

    Args:
      active: 1 for slots that take a token, else 0.
      new_pages, drop: See `jaxheads.serve.turn.Decode`.
      page_size: Tokens of a page.
    Returns:
      The rows with the token, and where in its row it stands.
    """
    pages = drop_pages(self.pages, drop, jnp)
    step = row_step(
      self.lengths,
      self.rings,
      self.written[:, None],
      (drop >= 0).astype(jnp.int32),
      page_size,
    )
    at = jnp.arange(pages.shape[-1]) == (step.write // page_size)[..., None]
    new = new_pages[..., None]
    rows = dataclasses.replace(
      self,
      pages=jnp.where((new > 0) & at, new, pages),
      lengths=jnp.where(active[:, None] > 0, step.lengths, self.lengths),
      written=self.written + active,
      positions=self.positions + active,
    )
    return rows, step
