"""Batches of looking things up, first in short prompts, then in long ones."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxheads.errors import UserError

from ._loader import Batch
from ._prompts import PAD, Example, Task

_REVIEW_EVERY = 3


def needle_batch(
  examples: Sequence[Example], *, answer_tokens: int = 0
) -> Batch:
  """Examples of one length as "tokens", "targets" and "mask" [B, T].

  T is the prompt's length and `answer_tokens`, or more where an answer is
  longer. The mask is True where the target stands after the first QRY, up to
  EOS: noise cannot be learnt.
  """
  length = max(example.length for example in examples)
  total = max(
    length + answer_tokens + 1,
    *(len(example.tokens) for example in examples),
  )
  tokens = np.full((len(examples), total), PAD, np.int32)
  for row, example in zip(tokens, examples, strict=True):
    row[: len(example.tokens)] = example.tokens
  starts = np.array([example.questions_start for example in examples])
  # Target t is token t + 1.
  targets = tokens[:, 1:]
  mask = np.arange(total - 1)[None] >= starts[:, None]
  mask &= targets != PAD
  return {"tokens": tokens[:, :-1], "targets": targets, "mask": mask}


@dataclasses.dataclass(frozen=True)
class Stage:
  """Part of a curriculum.

  Attributes:
    task: What prompts hide, and how many questions they ask. Prompts take
      turns (`Task.at_turn`): with 1 to `task.needles` needles, so that the
      easy case comes along, and with 1 to `task.questions` questions, so that
      distance alone does not find a needle.
    length: Tokens of a prompt.
    steps: Batches.

  Raises:
    UserError: `length` does not hold the needles.
  """

  task: Task
  length: int
  steps: int

  def __post_init__(self) -> None:
    if self.length < self.task.min_length():
      raise UserError(
        f"a prompt for {self.task} needs at least {self.task.min_length()} "
        f"tokens, got {self.length}; make it longer, or hide less"
      )


class NeedleBatches(Iterator[Batch]):
  """Batches of one stage after the other, all of about as many tokens.

  Every third batch goes back to one of the stages before, by turns: what was
  learnt at short prompts would fade at long ones. Example i of the run is the
  same whatever the number of processes. The last stage never ends.

  Args:
    stages: In this order.
    tokens_per_step: Prompt tokens of a batch, over all processes; rounded down
      to whole prompts, and these to a multiple of `row_multiple`.
    seed: Below `EVALUATION_SEED`.
    row_multiple: Rows divide evenly by this, such as the number of devices.
    rows_of: (rows of a batch) to those of them that this process needs, such as
      `jaxheads.training.devices.rows_of_process`; None needs all.
  """

  def __init__(
    self,
    stages: Sequence[Stage],
    *,
    tokens_per_step: int,
    seed: int,
    row_multiple: int = 1,
    rows_of: Callable[[int], Sequence[int]] | None = None,
  ) -> None:
    if not stages:
      raise ValueError("`stages` must hold at least one stage, got none.")
    self._stages = tuple(stages)
    self._seed = seed
    self._rows = [
      max(1, tokens_per_step // stage.length // row_multiple) * row_multiple
      for stage in stages
    ]
    self._rows_of = rows_of or range
    self._step = 0

  def __next__(self) -> Batch:
    number = self._drawn_at(self._step)
    stage, rows = self._stages[number], self._rows[number]
    # Numbers that no two examples of the run share.
    first = self._step * max(self._rows)
    self._step += 1
    batch = needle_batch(
      [self._draw(stage, first + row) for row in range(rows)],
      answer_tokens=stage.task.answer_tokens(stage.length),
    )
    # Drawn whole, because the longest answer decides the shape.
    mine = list(self._rows_of(rows))
    return {name: values[mine] for name, values in batch.items()}

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch taken, as JSON can hold it."""
    return {"step": self._step, **self._describe()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position from `get_state`.

    Raises:
      UserError: It comes from another curriculum, task or seed.
    """
    changed = [
      f"`{name}` was {state.get(name)}, is {value}"
      for name, value in self._describe().items()
      if state.get(name) != value
    ]
    if changed:
      raise UserError(
        "the data position cannot be resumed with other settings: "
        f"{'; '.join(changed)}."
      )
    self._step = int(state["step"])

  def close(self) -> None:
    """Nothing runs in the background."""

  def stage_at(self, step: int) -> Stage:
    """The stage that training is in after `step` batches."""
    return self._stages[self._reached_at(step)[0]]

  def _reached_at(self, step: int) -> tuple[int, int]:
    """Number of the stage, and the batches since it began."""
    for number, stage in enumerate(self._stages[:-1]):
      if step < stage.steps:
        return number, step
      step -= stage.steps
    return len(self._stages) - 1, step

  def _drawn_at(self, step: int) -> int:
    """Number of the stage that the batch after `step` batches is of."""
    number, since = self._reached_at(step)
    if number and since % _REVIEW_EVERY == _REVIEW_EVERY - 1:
      return since // _REVIEW_EVERY % number
    return number

  def _draw(self, stage: Stage, index: int) -> Example:
    return stage.task.at_turn(index).draw(
      stage.length, seed=self._seed, index=index
    )

  def _describe(self) -> dict[str, Any]:
    """What must be equal for a position to mean the same."""
    return {
      "stages": [repr(stage) for stage in self._stages],
      "rows": self._rows,
      "seed": self._seed,
    }
