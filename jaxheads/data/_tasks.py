"""The tasks by name, and several of them at once."""

import dataclasses

from ._copying import InductionTask, SegmentTask
from ._counting import CommonWordsTask, FrequentWordsTask
from ._lookups import ManyValuesTask, SumTask, VariablesTask
from ._needle import NeedleTask
from ._prompts import Example, Task

_KV_KEY_TOKENS = 4


def retrieval_tasks(length: int) -> dict[str, Task]:
  """The eleven tasks of long contexts, by name, for prompts of `length`.

  Source:
    After RULER, https://arxiv.org/abs/2404.06654, and InfiniteBench's
    key-value retrieval, https://arxiv.org/abs/2402.13718, in a size that can
    be learnt from scratch.
  """
  return {
    "niah_single": NeedleTask(),
    "niah_multikey": NeedleTask(needles=4),
    "niah_multivalue": ManyValuesTask(),
    "niah_multiquery": NeedleTask(needles=8, asked=4),
    "variables": VariablesTask(),
    "frequent_words": FrequentWordsTask(),
    "common_words": CommonWordsTask(),
    "kv_retrieval": NeedleTask(
      needles=max(1, length // 12), key_tokens=_KV_KEY_TOKENS
    ),
    "copy": SegmentTask(),
    "induction": InductionTask(),
    "sum": SumTask(),
  }


@dataclasses.dataclass(frozen=True)
class MixedTask(Task):
  """Several tasks, by turns."""

  tasks: tuple[Task, ...]

  def __post_init__(self) -> None:
    if not self.tasks:
      raise ValueError("`tasks` must hold at least one task, got none.")

  def __str__(self) -> str:
    return ", ".join(map(str, self.tasks))

  def min_length(self) -> int:
    """Tokens of the shortest prompt."""
    return max(task.min_length() for task in self.tasks)

  def answer_tokens(self, length: int) -> int:
    """As `Task.answer_tokens`."""
    return max(task.answer_tokens(length) for task in self.tasks)

  def at_turn(self, index: int) -> Task:
    """One of the tasks, at its own turn."""
    turn, number = divmod(index, len(self.tasks))
    return self.tasks[number].at_turn(turn)

  def asking_once(self) -> "MixedTask":
    """With one question."""
    return MixedTask(tuple(task.asking_once() for task in self.tasks))

  def draw(
    self, length: int, *, seed: int, index: int, depth: float | None = None
  ) -> Example:
    """As `Task.draw`, of the task whose turn `index` is."""
    task = self.tasks[index % len(self.tasks)]
    return task.draw(length, seed=seed, index=index, depth=depth)
