"""Pictures of patterns."""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  from jaxheads.s2._pattern import Pattern

# Apart in grey, and for colour-blind readers.
_SEEN = ["#f1f0ea", "#24618e"]
_MAX_HEADS = 11
_COLUMNS = 4


def plot(pattern: "Pattern", length: int) -> "Figure":
  """See `Pattern.plot`."""
  # Who only wants a layer does not wait for matplotlib.
  from matplotlib.colors import ListedColormap
  from matplotlib.figure import Figure

  masks = pattern.block_masks(length)
  distinct = pattern.distinct_rules
  shown = distinct[:_MAX_HEADS]
  panels = len(shown) + 1
  columns = min(_COLUMNS, panels)
  rows = -(-panels // columns)
  figure = Figure(
    figsize=(2.5 * columns, 2.7 * rows + 0.5), layout="constrained"
  )
  axes = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
  for axis, rule in zip(axes, shown, strict=False):
    heads = [n for n, other in enumerate(pattern.rules) if other == rule]
    axis.imshow(
      masks[heads[0]],
      cmap=ListedColormap(_SEEN),
      vmin=0,
      vmax=1,
      interpolation="nearest",
    )
    _label(axis, _heads(heads))
  union = masks.sum(axis=0)
  image = axes[len(shown)].imshow(
    np.ma.masked_equal(union, 0),
    cmap="viridis_r",
    vmin=1,
    vmax=max(2, pattern.num_heads),
    interpolation="nearest",
  )
  _label(axes[len(shown)], "all heads")
  figure.colorbar(
    image,
    ax=axes[len(shown)],
    shrink=0.6,
    ticks=[1, max(2, pattern.num_heads)],
  ).set_label("heads that see it", fontsize=8)
  for axis in axes[panels:]:
    axis.set_visible(False)
  for axis in axes[:panels:columns]:
    axis.set_ylabel("query block", fontsize=8)
  for axis in axes[max(0, panels - columns) : panels]:
    axis.set_xlabel("key block", fontsize=8)
  hidden = len(distinct) - len(shown)
  note = f"; {hidden} more not drawn" if hidden else ""
  figure.suptitle(
    f"{length:,} tokens in blocks of {pattern.block_size}: "
    f"{pattern.density(length):.1%} of dense attention{note}",
    fontsize=10,
  )
  return figure


def _label(axis: Any, title: str) -> None:
  axis.set_title(title, fontsize=9)
  axis.tick_params(labelsize=7)


def _heads(heads: list[int]) -> str:
  if len(heads) == 1:
    return f"head {heads[0]}"
  if heads == list(range(heads[0], heads[-1] + 1)):
    return f"heads {heads[0]} to {heads[-1]}"
  listed = ", ".join(map(str, heads[:4]))
  return f"heads {listed}{', ...' if len(heads) > 4 else ''}"
