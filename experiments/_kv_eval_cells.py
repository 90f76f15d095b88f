"""Asks a model with every cache: one cell is a method, a budget and a task."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments._kv_eval_methods import page_budget, pages
from experiments._kv_eval_model import Cached, Reader
from jaxheads.data import EVALUATION_SEED, Example, Task
from jaxheads.kvcache import Policy

KVZIP = "kvzip"
# Tokens that are read again at a time, and those before them that say where.
_READ_AGAIN = 16
_LEAD = 4


class Cell(NamedTuple):
  """How well one method answered.

  Attributes:
    exact: Whether each answer was right in all tokens.
    tokens: Share of each answer's tokens that were right, after the right ones
      before them.
    kept: Tokens kept over those of the full cache, on average.
    paged: The same for pages.
  """

  exact: Bool[np.ndarray, " samples"]
  tokens: Float[np.ndarray, " samples"]
  kept: float
  paged: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
  """What to ask, and when the cache is cut.

  Attributes:
    task: Of each prompt.
    length: Tokens of a prompt, question included.
    aware: Cut after the question; otherwise before it, and the question is
      read with what is left.
    samples: Prompts.
    rows: Prompts at a time; divides `samples`.
    first: Number of the first prompt.
    seed: Of the prompts.
  """

  task: Task
  length: int
  aware: bool
  samples: int
  rows: int
  first: int = 0
  seed: int = EVALUATION_SEED

  def batches(self) -> list[list[Example]]:
    """The prompts."""
    return [
      [
        self.task.draw(self.length, seed=self.seed, index=self.first + index)
        for index in range(start, start + self.rows)
      ]
      for start in range(0, self.samples, self.rows)
    ]


def ask(
  reader: Reader,
  question: Question,
  policies: dict[str, Policy],
  budgets: Sequence[float],
  *,
  page_size: int,
  by_pages: Sequence[str] = (),
  sets_of: Sequence[str] = (),
) -> tuple[
  dict[tuple[str, float], Cell], dict[str, Bool[np.ndarray, "samples R K"]]
]:
  """Cells by method and budget, and which heads are full.

  Every prompt is read once. Generated tokens are appended, by every method.

  Args:
    reader: The model.
    question: What to ask.
    policies: By the method's name. "kvzip" is added where the question comes
      after the cut.
    budgets: Shares of the full cache.
    page_size: Tokens of a page, of the pages that are counted.
    by_pages: Methods that are tried also with budgets of pages, under their
      name and " by pages".
    sets_of: Methods whose full heads are returned, at the largest budget below
      1.
  """
  parts: dict[tuple[str, float], list[Cell]] = {}
  sets: dict[str, list[np.ndarray]] = {name: [] for name in sets_of}
  watched = max((budget for budget in budgets if budget < 1), default=1.0)
  for examples in question.batches():
    tokens, answers, counted = _arrays(
      examples, question.task.answer_tokens(question.length)
    )
    cached, after_prompt = reader.read(tokens)
    length = (
      question.length if question.aware else examples[0].questions_start
    )

    def record(name: str, budget: float, keep: Array) -> None:
      if question.aware:
        # The token after the prompt is the full model's.
        fed = answers[:, :-1]
        logits = after_prompt[:, None]
        if fed.shape[1]:
          after = reader.answer(cached, keep, fed, question.length)
          logits = jnp.concatenate([logits, after], axis=1)
      else:
        fed = np.concatenate([tokens[:, length:], answers[:, :-1]], axis=1)
        logits = reader.answer(cached, keep, fed, length)
        logits = logits[:, tokens.shape[1] - length - 1 :]
      right = np.asarray(jnp.argmax(logits, axis=-1)) == answers
      rows = np.asarray(keep.sum(axis=-1))
      cell = Cell(
        exact=(right | ~counted).all(axis=1),
        tokens=(right & counted).sum(axis=1) / counted.sum(axis=1),
        kept=float(rows.mean()) / length,
        paged=float(pages(rows, page_size).mean())
        / float(pages(np.array(length), page_size)),
      )
      parts.setdefault((name, budget), []).append(cell)

    for name, policy in policies.items():
      for budget in budgets:
        keep = reader.keep(policy, cached, length=length, budget=budget)
        record(name, budget, keep)
        if name in sets_of and budget == watched:
          full = np.asarray(keep.sum(axis=-1) == length)
          sets[name].append(full.swapaxes(0, 1))
        if name in by_pages:
          asked = page_budget(
            policy,
            budget,
            length=length,
            shape=reader.shape,
            page_size=page_size,
          )
          keep = reader.keep(policy, cached, length=length, budget=asked)
          record(f"{name} by pages", budget, keep)
    if not question.aware:
      scores = reread(reader, cached, tokens, length)
      for budget in budgets:
        record(KVZIP, budget, keep_best(scores, budget, length))
  return (
    {key: _joined(cells) for key, cells in parts.items()},
    {name: np.concatenate(found) for name, found in sets.items()},
  )


def reread(
  reader: Reader, cached: Cached, tokens: Int[np.ndarray, "B S"], length: int
) -> Float[np.ndarray, "R B K S"]:
  """Most attention of each context token while the context is read again.

  In pieces, each right after the context, as positions far beyond those of the
  training would mean nothing.
  """
  best: np.ndarray | None = None
  # Pieces of one shape, the last of which overlaps the one before.
  size = min(_READ_AGAIN + _LEAD, length)
  starts = [*range(0, max(1, length - size), _READ_AGAIN), length - size]
  for start in starts:
    piece = tokens[:, start : start + size]
    scores = np.asarray(reader.rereading(cached, length, piece))
    best = scores if best is None else np.maximum(best, scores)
  assert best is not None
  return best


def keep_best(
  scores: Float[np.ndarray, "R B K S"], budget: float, length: int
) -> Bool[Array, "R B K S"]:
  """The best tokens of all layers and heads together, and the first of each."""
  layers, rows, heads, size = scores.shape
  scores = scores.copy()
  scores[..., 0] = np.inf
  scores[..., length:] = -np.inf
  flat = scores.swapaxes(0, 1).reshape(rows, -1)
  count = max(layers * heads, int(budget * layers * heads * length + 1e-9))
  order = np.argsort(-flat, axis=-1, kind="stable")[:, :count]
  keep = np.zeros(flat.shape, bool)
  np.put_along_axis(keep, order, True, axis=-1)
  keep = keep.reshape(rows, layers, heads, size).swapaxes(0, 1)
  return jnp.asarray(keep)


def _arrays(
  examples: list[Example], answer_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Prompts, answers, and which of the answers' tokens are not padding."""
  tokens = np.stack([example.tokens[: example.length] for example in examples])
  answers = np.zeros((len(examples), answer_tokens), np.int32)
  counted = np.zeros(answers.shape, bool)
  for row, example in enumerate(examples):
    size = len(example.answer)
    answers[row, :size] = example.answer
    counted[row, :size] = True
  return tokens, answers, counted


def _joined(cells: list[Cell]) -> Cell:
  exact, tokens, kept, paged = zip(*cells, strict=True)
  return Cell(
    np.concatenate(exact),
    np.concatenate(tokens),
    float(np.mean(kept)),
    float(np.mean(paged)),
  )
