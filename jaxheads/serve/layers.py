"""A model over a pool of pages: reading prompts, and decoding."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.kvcache.compact import compact
from jaxheads.kvcache.pages import Pages
from jaxheads.kvcache.policy import LayerWindow, Policy
from jaxheads.kvcache.rows import RowStep, num_pages
from jaxheads.models.decoder import DecoderBlock, DecoderLM
from jaxheads.nn import HeadAttention
from jaxheads.serve import shards
from jaxheads.serve.state import Rows
from jaxheads.sharding import constrain
from pallas_kernels.paged_attention import PageTable, paged_attention


class Prompt(NamedTuple):
  """A stretch of a prompt, to be read.

  Attributes:
    tokens: Token ids; padding may follow the first `count`.
    start: Position of the first of them.
    count: How many there are.
    prompt_pages: Pages of the whole prompt by head; `None` if it is read at
      once.
  """

  tokens: Int[Any, " T"]
  start: Int[Any, ""]
  count: Int[Any, ""]
  prompt_pages: Int[Any, "R K n"] | None


class Kept(NamedTuple):
  """Of each layer, which tokens stay.

  Attributes:
    tokens: True for those that stay, by head.
    lengths: How many, by row slot.
    head_of_slot: Which head each row slot belongs to, one of its device.
  """

  tokens: Bool[Array, "R K S"]
  lengths: Int[Array, "R K"]
  head_of_slot: Int[Array, "R K"]


class Reading(NamedTuple):
  """What is left when a prompt has been read.

  Attributes:
    pages: The pool.
    logits: Of the token that follows the last one read.
    kept: Which tokens stay; `None` before the last stretch.
  """

  pages: Pages
  logits: Float[Array, " V"]
  kept: Kept | None


def read_prompt(
  model: DecoderLM,
  pages: Pages,
  prompt: Prompt,
  *,
  policy: Policy | None,
  layers: dict[str, Array] | None,
  row_pages: Int[Array, "R K m"] | None,
) -> Reading:
  """Reads a stretch of one prompt; the last one keeps what the policy keeps.

  Args:
    model: A decoder.
    pages: The pool.
    prompt: The stretch.
    policy: What each head keeps, for the last stretch; `None` before it.
    layers: `Plan.layers`, for the policy.
    row_pages: Where survivors go, by row slot; `None` if they stay where they
      are for now.
  """
  length = prompt.start + prompt.count
  index = jnp.arange(prompt.tokens.shape[0])
  positions = prompt.start + index
  is_real = (index < prompt.count)[:, None, None]

  def layer(
    block: DecoderBlock, carry: tuple[Array, Pages], inputs: tuple[Any, ...]
  ) -> tuple[tuple[Array, Pages], Kept | None]:
    x, pages = carry
    number, prompt_pages, row_pages, plan = inputs
    attention = block.attention
    h = block.attention_norm(x)
    k, v = (
      constrain(jnp.where(is_real, y[0], 0), None, "kv_heads", None)
      for y in attention.project_kv(h, positions[None])
    )
    if prompt_pages is None:
      out = attention.attend(h, k[None], v[None])
    else:
      go_on = shards.over_heads(
        _continue,
        (
          shards.PAGES,
          shards.ROWS,
          shards.TOKENS,
          shards.TOKENS,
          shards.EVERYWHERE,
        ),
        (shards.TOKENS, shards.TOKENS, shards.PAGES),
      )
      k, v, pages = go_on(pages, prompt_pages, k, v, prompt.start)
      out = _attend_so_far(attention, h, k, v, prompt.start)
    kept = None
    if policy is not None:
      at = prompt.count - policy.window + jnp.arange(policy.window)
      h = h.at[:, at].get(mode="clip")
      window = LayerWindow(
        q=attention.project_q(h, (prompt.start + at)[None])[0],
        k=k,
        v=v,
        length=length,
        w_o=attention.out.kernel[...],
        layer=number,
      )
      keep = policy.keep(window, plan)
      keep_rows = shards.over_heads(
        _keep_rows,
        (
          shards.PAGES,
          shards.ROWS,
          shards.ROWS,
          shards.TOKENS,
          shards.TOKENS,
        ),
        (shards.PAGES, Kept(*[shards.ROWS] * 3)),
      )
      pages, kept = keep_rows(pages, row_pages, keep, k, v)
    return (_feed_forward(block, x + out), pages), kept

  x = model.embedding(prompt.tokens[None])
  inputs = (_indices(model), prompt.prompt_pages, row_pages, layers)
  (x, pages), kept = model.scan_layers(layer, (x, pages), inputs)
  x = jax.lax.dynamic_slice_in_dim(x, prompt.count - 1, 1, axis=1)
  return Reading(pages, _logits(model, x)[0, 0], kept)


def copy_rows(
  pages: Pages,
  keep: Bool[Array, "R K S"],
  prompt_pages: Int[Array, "R K n"],
  row_pages: Int[Array, "R K m"],
) -> Pages:
  """Copies what is kept of a prompt from its pages to its rows' pages."""

  def layer(pages: Pages, inputs: tuple[Array, ...]) -> tuple[Pages, None]:
    keep, prompt_pages, row_pages = inputs
    k, v = (y.swapaxes(0, 1) for y in pages.gather(prompt_pages))
    rows = compact(keep, k, v)
    return _write_rows(pages, row_pages, rows.k, rows.v), None

  def copy(pages: Pages, *inputs: Array) -> Pages:
    return jax.lax.scan(layer, pages, inputs)[0]

  by_row = shards.ROWS_OF_SLOTS
  copy = shards.over_heads(
    copy, (shards.PAGES, by_row, by_row, by_row), shards.PAGES
  )
  return copy(pages, keep, prompt_pages, row_pages)


