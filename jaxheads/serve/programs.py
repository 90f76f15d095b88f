"""What the device runs in a turn, each compiled once for its sizes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxheads.kvcache.by_shard import rings_of
from jaxheads.kvcache.pages import Pages
from jaxheads.kvcache.policy import Policy
from jaxheads.models.decoder import DecoderLM
from jaxheads.serve.layers import (
  Kept,
  Prompt,
  copy_rows,
  decode,
  read_prompt,
)
from jaxheads.serve.sampling import Sampled, Sampling, sample
from jaxheads.serve.state import Rows


class State(NamedTuple):
  """What stays on the device from turn to turn.

  Attributes:
    pages: The pool.
    rows: Of all sequence slots.
    drawing: What the next draw of each slot depends on, besides logits.
  """

  pages: Pages
  rows: Rows
  drawing: "Drawing"


class Drawing(NamedTuple):
  """Of each slot, or of one.

  Attributes:
    sampling: Its request's settings.
    in_prompt: Which tokens the prompt holds.
    answer_counts: How often the answer holds each token, the one that was
      drawn last excluded.
    tokens: The token that was drawn last.
  """

  sampling: Sampling
  in_prompt: Bool[Array, "*B V"]
  answer_counts: Int[Array, "*B V"]
  tokens: Int[Array, " *B"]

  @classmethod
  def idle(cls, slots: int, vocab_size: int) -> "Drawing":
    """Slots without a request."""
    return cls(
      jax.tree.map(jnp.asarray, Sampling.idle(slots)),
      jnp.zeros((slots, vocab_size), bool),
      jnp.zeros((slots, vocab_size), jnp.int32),
      jnp.zeros(slots, jnp.int32),
    )


class Placement(NamedTuple):
  """Where a prompt's rows go.

  Attributes:
    slot: Sequence slot.
    pages: By row slot.
    rings: `Plan.rings`.
    length: Tokens of the prompt.
    rings_by_rank: `Plan.rings_by_rank`, in place of `rings`; or `None`.
  """

  slot: Int[Any, ""]
  pages: Int[Any, "R K m"]
  rings: Int[Any, "R K"]
  length: Int[Any, ""]
  rings_by_rank: Int[Any, "R K"] | None = None


class Step(NamedTuple):
  """What a decoding step is told; of the first b slots.

  Attributes:
    active: 1 for slots that take part, else 0.
    new_pages, drop, forced: See `turn.Decode`.
  """

  active: Int[Any, " b"]
  new_pages: Int[Any, "R b K"]
  drop: Int[Any, "R b K"]
  forced: Int[Any, " b"]


class Start(NamedTuple):
  """A request whose first token is to be drawn.

  Attributes:
    slot: Sequence slot.
    sampling: `Sampling.of` its parameters.
    in_prompt: Which tokens its prompt holds.
  """

  slot: Int[Any, ""]
  sampling: Sampling
  in_prompt: Bool[Any, " V"]


def read_on(model: DecoderLM, state: State, prompt: Prompt) -> State:
  """Reads a chunk of a prompt that is not its last."""
  reading = read_prompt(
    model, state.pages, prompt, policy=None, layers=None, row_pages=None
  )
  return state._replace(pages=reading.pages)


def finish_prompt(
  model: DecoderLM,
  state: State,
  prompt: Prompt,
  start: Start,
  layers: dict[str, Array],
  placement: Placement | None,
  *,
  policy: Policy,
) -> tuple[State, Sampled, Kept]:
  """Reads a prompt, or its last chunk, and draws the first token.

  Without a placement its rows stay in the prompt's pages, see `place_rows`.
  """
  reading = read_prompt(
    model,
    state.pages,
    prompt,
    policy=policy,
    layers=layers,
    row_pages=None if placement is None else placement.pages,
  )
  assert reading.kept is not None
  state = state._replace(pages=reading.pages)
  if placement is not None:
    state = state._replace(rows=_place(state.rows, placement, reading.kept))
  one = Drawing(
    start.sampling,
    start.in_prompt,
    jnp.zeros(start.in_prompt.shape, jnp.int32),
    jnp.zeros((), jnp.int32),
  )
  sampled = _sample(
    reading.logits[None],
    jax.tree.map(lambda x: jnp.asarray(x)[None], one),
    jnp.zeros(1, jnp.int32),
  )
  one = one._replace(tokens=sampled.tokens[0])
  drawing = jax.tree.map(
    lambda all_, mine: all_.at[start.slot].set(mine), state.drawing, one
  )
  return state._replace(drawing=drawing), sampled, reading.kept


def place_rows(
  model: DecoderLM,
  state: State,
  kept: Kept,
  prompt_pages: Int[Array, "R K n"],
  placement: Placement,
) -> State:
  """Copies what is kept of a prompt from its pages to its rows."""
  del model
  pages = copy_rows(state.pages, kept.tokens, prompt_pages, placement.pages)
  rows = _place(state.rows, placement, kept)
  return state._replace(pages=pages, rows=rows)


def step(
  model: DecoderLM, state: State, told: Step, *, entries: int
) -> tuple[State, Sampled]:
  """One token for every active slot."""
  slots = told.active.shape[0]
  drawing = jax.tree.map(lambda x: x[:slots], state.drawing)
  rows, row_step = state.rows.first(slots).take_token(
    told.active, told.new_pages, told.drop, state.pages.page_size
  )
  tokens = jnp.where(told.forced >= 0, told.forced, drawing.tokens)
  logits, pages = decode(
    model,
    state.pages,
    rows,
    row_step,
    tokens,
    told.active,
    entries=entries,
  )
  counts = drawing.answer_counts.at[jnp.arange(slots), tokens].add(told.active)
  drawing = drawing._replace(answer_counts=counts)
  sampled = _sample(logits, drawing, rows.written)
  drawing = drawing._replace(
    tokens=jnp.where(told.active > 0, sampled.tokens, drawing.tokens)
  )
  drawing = jax.tree.map(
    lambda all_, some: all_.at[:slots].set(some), state.drawing, drawing
  )
  return State(pages, state.rows.with_first(rows), drawing), sampled


def _place(rows: Rows, placement: Placement, kept: Kept) -> Rows:
  rings, by_rank = placement.rings, placement.rings_by_rank
  if by_rank is not None:
    rings = rings_of(by_rank, kept.lengths, kept.head_of_slot, jnp)
  return rows.place(
    placement.slot,
    pages=placement.pages,
    lengths=kept.lengths,
    rings=rings,
    head_of_slot=kept.head_of_slot,
    position=placement.length,
  )


def _sample(
  logits: Float[Array, "b V"], drawing: Drawing, index: Int[Array, " b"]
) -> Sampled:
  return sample(
    logits, drawing.sampling, index, drawing.in_prompt, drawing.answer_counts
  )
