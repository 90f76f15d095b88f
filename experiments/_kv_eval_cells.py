"""Asks a model with every cache: one cell is a method, a budget and a task."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from experiments._kv_eval_methods import Settings, page_budget, pages
from experiments._kv_eval_model import Reader
from jaxheads.data import EVALUATION_SEED, Example, Task
from jaxheads.kvcache import Policy, keep_best
from jaxheads.kvcache.budgets import share

KVZIP = "kvzip"
# Tokens that are read again at a time, and those before them that say where.
_CALIBRATION_PROMPTS = 16
# Far from the seeds of models.
_CALIBRATION_SEED = EVALUATION_SEED - 1
_READ_AGAIN = 32
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
  *,
  budgets: Sequence[float],
  page_size: int,
  sinks: int,
  by_pages: Sequence[str] = (),
  sets_of: Sequence[str] = (),
  reference: bool = False,
) -> tuple[
  dict[tuple[str, float], Cell], dict[str, Bool[np.ndarray, "samples R K"]]
]:
  """Cells by method and budget, and which heads are full.

  Every prompt is read once. Generated tokens are appended, by every method.

  Args:
    reader: The model.
    question: What to ask.
    policies: By the method's name.
    budgets: Shares of the full cache.
    page_size: Tokens of a page, of the pages that are counted.
    sinks: First tokens that "kvzip" keeps.
    by_pages: Methods that are tried also with budgets of pages, under their
      name and " by pages".
    sets_of: Methods whose full heads are returned, at the largest budget below
      1.
    reference: Also "kvzip", if the cut is before the question.
  """
  parts: dict[tuple[str, float], list[Cell]] = {}
  sets: dict[str, list[np.ndarray]] = {name: [] for name in sets_of}
  watched = max((budget for budget in budgets if budget < 1), default=1.0)
  for examples in question.batches():
    batch = _Batch(reader, question, examples, page_size)
    for name, policy in policies.items():
      for budget in budgets:
        cell, full = batch.ask(policy, budget)
        parts.setdefault((name, budget), []).append(cell)
        if name in sets_of and budget == watched:
          sets[name].append(full)
        if name in by_pages:
          paged = page_budget(
            policy,
            budget,
            length=batch.length,
            shape=reader.shape,
            page_size=page_size,
          )
          cell, _ = batch.ask(policy, paged)
          parts.setdefault((f"{name} by pages", budget), []).append(cell)
    if reference and not question.aware:
      scores = reread(reader, batch.tokens, batch.length)
      for budget in budgets:
        keep = keep_reread(scores, budget, batch.length, sinks)
        parts.setdefault((KVZIP, budget), []).append(batch.cell(keep))
  return (
    {key: _joined(cells) for key, cells in parts.items()},
    {name: np.concatenate(found) for name, found in sets.items()},
  )


class _Batch:
  """Some prompts, read once."""

  def __init__(
    self,
    reader: Reader,
    question: Question,
    examples: list[Example],
    page_size: int,
  ) -> None:
    self._reader, self._question = reader, question
    self._page_size = page_size
    self.tokens, self._answers, self._counted = _arrays(
      examples, question.task.answer_tokens(question.length)
    )
    self._cached, self._after_prompt = reader.read(self.tokens)
    # Tokens in the cache when it is cut.
    self.length = (
      question.length if question.aware else examples[0].questions_start
    )

  def ask(
    self, policy: Policy, budget: float
  ) -> tuple[Cell, Bool[np.ndarray, "B R K"]]:
    """The answers with what the policy keeps, and which heads are full."""
    plan = policy.plan(self.length, budget, self._reader.shape)
    if (plan.lengths == self.length).all() and policy.knows_lengths:
      heads = (len(self.tokens), *self._reader.shape)
      return self._everything, np.ones(heads, bool)
    keep = self._reader.keep(
      policy, self._cached, length=self.length, budget=budget
    )
    full = np.asarray(keep.sum(axis=-1) == self.length)
    return self.cell(keep), full.swapaxes(0, 1)

  @functools.cached_property
  def _everything(self) -> Cell:
    """The answers with the full cache."""
    seen = jnp.arange(self.tokens.shape[1]) < self.length
    layers, heads = self._reader.shape
    shape = (layers, len(self.tokens), heads, len(seen))
    return self.cell(jnp.broadcast_to(seen, shape))

  def cell(self, keep: Array) -> Cell:
    """The answers with what is kept."""
    answers, counted = self._answers, self._counted
    fed = np.concatenate(
      [self.tokens[:, self.length :], answers[:, :-1]], axis=1
    )
    # The token after the prompt is the full model's, if the cut is there.
    logits = [self._after_prompt[:, None]] if self._question.aware else []
    if fed.shape[1]:
      logits.append(self._reader.answer(self._cached, keep, fed, self.length))
    says = np.asarray(jnp.argmax(jnp.concatenate(logits, axis=1), axis=-1))
    right = says[:, -answers.shape[1] :] == answers
    rows = np.asarray(keep.sum(axis=-1))
    size = self._page_size
    return Cell(
      exact=(right | ~counted).all(axis=1),
      tokens=(right & counted).sum(axis=1) / counted.sum(axis=1),
      kept=float(rows.mean()) / self.length,
      paged=float(pages(rows, size).mean() / pages(self.length, size)),
    )


def head_gates(
  reader: Reader, tasks: Sequence[Task], length: int, settings: Settings
) -> tuple[tuple[float, ...], ...]:
  """How much each head looks past its sinks and recent tokens, [R][K].

  Attention of the last queries, on prompts that are neither asked nor learnt.
  """
  total = np.zeros(reader.shape)
  for task in tasks:
    examples = [
      task.draw(length, seed=_CALIBRATION_SEED, index=index)
      for index in range(_CALIBRATION_PROMPTS)
    ]
    tokens, _, _ = _arrays(examples, task.answer_tokens(length))
    cached, _ = reader.read(tokens)
    attention = reader.window_attention(cached, settings.window)
    past = attention[..., settings.sinks : length - settings.window]
    total += np.asarray(past.sum(axis=-1).mean(axis=1))
  return tuple(tuple(map(float, layer)) for layer in total / len(tasks))


def reread(
  reader: Reader, tokens: Int[np.ndarray, "B S"], length: int
) -> Float[Array, "R B K S"]:
  """Most attention of each context token while the context is read again.

  In pieces, each right after the context, as positions far beyond those of the
  training would mean nothing.
  """
  context = tokens[:, :length]
  # Pieces of one shape, the last of which overlaps the one before.
  size = min(_READ_AGAIN + _LEAD, length)
  starts = [*range(0, max(1, length - size), _READ_AGAIN), length - size]
  best = None
  for start in starts:
    again = np.concatenate([context, context[:, start : start + size]], axis=1)
    scores = reader.rereading(again, length)
    best = scores if best is None else jnp.maximum(best, scores)
  assert best is not None
  # Of the prompt, question included.
  missing = max(0, tokens.shape[1] - best.shape[-1])
  best = jnp.pad(best, [(0, 0)] * 3 + [(0, missing)])
  return best[..., : tokens.shape[1]]


def keep_reread(
  scores: Float[Array, "R B K S"], budget: float, length: int, sinks: int
) -> Bool[Array, "R B K S"]:
  """The best tokens of all layers and heads together."""
  layers, _, heads, _ = scores.shape
  return _keep_best(
    scores,
    jnp.int32(length),
    jnp.int32(share(budget, layers * heads * length)),
    sinks,
  )


@functools.partial(jax.jit, static_argnums=3)
def _keep_best(
  scores: Array, length: Array, tokens: Array, sinks: int
) -> Array:
  best = functools.partial(keep_best, length=length, tokens=tokens, sinks=sinks)
  return jax.vmap(best, in_axes=1, out_axes=1)(scores)


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
