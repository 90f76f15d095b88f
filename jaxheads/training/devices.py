"""Batches and results on the mesh, and what devices there are."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxheads.errors import UserError
from jaxheads.models import ModelConfig
from jaxheads.sharding import (
  MeshShape,
  check_heads,
  make_mesh,
  parse_mesh,
  spec,
)


def model_mesh(shape: MeshShape | None, model_config: ModelConfig) -> Mesh:
  """The mesh of all devices for a model; `None` is `parse_mesh(None)`.

  Raises:
    UserError: The model's heads do not split over it.
  """
  shape = shape or parse_mesh(None, jax.device_count())
  check_heads(model_config.num_heads, model_config.num_kv_heads, shape.heads)
  return make_mesh(shape)


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """This process's rows [local B, ...] as rows of global arrays.

  Devices that share sequences have all of their tokens: these are few bytes.

  Args:
    mesh: Of `jaxheads.sharding.make_mesh`.
    batch: The rows that `rows_of_process` names, in its order.
  """
  sharding = NamedSharding(mesh, spec("batch"))
  parts = batch_parts(mesh)
  parts_here = len(rows_of_process(mesh, parts))

  def put(rows: np.ndarray) -> jax.Array:
    batch_size = len(rows) // parts_here * parts
    places = {
      row: place for place, row in enumerate(rows_of_process(mesh, batch_size))
    }

    def of_device(index: Any) -> np.ndarray:
      start, stop, _ = index[0].indices(batch_size)
      return rows[places[start] : places[start] + stop - start]

    return jax.make_array_from_callback(
      (batch_size, *rows.shape[1:]), sharding, of_device
    )

  return {name: put(np.asarray(rows)) for name, rows in batch.items()}


def rows_of_process(
  mesh: Mesh, batch_size: int, *, shared: bool = True
) -> tuple[int, ...]:
  """Which rows of a global batch this process must read, in ascending order.

  Processes whose devices hold other heads or tokens of the same sequences read
  the same rows.

  Args:
    mesh: Of `jaxheads.sharding.make_mesh`.
    batch_size: Rows of the global batch, a multiple of `batch_parts`.
    shared: False leaves out rows that a process of a lower number reads too,
      so that each row is one process's.
  """
  rows = _rows_by_process(mesh, batch_size)
  me = jax.process_index()
  if shared:
    return rows[me]
  taken = {row for process in range(me) for row in rows.get(process, ())}
  return tuple(row for row in rows[me] if row not in taken)


@functools.lru_cache
def _rows_by_process(mesh: Mesh, batch_size: int) -> dict[int, tuple[int, ...]]:
  held: dict[int, set[int]] = {}
  placed = NamedSharding(mesh, spec("batch"))
  where: Any = placed.devices_indices_map((batch_size,))
  for device, index in where.items():
    rows = range(*index[0].indices(batch_size))
    held.setdefault(device.process_index, set()).update(rows)
  return {process: tuple(sorted(rows)) for process, rows in held.items()}


def on_one_device(mesh: Mesh, tree: Any) -> Any:
  """Arrays that are split over `mesh`, whole on this process's first device.

  All processes must call it.
  """
  whole = NamedSharding(mesh, PartitionSpec())
  device = jax.local_devices()[0]
  gathered = jax.jit(lambda x: x, out_shardings=whole)(tree)
  return jax.tree.map(
    lambda x: jax.device_put(x.addressable_data(0), device), gathered
  )


def batch_parts(mesh: Mesh) -> int:
  """Into how many parts the sequences of a batch are split."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulate: int) -> None:
  """`UserError` unless every device gets the same number of rows."""
  shards = batch_parts(mesh)
  divisor = shards * accumulate
  if batch_size % divisor == 0:
    return
  below = batch_size // divisor * divisor
  above = below + divisor
  best = below if below and batch_size - below <= above - batch_size else above
  parts = f" times {accumulate} parts each" if accumulate > 1 else ""
  raise UserError(
    f"`--batch-size` must be a multiple of {divisor} (the mesh splits batches "
    f"over data x fsdp = {shards} devices{parts}), got {batch_size}; the "
    f"nearest is {best}"
  )


def describe() -> str:
  """Such as "8 x TPU v5e" or "1 x cpu"."""
  kinds: dict[str, int] = {}
  for device in jax.devices():
    kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
  listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
  if jax.process_count() > 1:
    listed += f" in {jax.process_count()} processes"
  return listed
