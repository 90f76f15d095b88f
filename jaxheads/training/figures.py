"""Figures of a run as PNG files: loss curves, and the load of every head.

Figures are drawn on a canvas of their own: `pyplot`, its global state and a
notebook's backend stay untouched. Colours are those that colour-blind readers
tell apart, and no meaning hangs on colour alone.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float, Int, Integer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from jaxheads.data import ByteTokenizer, Tokenizer
from jaxheads.errors import UserError

# Okabe and Ito's palette.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_INK = "#222222"
_FAINT = "#6E6E6E"
_ABSENT = "#DDDDDD"
_CLASS_NAMES = (
  "letters",
  "digits",
  "spaces",
  "newlines",
  "operators",
  "quotes, #",
  "other",
)
_OTHER = len(_CLASS_NAMES) - 1


def plot_losses(
  runs: Mapping[str, Sequence[Mapping[str, Any]]],
  path: str | os.PathLike[str],
  *,
  train_key: str = "loss",
  validation_key: str = "validation_loss",
) -> None:
  """Draws the training and validation loss of one or more runs over steps.

  Training loss is a faint line with its running mean on top; validation loss
  is a dashed line with markers and its last value. Of two runs that were
  validated at the same steps, a second panel shows by how many per cent the
  first is above the second.

  Args:
    runs: Records by the name of the run, as `read_metrics` returns them. A
      record may have either key, both or none; NaN is left out.
    path: PNG to write; replaced in one step, folders made as needed.
    train_key: Cross-entropy of a training batch, in nats per token.
    validation_key: Cross-entropy of the validation split, in nats per token.

  Raises:
    ValueError: No run has a finite point.
  """
  train = {name: _series(rows, train_key) for name, rows in runs.items()}
  validation = {
    name: _series(rows, validation_key) for name, rows in runs.items()
  }
  points = [*train.values(), *validation.values()]
  if not any(len(steps) for steps, _ in points):
    raise ValueError(
      f"`runs` must have a finite `{train_key}` or `{validation_key}`."
    )
  gap = _gap(list(validation.values()))
  figure = Figure(
    figsize=(8, 4.8 if gap is None else 6.2), dpi=150, layout="constrained"
  )
  axes = figure.subplots(
    1 if gap is None else 2,
    sharex=True,
    squeeze=False,
    gridspec_kw={"height_ratios": [1] if gap is None else [3.2, 1]},
  )[:, 0]
  main = axes[0]
  for index, name in enumerate(runs):
    colour = _COLOURS[index % len(_COLOURS)]
    steps, losses = train[name]
    if len(steps):
      main.plot(steps, losses, color=colour, alpha=0.22, linewidth=0.8)
      main.plot(
        steps,
        _running_mean(losses),
        color=colour,
        linewidth=1.8,
        label=f"{name}: training",
      )
    steps, losses = validation[name]
    if len(steps):
      main.plot(
        steps,
        losses,
        color=colour,
        linewidth=1.4,
        linestyle=(0, (4, 2)),
        marker=_MARKERS[index % len(_MARKERS)],
        # Small and full on top of large and hollow: equal runs stay visible.
        markersize=4 + 3 * index,
        markerfacecolor="white" if index else colour,
        zorder=4 - 0.1 * index,
        label=f"{name}: validation, last {losses[-1]:.3f}",
      )
  main.set_ylim(*_loss_limits(points))
  main.set_title(
    "Cross-entropy while training", loc="left", color=_INK, fontsize=12
  )
  main.set_ylabel("nats per token")
  main.legend(frameon=False, fontsize=9, handlelength=3.2)
  _plain(main)
  if gap is not None:
    steps, per_cent = gap
    first, second = list(runs)[:2]
    below = axes[1]
    below.axhline(0, color=_FAINT, linewidth=0.8)
    below.plot(steps, per_cent, color=_INK, marker=".", linewidth=1.2)
    limit = 1.15 * max(
      1.0, float(np.abs(per_cent[-(len(steps) // 2 + 1) :]).max())
    )
    below.set_ylim(-limit, limit)
    below.set_ylabel("difference (%)")
    below.set_title(
      f"Validation loss of {first} against {second}: "
      f"{per_cent[-1]:+.2f} % at the end",
      loc="left",
      color=_INK,
      fontsize=10,
    )
    _plain(below)
  axes[-1].set_xlabel("training step")
  axes[-1].xaxis.set_major_locator(
    MaxNLocator(integer=True, steps=[1, 2, 5, 10])
  )
  axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
  save(figure, path)


def plot_head_load(
  load: Float[np.ndarray, "layers classes heads"],
  class_names: Sequence[str],
  path: str | os.PathLike[str],
  *,
  num_shared: int | Sequence[int],
  title: str = "Which heads answer which tokens",
) -> None:
  """Draws how often each head is active, per layer and class of token.

  One block per layer: a row per class, a column per head. A line divides the
  heads that are always on from the routed ones.

  Args:
    load: Fraction of the tokens of a class for which a head was active, in
      [0, 1]; NaN where a class had no token.
    class_names: Name of each class.
    path: PNG to write; replaced in one step, folders made as needed.
    num_shared: Heads 0..num_shared-1 are always on: one number, or one per
      layer (all heads in a layer without routing).
    title: Title of the figure.

  Raises:
    ValueError: Shapes disagree, or a load is outside [0, 1].
  """
  load = np.asarray(load, np.float64)
  if load.ndim != 3 or not load.size:
    raise ValueError(
      f"`load` must be [layers, classes, heads], got shape {load.shape}."
    )
  num_layers, num_classes, num_heads = load.shape
  if len(class_names) != num_classes:
    raise ValueError(
      f"`class_names` must name {num_classes} classes, got {len(class_names)}."
    )
  shared = (
    [num_shared] * num_layers
    if isinstance(num_shared, int)
    else [int(count) for count in num_shared]
  )
  if len(shared) != num_layers or not all(
    0 <= count <= num_heads for count in shared
  ):
    raise ValueError(
      f"`num_shared` must be one number in [0, {num_heads}] for each of "
      f"{num_layers} layers, got {num_shared}."
    )
  present = load[~np.isnan(load)]
  if present.size and not (present.min() >= 0 and present.max() <= 1 + 1e-6):
    raise ValueError(
      "`load` must be fractions in [0, 1], got "
      f"{present.min():g} to {present.max():g}."
    )

  columns = math.ceil(num_layers / 6)
  rows = math.ceil(num_layers / columns)
  cell = 0.46 if num_heads <= 12 else 0.32
  # Inches: labels and colour bar, then blocks of cells with their titles.
  width = max(2.4 + columns * (num_heads * cell + 0.5), 6.4)
  height = 1.25 + rows * (num_classes * 0.23 + 0.62)
  figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
  grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
  colours = matplotlib.colormaps["YlGnBu"].with_extremes(bad=_ABSENT)
  norm = Normalize(0, 1)
  for index, axes in enumerate(grid.T.flat):
    if index >= num_layers:
      axes.set_axis_off()
      continue
    axes.pcolormesh(
      np.ma.masked_invalid(load[index]),
      cmap=colours,
      norm=norm,
      edgecolors="white",  # Keeps neighbours apart.
      linewidth=0.8,
    )
    axes.set_ylim(num_classes, 0)
    _write_cells(axes, load[index], small=num_heads > 12)
    _mark_kinds(axes, shared[index], num_heads)
    axes.set_title(
      f"Layer {index}", loc="left", fontsize=9.5, color=_INK, pad=15
    )
    axes.set_xticks(np.arange(num_heads) + 0.5, range(num_heads))
    axes.set_yticks(np.arange(num_classes) + 0.5, class_names)
    axes.tick_params(length=0, labelsize=8, labelcolor=_INK)
    axes.spines[:].set_visible(False)
    is_last = index == num_layers - 1 or (index + 1) % rows == 0
    axes.tick_params(labelbottom=is_last)
    if is_last:
      axes.set_xlabel("head", fontsize=9)
  figure.suptitle(title, x=0.01, ha="left", fontsize=12.5, color=_INK)
  bar = figure.colorbar(
    ScalarMappable(norm, colours),
    ax=grid,
    label="tokens of the class that use the head (%)",
    shrink=min(1.0, 3.2 / height + 0.25),
    pad=0.02,
    aspect=24,
    format=FuncFormatter(lambda x, _: f"{100 * x:.0f}"),
  )
  bar.outline.set_visible(False)
  bar.ax.tick_params(labelsize=8)
  if np.isnan(load).any():
    figure.supxlabel(
      "grey: no such token in the sample",
      fontsize=8,
      color=_FAINT,
      x=0.99,
      ha="right",
    )
  save(figure, path)


def byte_classes(
  tokens: Integer[np.ndarray, "*shape"],
) -> tuple[Int[np.ndarray, "*shape"], tuple[str, ...]]:
  """The class of each byte token, and the names of the classes.

  Classes are those of source text: letters (with "_"), digits, spaces (and
  tabs), newlines, operators (all other ASCII punctuation), quotes and "#",
  and other (control bytes, bytes of non-ASCII characters, document ends).

  Args:
    tokens: Ids of `ByteTokenizer`.

  Returns:
    Class of each token, int32 in the shape of `tokens`; names by class.

  Raises:
    ValueError: An id is not one of `ByteTokenizer`; for other vocabularies
      see `token_classes`.
  """
  return token_classes(tokens, ByteTokenizer())


def token_classes(
  tokens: Integer[np.ndarray, "*shape"], tokenizer: Tokenizer
) -> tuple[Int[np.ndarray, "*shape"], tuple[str, ...]]:
  """As `byte_classes`, of any tokenizer's ids.

  A token of several characters has the class of its first character that is
  no space or tab, or "spaces" where there is none.

  Args:
    tokens: Ids of `tokenizer`.
    tokenizer: What made them.

  Returns:
    Class of each token, int32 in the shape of `tokens`; names by class.

  Raises:
    ValueError: An id is not in the vocabulary.
  """
  tokens = np.asarray(tokens)
  unique, inverse = np.unique(tokens, return_inverse=True)
  if unique.size and not 0 <= unique[0] <= unique[-1] < tokenizer.vocab_size:
    raise ValueError(
      f"`tokens` must be in [0, {tokenizer.vocab_size}), got {unique[0]} to "
      f"{unique[-1]}; they are of another tokenizer."
    )
  classes = np.array(
    [_text_class(tokenizer.decode([token])) for token in unique], np.int32
  )
  return classes[inverse.reshape(tokens.shape)], _CLASS_NAMES


def _text_class(text: str) -> int:
  """Index in `_CLASS_NAMES` of a token's text."""
  character = (text.lstrip(" \t") or text)[:1]
  if not character.isascii() or not character:
    return _OTHER
  if character.isalpha() or character == "_":
    return 0
  if character.isdigit():
    return 1
  if character in " \t":
    return 2
  if character in "\r\n":
    return 3
  if character in "'\"`#":
    return 5
  return 4 if character.isprintable() else _OTHER


