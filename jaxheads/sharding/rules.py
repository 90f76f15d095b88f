"""The one table from what an axis of an array means to the mesh axes it is on.

Parameters, optimizer state, batches, activations and caches are all placed by
it. The model is written for whole arrays; JAX splits the work.
"""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxheads.errors import UserError
from jaxheads.sharding.mesh import AXES, nearest_divisor

# What is not listed is on no axis: every device holds all of it.
RULES: dict[str, str | tuple[str, ...]] = {
  "batch": ("data", "fsdp"),  # Sequences.
  "replica": "data",  # Sequences, where their features are split over fsdp.
  "length": "context",  # Tokens of a sequence.
  "embed": "fsdp",  # The residual stream, of parameters; gathered for use.
  "heads": "heads",
  "kv_heads": "heads",
  "mlp": "heads",
  "vocab": "heads",
  "pages": "heads",  # Of a pool of keys and values.
}

# Axes of each parameter, by the end of its path. Layers that are stored
# together have one more, in front.
_PARAMETERS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embedding/embedding", ("vocab", "embed")),
  (r"unembedding", ("embed", "vocab")),
  (r"query/kernel", ("embed", "heads", None)),
  (r"query/bias", ("heads", None)),
  (r"(key|value)/kernel", ("embed", "kv_heads", None)),
  (r"(key|value)/bias", ("kv_heads", None)),
  (r"out/kernel", ("heads", None, "embed")),
  (r"(gate|up)/kernel", ("embed", "mlp")),
  (r"down/kernel", ("mlp", "embed")),
)


def axes_of(logical: str) -> tuple[str, ...]:
  """Mesh axes that an axis of this meaning is on."""
  return as_names(RULES.get(logical))


def as_names(entry: Any) -> tuple[str, ...]:
  """An entry of a `PartitionSpec` as a tuple."""
  return (entry,) if isinstance(entry, str) else entry or ()


def spec(*logical: str | None) -> Any:
  """The `PartitionSpec` of an array, from what its axes mean.

  Of any type, so that it can stand where a tree has arrays.
  """
  return PartitionSpec(
    *(None if name is None else RULES.get(name) for name in logical)
  )


def constrain(x: Array, *logical: str | None) -> Array:
  """Splits `x` by the table over the mesh that is set, where that divides.

  Without a mesh, and on axes that the caller handles by `jax.shard_map`, `x`
  stays as it is.
  """
  sizes = free_axes()
  if not any(n > 1 for n in sizes.values()):
    return x
  return jax.lax.with_sharding_constraint(
    x, fitting(x.shape, spec(*logical), sizes)
  )


def free_axes() -> dict[str, int]:
  """Axes of the mesh that is set, and their devices.

  Without those that a `jax.shard_map` around handles already.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if name in AXES and kind != jax.sharding.AxisType.Manual
  }


def parameter_axes(path: str) -> tuple[str | None, ...] | None:
  """What the last axes of a parameter mean; `None` for other arrays.

  Args:
    path: Names joined by "/", of the parameter or of what an optimizer keeps
      of it.
  """
  for pattern, logical in _PARAMETERS:
    if re.search(rf"(^|/){pattern}(/value)?$", path):
      return logical
  return None


def param_specs(tree: Any) -> Any:
  """A `PartitionSpec` for each array of a (nested) dict of parameters.

  Also of optimizer state: its sums have the names of what they belong to.
  Other arrays (counters, statistics, random keys) are on every device.
  """

  def of_leaf(path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    logical = parameter_axes(name)
    if logical is None:
      return PartitionSpec()
    layers = (None,) * (len(leaf.shape) - len(logical))
    return spec(*layers, *logical)

  return jax.tree_util.tree_map_with_path(of_leaf, tree)


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Where each array of a tree of parameters or optimizer state is held.

  An axis that the mesh does not divide stays whole.

  Args:
    tree: Arrays, or their shapes.
    mesh: Of `make_mesh`.
  """
  sizes = dict(mesh.shape)
  return jax.tree.map(
    lambda leaf, where: NamedSharding(mesh, fitting(leaf.shape, where, sizes)),
    tree,
    param_specs(tree),
  )


def check_heads(num_heads: int, num_kv_heads: int, heads: int) -> None:
  """`UserError` unless `heads` devices get whole query groups, all as many."""
  if num_kv_heads % heads:
    raise UserError(
      f"`--mesh`: heads={heads} does not divide the model's {num_kv_heads} "
      f"key-value heads ({num_heads} query heads); the nearest that does is "
      f"heads={nearest_divisor(heads, num_kv_heads)}"
    )


def fitting(
  shape: tuple[int, ...], where: PartitionSpec, sizes: dict[str, int]
) -> PartitionSpec:
  """`where` without the axes that `sizes` lacks or that do not divide."""
  entries: list[tuple[str, ...] | None] = []
  for length, entry in zip(shape, where, strict=False):
    kept: list[str] = []
    parts = 1
    for name in as_names(entry):
      if name in sizes and length % (parts * sizes[name]) == 0:
        kept.append(name)
        parts *= sizes[name]
    entries.append(tuple(kept) or None)
  return PartitionSpec(*entries)
