"""Whether a model finds needles: as it learns, and by length and depth."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxheads.data import (
  EVALUATION_SEED,
  NeedleBatches,
  Stage,
  Task,
  needle_batch,
)
from jaxheads.models import token_nats
from jaxheads.training import devices, figures
from jaxheads.training.step import TrainState

_INK = "#222222"


@dataclasses.dataclass(frozen=True)
class Retrieved:
  """How well one state answers.

  Attributes:
    loss: Mean nats per answer token.
    exact: Fraction of the prompts whose whole answer is right.
    length: Tokens of the prompts.
  """

  loss: float
  exact: float
  length: int

  def scalars(self) -> dict[str, float]:
    """What the metrics record besides the loss."""
    return {"exact_match": self.exact, "prompt_tokens": self.length}

  def __str__(self) -> str:
    return (
      f"{100 * self.exact:.0f} % exact answers at {self.length:,} tokens, "
      f"{self.loss:.3f} nats/token"
    )


class Retrieval:
  """Asks a model for needles that it was never trained on.

  An answer counts if every token of it is the likeliest one after the prompt
  and the right answer so far, which is when greedy decoding gives the whole
  answer.

  Args:
    graphdef: The model's graph; it maps tokens [B, T] to logits [B, T, V].
    tokens_per_batch: Prompt tokens that are read at a time.
    mesh: All devices.
    samples: Prompts of a validation.
    stage_at: What to validate on, by training step; one question is asked.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef[Any],
    *,
    tokens_per_batch: int,
    mesh: Mesh,
    samples: int,
    stage_at: Callable[[int], Stage],
  ) -> None:
    self._answers = _make_answers(graphdef, mesh)
    self._tokens_per_batch = tokens_per_batch
    self._mesh = mesh
    self._samples = samples
    self._stage_at = stage_at

  def __call__(
    self, state: TrainState, *, should_stop: Callable[[], bool]
  ) -> Retrieved | None:
    """In the stage of the last step; None if `should_stop` became true."""
    if should_stop():
      return None
    stage = self._stage_at(max(0, int(state.step) - 1))
    return self.ask(state, stage.task, stage.length, samples=self._samples)

  def ask(
    self,
    state: TrainState,
    task: Task,
    length: int,
    *,
    samples: int,
    depth: float | None = None,
    first: int = 0,
  ) -> Retrieved:
    """Answers to `samples` prompts of `length` tokens.

    Args:
      state: The model's.
      task: What each prompt hides; one question is asked.
      length: Tokens of each prompt.
      samples: How many prompts.
      depth: Where the needle is, 0 to 1; `None` is anywhere.
      first: Number of the first example of the evaluation's seed.
    """
    task = task.asking_once()
    size = devices.batch_parts(self._mesh)
    rows = max(1, self._tokens_per_batch // length // size) * size
    exact = nats = 0.0
    for start in range(0, samples, rows):
      wanted = min(rows, samples - start)
      # The last batch is filled up with prompts that are not counted, for
      # every length to have one compiled program.
      examples = [
        task.draw(
          length,
          seed=EVALUATION_SEED,
          index=first + start + row,
          depth=depth,
        )
        for row in range(rows)
      ]
      batch = needle_batch(examples, answer_tokens=task.answer_tokens(length))
      # Of earlier questions the answers are given.
      batch["mask"][:, : length - 1] = False
      mine = list(devices.rows_of_process(self._mesh, rows))
      batch = devices.put_batch(
        self._mesh, {name: values[mine] for name, values in batch.items()}
      )
      right, row_nats = self._answers(state.params, state.rest, batch)
      exact += float(np.asarray(right)[:wanted].sum())
      nats += float(np.asarray(row_nats)[:wanted].sum())
    return Retrieved(nats / samples, exact / samples, length)

  def sweep(
    self,
    state: TrainState,
    task: Task,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    samples: int,
  ) -> Float[np.ndarray, "lengths depths"]:
    """Fraction of exact answers for each length and depth."""
    return np.array(
      [
        [
          self.ask(
            state,
            task,
            length,
            samples=samples,
            depth=depth,
            first=cell * samples,
          ).exact
          for cell, depth in enumerate(depths)
        ]
        for length in lengths
      ]
    )


def retrieval_data(
  stages: Sequence[Stage],
  *,
  tokens_per_step: int,
  seed: int,
  tokens_per_batch: int,
  samples: int,
) -> Callable[[nnx.GraphDef[Any], Mesh], tuple[NeedleBatches, Retrieval]]:
  """What `fit` takes as `make_data`: batches of the stages, and questions.

  Args:
    stages: What is trained, see `jaxheads.data.NeedleBatches`.
    tokens_per_step: Of a batch of them.
    seed: Of the examples.
    tokens_per_batch: Of questions that are asked at once.
    samples: Questions of an evaluation while training.
  """

  def make_data(
    graphdef: nnx.GraphDef[Any], mesh: Mesh
  ) -> tuple[NeedleBatches, Retrieval]:
    batches = NeedleBatches(
      stages,
      tokens_per_step=tokens_per_step,
      seed=seed,
      row_multiple=devices.batch_parts(mesh),
      rows_of=lambda rows: devices.rows_of_process(mesh, rows),
    )
    return batches, Retrieval(
      graphdef,
      tokens_per_batch=tokens_per_batch,
      mesh=mesh,
      samples=samples,
      stage_at=batches.stage_at,
    )

  return make_data


def _make_answers(
  graphdef: nnx.GraphDef[Any], mesh: Mesh
) -> Callable[..., Any]:
  """The compiled (params, rest, batch) to (exact, mean nats), both [B]."""

  def answers(params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
    model = nnx.merge(graphdef, params, rest)
    logits = model(batch["tokens"], deterministic=True)
    targets, mask = batch["targets"], batch["mask"]
    right = jnp.argmax(logits, axis=-1) == targets
    nats = token_nats(logits, targets)
    mean = jnp.mean(nats, axis=1, where=mask)
    return jnp.all(right | ~mask, axis=1), mean

  # Every process reads the answers of all.
  return jax.jit(answers, out_shardings=NamedSharding(mesh, PartitionSpec()))


def plot_retrieval(
  accuracies: Mapping[str, Float[np.ndarray, "lengths depths"]],
  lengths: Sequence[int],
  depths: Sequence[float],
  path: str | os.PathLike[str],
  *,
  trained_length: int | None = None,
) -> None:
  """Draws a heat map for each model: length to the right, depth downwards.

  Args:
    accuracies: Fraction of exact answers, in [0, 1], by the model's name.
    lengths: Tokens of the prompts.
    depths: Where the needle was, 0 at the start of the context.
    path: PNG to write.
    trained_length: Longest prompt in training; a line divides off what is
      longer.

  Raises:
    ValueError: A map of another shape.
    UserError: The file cannot be written.
  """
  for name, accuracy in accuracies.items():
    if np.shape(accuracy) != (len(lengths), len(depths)):
      raise ValueError(
        f"`accuracies[{name!r}]` must have shape "
        f"[{len(lengths)}, {len(depths)}], got {list(np.shape(accuracy))}."
      )
  width = 1.6 + len(accuracies) * max(2.6, 0.62 * len(lengths))
  figure = Figure(
    figsize=(width, 1.5 + 0.3 * len(depths)), dpi=150, layout="constrained"
  )
  panels = figure.subplots(1, len(accuracies), squeeze=False, sharey=True)[0]
  colours = matplotlib.colormaps["viridis"]
  for axes, (name, accuracy) in zip(panels, accuracies.items(), strict=True):
    mesh = axes.pcolormesh(
      np.asarray(accuracy).T,
      cmap=colours,
      vmin=0,
      vmax=1,
      edgecolors="white",
      linewidth=0.8,
    )
    for (column, row), value in np.ndenumerate(accuracy):
      axes.text(
        column + 0.5,
        row + 0.5,
        f"{100 * value:.0f}",
        ha="center",
        va="center_baseline",
        fontsize=7,
        color="white" if value < 0.6 else _INK,
      )
    if trained_length is not None:
      inside = sum(length <= trained_length for length in lengths)
      if inside < len(lengths):
        axes.axvline(inside, color="#D55E00", linewidth=2.4)
    axes.set_title(
      f"{name}: {100 * np.mean(accuracy):.1f} %",
      loc="left",
      fontsize=10,
      color=_INK,
    )
    axes.set_xticks(
      np.arange(len(lengths)) + 0.5, [f"{length:,}" for length in lengths]
    )
    axes.set_xlabel("prompt (tokens)", fontsize=9)
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
  panels[0].set_ylim(len(depths), 0)
  panels[0].set_yticks(
    np.arange(len(depths)) + 0.5, [f"{100 * depth:.0f} %" for depth in depths]
  )
  panels[0].set_ylabel("depth of the needle", fontsize=9)
  bar = figure.colorbar(mesh, ax=list(panels), label="exact answers")
  bar.outline.set_visible(False)
  figures.save(figure, path)
