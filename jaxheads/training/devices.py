"""Batches and results on the mesh, and what devices there are."""

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
  """
  sharding = NamedSharding(mesh, spec("batch"))
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for name, rows in batch.items()
  }


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
