"""What the scheduler remembers of a request."""

import dataclasses
import enum

import numpy as np
from jaxtyping import Int

from jaxheads.kvcache.policy import Plan
from jaxheads.serve.request import Request


class State(enum.Enum):
  """Where a request stands; preemption leads back to the first."""

  WAITING = "waiting"
  PREFILLING = "prefilling"  # Some chunks of its prompt are still to come.
  SETTLING = "settling"  # Read; it waits for its rows' lengths or pages.
  RUNNING = "running"


@dataclasses.dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
  """A request in the scheduler.

  Attributes:
    request: As it came.
    plan: Lengths and rings of its rows; they may be bounds.
    blocks: Keys of the prompt's full pages, empty without prefix sharing.
    scheduled: Tokens that it was, or will be in the turns that have been
      given out, answered with; survives preemption.
    known: Values of the first of them; survives preemption.
    state: See `State`. What follows is for the states after WAITING.
    slot: Its sequence slot.
    read: Tokens of the prompt that are in prompt pages.
    prompt_pages: See `Prefill`.
    shared: How many of `blocks` came from the prefix cache.
    settled: The plan with exact lengths, as soon as they are known.
    written: Generated tokens that its rows have taken.
    replay: Generated tokens that were known when it was admitted.
  """

  request: Request
  plan: Plan
  blocks: tuple[bytes, ...]
  scheduled: int = 0
  known: list[int] = dataclasses.field(default_factory=list)
  state: State = State.WAITING
  slot: int = -1
  read: int = 0
  prompt_pages: Int[np.ndarray, "R K n"] | None = None
  shared: int = 0
  settled: Plan | None = None
  written: int = 0
  replay: int = 0

  @property
  def length(self) -> int:
    """Tokens of the prompt."""
    return len(self.request.prompt)

  @property
  def position(self) -> int:
    """Where its next token is written."""
    return self.length + self.written

  @property
  def done(self) -> bool:
    """Whether its last token has been scheduled."""
    return self.scheduled >= self.request.params.max_tokens
