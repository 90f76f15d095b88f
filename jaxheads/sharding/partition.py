"""What the partitioner of `jax.jit` cannot split is split by hand here."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxheads.sharding.rules import as_names, axes_of, free_axes
from pallas_kernels.head_attention import HeadContexts
from pallas_kernels.value_checks import checks_under_jit

_Arrays = TypeVar("_Arrays")


def per_device(
  run: Callable[[_Arrays], Any],
  arrays: _Arrays,
  specs: Any,
  out_spec: Any,
  *,
  batch_size: int,
  num_kv_heads: int = 1,
) -> Any:
  """Runs on each device's own sequences and heads, if there is a mesh.

  The partitioner would gather the operands of loops on every device, and
  cannot split a Pallas kernel.

  Args:
    run: Of what each device holds. Where heads are split it sees some of them,
      and a sum over heads is `sum_over_heads`.
    arrays: Pytree of arrays.
    specs: The same tree of `rules.spec`.
    out_spec: Of the only result.
    batch_size: Sequences on all devices together. Axes with this many
      sequences, or one, are batch axes. If the devices do not divide it, or
      values are checked, all of them do all the work.
    num_kv_heads: Key-value heads; the same.
  """
  sizes = free_axes()
  split: set[str] = set()
  for logical, number in (("batch", batch_size), ("heads", num_kv_heads)):
    axes = [axis for axis in axes_of(logical) if axis in sizes]
    devices = math.prod(sizes[axis] for axis in axes)
    if devices > 1 and number % devices == 0:
      split |= set(axes)
  # JAX's checkify does not run through a shard_map that a mesh context has.
  if not split or checks_under_jit():
    return run(arrays)

  def own(entry: Any) -> tuple[str, ...]:
    return tuple(name for name in as_names(entry) if name in split)

  def fit(leaf: Any, where: PartitionSpec) -> PartitionSpec | None:
    if leaf is None:
      return None
    return PartitionSpec(
      *(
        own(entry) if length > 1 else None
        for length, entry in zip(leaf.shape, where, strict=False)
      )
    )

  sharded = jax.shard_map(
    run,
    in_specs=(
      jax.tree.map(fit, arrays, specs, is_leaf=lambda leaf: leaf is None),
    ),
    out_specs=PartitionSpec(*map(own, out_spec)),
    axis_names=set(sizes),
    check_vma=False,
  )
  return sharded(arrays)


def local_patterns(
  pattern: HeadContexts, num_heads: int
) -> tuple[HeadContexts, ...]:
  """The pattern of each device that holds `num_heads` heads of it, in order."""
  return tuple(
    HeadContexts(
      pattern.block_size,
      pattern.rules[start : start + num_heads],
      pattern.is_causal,
    )
    for start in range(0, pattern.num_heads, num_heads)
  )


def heads_index() -> Int[Array, ""]:
  """Inside of `per_device`: which of the devices along `heads` this one is."""
  return jax.lax.axis_index("heads")


def sum_over_heads(x: Array) -> Array:
  """Inside of `per_device`, where heads are split: adds what devices hold."""
  return jax.lax.psum(x, "heads")
