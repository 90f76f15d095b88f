"""Work split over the devices of a mesh."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pallas_kernels.value_checks import checks_under_jit

_Batched = TypeVar("_Batched")
_Shared = TypeVar("_Shared")


def per_device(
  run: Callable[[_Batched, _Shared], Any],
  batched: _Batched,
  shared: _Shared,
  *,
  batch_size: int,
) -> Any:
  """Runs on each device's own sequences, if there is a mesh axis "data".

  The partitioner of `jax.jit` would gather the operands of loops on every
  device, and cannot split a Pallas kernel.

  Args:
    run: Of what each device holds; its results have a leading batch axis.
    batched: Pytree of arrays with a leading axis of `batch_size` or 1.
    shared: Pytree of arrays that every device needs whole.
    batch_size: Sequences on all devices together; if the devices do not
      divide it, or values are checked, all of them do all the work.
  """
  mesh = jax.sharding.get_abstract_mesh()
  shards = dict(mesh.shape).get("data", 1)
  # JAX's checkify does not run through a shard_map that a mesh context has.
  if shards == 1 or batch_size % shards or checks_under_jit():
    return run(batched, shared)

  def spec(leaf: Array) -> PartitionSpec:
    return PartitionSpec("data" if leaf.shape[0] == batch_size else None)

  sharded = jax.shard_map(
    run,
    in_specs=(jax.tree.map(spec, batched), PartitionSpec()),
    out_specs=PartitionSpec("data"),
    axis_names={"data"},
    check_vma=False,
  )
  return sharded(batched, shared)
