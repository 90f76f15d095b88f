"""What the device runs in a turn, each compiled once for its sizes."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
from jaxheads.serve.state import Rows


class State(NamedTuple):
  """What stays on the device from turn to turn.

  Attributes:
    pages: The pool.
    rows: Of all sequence slots.
    tokens: The token that each slot sampled last.
  """

  pages: Pages
  rows: Rows
  tokens: Int[Array, " B"]


class Placement(NamedTuple):
  """Where a prompt's rows go.

  Attributes:
    slot: Sequence slot.
    pages: By row slot.
    rings: `Plan.rings`.
    length: Tokens of the prompt.
  """

  slot: Int[Array, ""]
  pages: Int[Array, "R K m"]
  rings: Int[Array, "R K"]
  length: Int[Array, ""]


class Step(NamedTuple):
  """What a decoding step is told; of the first b slots.

  Attributes:
    active: 1 for slots that take part, else 0.
    new_pages, drop, forced: See `turn.Decode`.
  """

  active: Int[Array, " b"]
  new_pages: Int[Array, "R b K"]
  drop: Int[Array, "R b K"]
  forced: Int[Array, " b"]


class Sampled(NamedTuple):
  """Tokens that were drawn."""

  tokens: Int[Array, " b"]


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
  slot: Int[Array, ""],
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
  sampled = Sampled(_sample(reading.logits[None]))
  tokens = state.tokens.at[slot].set(sampled.tokens[0])
  return state._replace(tokens=tokens), sampled, reading.kept


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
  tokens = state.tokens[:slots]
  rows, row_step = state.rows.first(slots).take_token(
    told.active, told.new_pages, told.drop, state.pages.page_size
  )
  logits, pages = decode(
    model,
    state.pages,
    rows,
    row_step,
    jnp.where(told.forced >= 0, told.forced, tokens),
    told.active,
    entries=entries,
  )
  sampled = Sampled(_sample(logits))
  tokens = jnp.where(told.active > 0, sampled.tokens, tokens)
  state = State(
    pages,
    state.rows.with_first(rows),
    state.tokens.at[:slots].set(tokens),
  )
  return state, sampled


def _place(rows: Rows, placement: Placement, kept: Kept) -> Rows:
  return rows.place(
    placement.slot,
    pages=placement.pages,
    lengths=kept.lengths,
    rings=placement.rings,
    head_of_slot=kept.head_of_slot,
    position=placement.length,
  )


def _sample(logits: Float[Array, "b V"]) -> Int[Array, " b"]:
  return jnp.argmax(logits, axis=-1).astype(jnp.int32)
