"""All devices as one data-parallel mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxheads.errors import UserError


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
  """One mesh over `devices` (default: every device) with the axis "data"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh(
    (len(devices),), ("data",), devices=devices, axis_types=(AxisType.Auto,)
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def put_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """This process's rows [local B, ...] as rows of global arrays over "data"."""
  sharding = NamedSharding(mesh, PartitionSpec("data"))
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for name, rows in batch.items()
  }


def on_one_device(tree: Any) -> Any:
  """Replicated arrays as arrays of this process's first device."""
  device = jax.local_devices()[0]
  return jax.tree.map(
    lambda x: jax.device_put(x.addressable_data(0), device), tree
  )


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulate: int) -> None:
  """`UserError` unless every device gets the same number of rows."""
  divisor = mesh.size * accumulate
  if batch_size % divisor == 0:
    return
  below = batch_size // divisor * divisor
  above = below + divisor
  best = below if below and batch_size - below <= above - batch_size else above
  parts = f" times {accumulate} parts each" if accumulate > 1 else ""
  raise UserError(
    f"`--batch-size` must be a multiple of {divisor} ({mesh.size} "
    f"devices{parts}), got {batch_size}; the nearest is {best}"
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