def decode(
  model: DecoderLM,
  pages: Pages,
  rows: Rows,
  step: RowStep,
  tokens: Int[Array, " B"],
  active: Int[Array, " B"],
  *,
  entries: int,
) -> tuple[Float[Array, "B V"], Pages]:
  """Logits after one more token of every sequence.

  Args:
    model: A decoder.
    pages: The pool.
    rows: The sequences' rows, the token among their tokens.
    step: Where in its row each token goes.
    tokens: The tokens.
    active: 0 for slots that take none.
    entries: Room for the pages that the rows of a layer list; static.
  """
  positions = rows.positions - 1  # Counted already.
  by_row = shards.ROWS_OF_SLOTS
  layer_rows = _LayerRows(*[by_row] * 5)
  append = shards.over_heads(
    _append,
    (shards.PAGES, layer_rows, shards.EVERYWHERE, by_row, by_row),
    shards.PAGES,
  )

  def layer(
    block: DecoderBlock, carry: tuple[Array, Pages], inputs: _LayerRows
  ) -> tuple[tuple[Array, Pages], None]:
    x, pages = carry
    attention = block.attention
    h = block.attention_norm(x)
    k, v = (y[:, 0] for y in attention.project_kv(h, positions[:, None]))
    pages = append(pages, inputs, active, k, v)

    def read(q: Array, chosen: Array | None) -> Array:
      attend = shards.over_heads(
        functools.partial(_attend_to_rows, entries=entries),
        (
          shards.PAGES,
          layer_rows,
          shards.EVERYWHERE,
          shards.QUERIES,
          shards.QUERIES,
        ),
        shards.QUERIES,
      )
      return attend(pages, inputs, active, q, chosen)

    x += attention.attend_with(h, positions[:, None], read)
    return (_feed_forward(block, x), pages), None

  x = model.embedding(tokens[:, None])
  inputs = _LayerRows(
    rows.pages,
    rows.lengths,
    step.write,
    step.new_page,
    rows.head_of_slot,
  )
  (x, pages), _ = model.scan_layers(layer, (x, pages), inputs)
  return _logits(model, x)[:, 0], pages


