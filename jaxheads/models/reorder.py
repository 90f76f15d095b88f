"""A decoder whose heads move to other places where they are stored."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads import head_order
from jaxheads.head_order import HeadOrder
from jaxheads.models.config import ModelConfig
from jaxheads.models.decoder import DecoderLM
from jaxheads.sharding.rules import parameter_axes

_IN_STACK = re.compile(r"((?:.*/)?stacks/)(\d+)/(.+)")


class _Stack(NamedTuple):
  """Layers first .. last - 1, stored along a leading axis."""

  first: int
  last: int
  head_order: HeadOrder | None


def reorder(
  arrays: Mapping[str, Any], before: ModelConfig, after: ModelConfig
) -> dict[str, Any]:
  """Arrays of a `DecoderLM(before)` as a `DecoderLM(after)` has them.

  Args:
    arrays: By path, joined by "/": parameters, or what is kept of each, such
      as an optimizer's means. Others come back as they are.
    before, after: Configs that differ in `head_orders` only; layers that stop
      or begin to be alike move to other stacks.
  """
  moved: dict[tuple[str, str], dict[int, Any]] = {}
  result = {}
  for path, array in arrays.items():
    match = _IN_STACK.fullmatch(path)
    if match is None:
      result[path] = array
    else:
      prefix, stack, name = match.groups()
      moved.setdefault((prefix, name), {})[int(stack)] = array
  old = _stacks(before)
  for (prefix, name), of_stack in moved.items():
    for index, new in enumerate(_stacks(after)):
      pieces: dict[int, Any] = {}
      for source, array in of_stack.items():
        stack = old[source]
        first, last = max(stack.first, new.first), min(stack.last, new.last)
        if first >= last:
          continue
        if last - first < stack.last - stack.first:
          array = array[first - stack.first : last - stack.first]
        pieces[first] = _move(array, name, stack, new, after)
      if pieces:
        parts = [pieces[first] for first in sorted(pieces)]
        result[f"{prefix}{index}/{name}"] = (
          parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        )
  return result


def source_path(path: str, before: ModelConfig, after: ModelConfig) -> str:
  """Where `before` has what `after` has at `path`, in its first layer."""
  match = _IN_STACK.fullmatch(path)
  if match is None:
    return path
  prefix, stack, name = match.groups()
  layer = _stacks(after)[int(stack)].first
  (source,) = (
    index
    for index, old in enumerate(_stacks(before))
    if old.first <= layer < old.last
  )
  return f"{prefix}{source}/{name}"


def is_moved(path: str, before: ModelConfig, after: ModelConfig) -> bool:
  """Whether `reorder` changes the array at `path` of `after`, or its path."""
  match = _IN_STACK.fullmatch(path)
  if match is None or before.head_orders == after.head_orders:
    return False
  same_stacks = [s[:2] for s in _stacks(before)] == [
    s[:2] for s in _stacks(after)
  ]
  return not same_stacks or _head_axis(path) is not None


def reordered(model: DecoderLM, config: ModelConfig) -> DecoderLM:
  """The same function with its heads stored as `config.head_orders` says.

  Args:
    model: A decoder; a cache that it has is left out.
    config: Differs from the model's in `head_orders` only.
  """
  shapes = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
  graphdef, like = nnx.split(shapes)
  arrays = dict(_by_path(nnx.to_pure_dict(nnx.state(model))))
  arrays = reorder(arrays, model.config, config)
  paths, treedef = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(like))
  leaves = [arrays[_joined(path)] for path, _ in paths]
  return nnx.merge(graphdef, jax.tree_util.tree_unflatten(treedef, leaves))


def _stacks(config: ModelConfig) -> list[_Stack]:
  stacks: list[_Stack] = []
  for run in config.runs:
    first = stacks[-1].last if stacks else 0
    stacks.append(_Stack(first, first + run.num_layers, run.head_order))
  return stacks


def _head_axis(path: str) -> tuple[int, str] | None:
  """Which axis, from the last, is one of heads; and of which, if any is."""
  axes = parameter_axes(path) or ()
  for index, axis in enumerate(axes):
    if axis in ("heads", "kv_heads"):
      return index - len(axes), axis
  return None


def _move(
  array: Any, name: str, old: _Stack, new: _Stack, config: ModelConfig
) -> Any:
  """One stack's array, its heads from the old to the new places."""
  found = _head_axis(name)
  if found is None or old.head_order == new.head_order:
    return array
  axis, kind = found
  own = tuple(range(config.num_heads))
  orders = [old.head_order or own, new.head_order or own]
  if kind == "kv_heads":
    orders = [
      head_order.of_kv_heads(order, config.num_kv_heads) for order in orders
    ]
  place_of_head = head_order.inverse(orders[0])
  places = tuple(place_of_head[head] for head in orders[1])
  return head_order.take(array, places, axis)


def _by_path(tree: Any) -> Iterator[tuple[str, Any]]:
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    yield _joined(path), leaf


def _joined(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
