"""What the scheduler tells the device to do next."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int

from jaxheads.kvcache.policy import Plan
from jaxheads.serve.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prefill:
  """Reads some tokens of one prompt: all of it, or a chunk.

  Without prompt pages, the whole prompt is read and its survivors go straight
  to the row pages. With them, keys and values of the chunk go to the prompt
  pages, which hold all tokens from position 0 on; the last chunk then also
  copies the survivors to the row pages, if these are given already. Pages of
  tokens before the first chunk's start are shared: they are never written.

  Attributes:
    slot: Sequence slot, for its rows and its sampling.
    request: Whose prompt it is.
    start: Position of the first token to read.
    count: Tokens to read.
    last: Whether they end the prompt: a token is sampled from the last one,
      and decoding may begin in the next turn.
    plan: Lengths and rings of the rows; bounds, if its `rings_by_rank` is set.
    prompt_pages: Pages of the uncompressed prompt by head (not by row slot);
      `None` if the whole prompt is read at once.
    row_pages: Pages of the rows by row slot, 0 after a row's last; `None`
      before the last chunk, and where lengths are not known yet: a `Compact`
      then brings them.
    emit: Whether the sampled token is new. If not, and `last`, the request
      was preempted: the token is known, and has been given out.
  """

  slot: int
  request: Request
  start: int
  count: int
  last: bool
  plan: Plan
  prompt_pages: Int[np.ndarray, "R K n"] | None
  row_pages: Int[np.ndarray, "R K m"] | None
  emit: bool


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Compact:
  """Copies the survivors of a prompt, now that the host knows how many.

  Attributes:
    slot: Sequence slot.
    request: Whose prompt it is.
    plan: Its plan, with the lengths that the device found.
    prompt_pages, row_pages: As in `Prefill`.
  """

  slot: int
  request: Request
  plan: Plan
  prompt_pages: Int[np.ndarray, "R K n"]
  row_pages: Int[np.ndarray, "R K m"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Decode:
  """One token for each running sequence: written, attended from, sampled.

  Per row: first `drop`, then `new_pages`, then the token is written where
  `jaxheads.kvcache.rows.row_step` says. Slots that are not listed do nothing;
  their entries are those of an idle slot.

  Attributes:
    slots: Sequence slots that take part, ascending.
    requests: Ids of their requests, in the same order.
    new_pages: The page that a row's token begins, 0 if it has one already.
    drop: Index, among a row's pages, of the one it gives up; -1 for none.
    forced: The token to write, for requests that replay; -1 takes the one
      that the slot sampled last.
    emit: Whether the token that a slot samples is new; if not, it is known.
    entries: Pages that the rows list, in the layer that lists most, with the
      new ones.
  """

  slots: Int[np.ndarray, " n"]
  requests: tuple[str, ...]
  new_pages: Int[np.ndarray, "R B K"]
  drop: Int[np.ndarray, "R B K"]
  forced: Int[np.ndarray, " B"]
  emit: Bool[np.ndarray, " B"]
  entries: int


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
  """What the device does next; the parts may run in any order.

  No two parts touch the same sequence, and none writes a page that another
  one reads or writes.
  """

  prefill: Prefill | None
  compact: Compact | None
  decode: Decode | None