class _LayerRows(NamedTuple):
  """The rows of one layer, or of all.

  Attributes:
    pages, lengths, head_of_slot: See `Rows`.
    write, is_new: Where each row's token goes, see `RowStep`.
  """

  pages: Int[Array, "*R B K M"]
  lengths: Int[Array, "*R B K"]
  write: Int[Array, "*R B K"]
  is_new: Int[Array, "*R B K"]
  head_of_slot: Int[Array, "*R B K"]


def _append(
  pages: Pages,
  rows: _LayerRows,
  active: Int[Array, " B"],
  k: Float[Array, "B K H"],
  v: Float[Array, "B K H"],
) -> Pages:
  """The pool with one more token in every row of the active slots."""
  # Each KV head's arrays to its row slot.
  to_slot = _own_heads(rows)[..., None]
  k, v = (
    jnp.take_along_axis(y, to_slot, axis=1).reshape(-1, y.shape[-1])
    for y in (k, v)
  )
  at = rows.write // pages.page_size
  number = jnp.take_along_axis(rows.pages, at[..., None], axis=-1)[..., 0]
  number = jnp.where(active[:, None] > 0, number, 0)
  offset = rows.write % pages.page_size
  return pages.append(
    number.reshape(-1), offset.reshape(-1), rows.is_new.reshape(-1), k, v
  )


def _attend_to_rows(
  pages: Pages,
  rows: _LayerRows,
  active: Int[Array, " B"],
  q: Float[Array, "B 1 N H"],
  chosen: Bool[Array, "B 1 N"] | None,
  *,
  entries: int,
) -> Float[Array, "B 1 N H"]:
  """What each query head reads from the row of its KV head."""
  batch, kv_heads = rows.lengths.shape
  groups = q.shape[2] // kv_heads
  head_of_slot = _own_heads(rows)
  lengths = jnp.where(active[:, None] > 0, rows.lengths, 0)
  starts, listed = _list_pages(rows.pages, lengths, pages.page_size, entries)
  seen = lengths
  if chosen is not None:
    used = chosen.reshape(batch, kv_heads, groups).any(axis=-1)
    used = jnp.take_along_axis(used, head_of_slot, axis=1)
    seen = jnp.where(used, lengths, 0)
  q = q.reshape(batch, kv_heads, groups, -1)
  # To row slots, and back.
  q = jnp.take_along_axis(q, head_of_slot[..., None, None], axis=1)
  out = paged_attention(
    q.reshape(batch * kv_heads, groups, -1),
    pages.k.stored,
    pages.v.stored,
    PageTable(listed, starts, seen.reshape(-1)),
    k_scales=pages.k.scales,
    v_scales=pages.v.scales,
  )
  out = out.reshape(q.shape)
  slot_of_head = jnp.argsort(head_of_slot, axis=1)
  out = jnp.take_along_axis(out, slot_of_head[..., None, None], axis=1)
  return out.reshape(batch, 1, kv_heads * groups, -1)


def _own_heads(rows: _LayerRows) -> Int[Array, "B K"]:
  """Which of this device's KV heads each row slot belongs to."""
  return rows.head_of_slot - shards.first_head(rows.head_of_slot.shape[1])


def _keep_rows(
  pages: Pages,
  row_pages: Int[Array, "K m"] | None,
  keep: Bool[Array, "K S"],
  k: Float[Array, "S K H"],
  v: Float[Array, "S K H"],
) -> tuple[Pages, Kept]:
  """What stays of one layer of a prompt, in its rows if these have pages."""
  rows = compact(keep, k, v)
  heads = rows.head_of_slot + shards.first_head(keep.shape[0])
  if row_pages is not None:
    pages = _write_rows(pages, row_pages, rows.k, rows.v)
  return pages, Kept(keep, rows.lengths, heads)


def _feed_forward(
  block: DecoderBlock, x: Float[Array, "B T D"]
) -> Float[Array, "B T D"]:
  """The second half of a layer; the residual stream is everywhere."""
  x = constrain(x, None, None, None)
  return constrain(x + block.mlp(block.mlp_norm(x)), None, None, None)


