"""Where an engine's arrays are, on the devices that share its heads."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxheads.kvcache.pages import Pages
from jaxheads.serve import shards
from jaxheads.serve.layers import Kept
from jaxheads.serve.state import Rows


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Pages, rows and keep sets by head; all else is everywhere.

  Args:
    tree: Of the engine's state, or a program's results; or their shapes.
    mesh: Of the engine.
  """

  def of_part(part: Any) -> Any:
    return jax.tree.map(
      lambda leaf: NamedSharding(mesh, _spec(part, len(leaf.shape))), part
    )

  return jax.tree.map(
    of_part, tree, is_leaf=lambda part: isinstance(part, (Pages, Rows, Kept))
  )


def bytes_on_one(tree: Any) -> int:
  """Memory that arrays take on each device."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def _spec(part: Any, axes: int) -> PartitionSpec:
  if isinstance(part, Pages):
    return shards.PAGES
  if isinstance(part, Kept):
    return shards.ROWS_OF_SLOTS
  if isinstance(part, Rows) and axes > 2:
    return shards.EVERY_ROW
  return shards.EVERYWHERE