def _series(
  rows: Sequence[Mapping[str, Any]], key: str
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
  """Steps and finite values of `key`."""
  pairs = [
    (row["step"], row[key])
    for row in rows
    if row.get(key) is not None and math.isfinite(row[key])
  ]
  steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
  return steps, values


def _running_mean(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
  """Mean over a window of a thirtieth of the run, centred."""
  reach = max(1, len(values) // 60)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  # At the steep start both sides shrink, so that the mean is not biased; at
  # the flat end only the right one does, so that it does not turn to noise.
  left = np.minimum(reach, index)
  right = np.minimum(left, len(values) - 1 - index)
  return (sums[index + right + 1] - sums[index - left]) / (left + right + 1)


def _gap(
  series: Sequence[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]],
) -> tuple[Float[np.ndarray, " m"], Float[np.ndarray, " m"]] | None:
  """Steps that two runs share, and by how many per cent the first is above."""
  if len(series) != 2:
    return None
  (steps, first), (other_steps, second) = series
  shared, left, right = np.intersect1d(steps, other_steps, return_indices=True)
  if len(shared) < 2:
    return None
  return shared, 100 * (first[left] / second[right] - 1)


def _loss_limits(
  points: Sequence[tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]],
) -> tuple[float, float]:
  """Limits that show the run and cut off the fall of its first twentieth."""
  last_step = max(steps.max() for steps, _ in points if len(steps))
  late = np.concatenate(
    [values[steps >= 0.05 * last_step] for steps, values in points]
  )
  low, high = float(late.min()), float(late.max())
  margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
  return low - margin, high + margin


def _plain(axes: Axes) -> None:
  """A light grid and no box."""
  axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.spines[["left", "bottom"]].set_color(_FAINT)
  axes.tick_params(colors=_INK, labelsize=9, color=_FAINT)


def _write_cells(
  axes: Axes, load: Float[np.ndarray, "classes heads"], *, small: bool
) -> None:
  """The per cent in every cell, dark on light and light on dark."""
  for (row, column), value in np.ndenumerate(load):
    absent = math.isnan(value)
    text = axes.text(
      column + 0.5,
      row + 0.5,
      "–" if absent else f"{100 * value:.0f}",
      ha="center",
      va="center_baseline",
      fontsize=6 if small else 7.5,
      color=_FAINT if absent else "white" if value > 0.6 else _INK,
    )
    text.set_in_layout(False)  # Inside anyway, and there are thousands.


def _mark_kinds(axes: Axes, num_shared: int, num_heads: int) -> None:
  """A line between shared and routed heads, and their names above."""
  for first, last, kind in (
    (0, num_shared, "shared" if num_shared < num_heads else "all heads on"),
    (num_shared, num_heads, "routed"),
  ):
    if last > first:
      axes.annotate(
        kind,
        ((first + last) / 2, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=8,
        color=_FAINT,
      )
  if 0 < num_shared < num_heads:
    axes.axvline(num_shared, color="#D55E00", linewidth=2.4, zorder=4)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Writes a figure as PNG beside its place, then moves it there.

  Raises:
    UserError: The file cannot be written.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(temporary)
    os.replace(temporary, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)
    reason = error.strerror or type(error).__name__
    raise UserError(
      f"figure {str(path)!r} cannot be written: {reason}; free some space or "
      "choose another directory."
    ) from None