def _logits(
  model: DecoderLM, x: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
  """Logits, everywhere; devices exchange these, not their parts of a table."""
  logits = constrain(model.logits(x), None, None, "vocab")
  return constrain(logits, None, None, None)


def _indices(model: DecoderLM) -> Int[Array, " R"]:
  return jnp.arange(model.config.num_layers, dtype=jnp.int32)


def _continue(
  pages: Pages,
  numbers: Int[Array, "K n"],
  k: Float[Array, "T K H"],
  v: Float[Array, "T K H"],
  start: Int[Array, ""],
) -> tuple[Float[Array, "S K H"], Float[Array, "S K H"], Pages]:
  """Keys and values of a prompt so far, and the pool with the new ones."""
  page, size = pages.page_size, k.shape[0]
  room = numbers.shape[1] * page
  # The pages that new tokens may touch.
  touched = min(size // page + 2, numbers.shape[1])
  first = jnp.minimum(start // page, numbers.shape[1] - touched)
  zero = jnp.zeros_like(first)
  both = []
  # Gathered once: a GPU's compiler would do it again after the pool has been
  # written, and keep a copy of it for that.
  so_far = jax.lax.optimization_barrier(pages.gather(numbers))
  for old, new in zip(so_far, (k, v), strict=True):
    # New pages hold what others left there, which even without weight in the
    # attention may be NaN. Padding may reach past the last page.
    old = jnp.where((jnp.arange(room) < start)[:, None], old, 0)
    old = jnp.pad(old, ((0, 0), (0, size), (0, 0)))
    new = new.swapaxes(0, 1).astype(old.dtype)
    both.append(jax.lax.dynamic_update_slice(old, new, (zero, start, zero)))
  parts = (
    jax.lax.dynamic_slice_in_dim(x, first * page, touched * page, axis=1)
    for x in both
  )
  pages = pages.write(
    jax.lax.dynamic_slice_in_dim(numbers, first, touched, axis=1), *parts
  )
  k, v = (x[:, :room].swapaxes(0, 1) for x in both)
  return k, v, pages


def _attend_so_far(
  attention: HeadAttention,
  h: Float[Array, "1 T D"],
  k: Float[Array, "S K H"],
  v: Float[Array, "S K H"],
  start: Int[Array, ""],
) -> Float[Array, "1 T D"]:
  """Attention of a chunk that begins at `start` to all before it and itself."""
  if attention.pattern is not None:  # Counts its blocks from the first key.
    return attention.attend(h, k[None], v[None], q_offset=start)
  # The chunk's own keys to a place that kernels know when they are compiled.
  room, size = k.shape[0], h.shape[1]
  k, v = (
    jax.lax.dynamic_slice_in_dim(
      jnp.pad(x, ((room, size), (0, 0), (0, 0))), start, room + size
    )
    for x in (k, v)
  )
  return attention.attend(
    h, k[None], v[None], q_offset=room, num_hidden=room - start
  )


def _write_rows(
  pages: Pages,
  numbers: Int[Array, "K m"],
  k: Float[Array, "K S H"],
  v: Float[Array, "K S H"],
) -> Pages:
  """Writes packed rows into their pages; past the last, nowhere."""
  room = numbers.shape[1] * pages.page_size
  more = ((0, 0), (0, max(0, room - k.shape[1])), (0, 0))
  k, v = (jnp.pad(x, more)[:, :room] for x in (k, v))
  return pages.write(numbers, k, v)


def _list_pages(
  numbers: Int[Array, "B K M"],
  lengths: Int[Array, "B K"],
  page_size: int,
  entries: int,
) -> tuple[Int[Array, " rows"], Int[Array, " entries"]]:
  """Where in one list each row's pages begin, and the list."""
  numbers = numbers.reshape(-1, numbers.shape[-1])
  counts = num_pages(lengths.reshape(-1), page_size)
  starts = jnp.cumsum(counts) - counts
  row = jnp.repeat(
    jnp.arange(counts.shape[0]), counts, total_repeat_length=entries
  )
  at = jnp.arange(entries) - starts[row]
  return starts, numbers.at[row, at].get(mode="fill", fill_value=0)
