"""Heads stored in another order than their own.

An order is a tuple: the head that lies at each stored place. `None` stands for
the heads' own order. The query heads of a KV head, consecutive in both, are
never parted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

HeadOrder = tuple[int, ...]


def checked(
  order: Sequence[int] | None, num_heads: int, num_kv_heads: int, *, name: str
) -> HeadOrder | None:
  """The order as a tuple; `None` if it is the heads' own.

  Raises:
    ValueError: It is no order of the heads, or parts a group; the message
      names the argument.
  """
  if order is None:
    return None
  order = tuple(int(head) for head in order)
  if sorted(order) != list(range(num_heads)):
    raise ValueError(
      f"`{name}` must hold each of the {num_heads} heads once, got {order}."
    )
  group_size = num_heads // num_kv_heads
  if order != of_groups(of_kv_heads(order, num_kv_heads), group_size):
    raise ValueError(
      f"`{name}` must keep the {group_size} query heads of each KV head "
      f"together and in their order, got {order}."
    )
  return None if order == tuple(range(num_heads)) else order


def of_groups(groups: Sequence[int], group_size: int) -> HeadOrder:
  """The order of heads when whole groups are stored in this order."""
  return tuple(
    group * group_size + index
    for group in groups
    for index in range(group_size)
  )


def of_kv_heads(order: HeadOrder, num_kv_heads: int) -> HeadOrder:
  """The order of KV heads that goes with an order of query heads."""
  group_size = len(order) // num_kv_heads
  return tuple(head // group_size for head in order[::group_size])


def inverse(order: HeadOrder) -> HeadOrder:
  """The stored place of each head."""
  return tuple(int(place) for place in np.argsort(order))


def take(x: Any, order: HeadOrder | None, axis: int) -> Any:
  """An array whose entry i along the axis is `x`'s entry `order[i]`."""
  if order is None:
    return x
  index = (slice(None),) * (axis % x.ndim) + (np.asarray(order),)
  return x.at[index].get(mode="promise_in_bounds", unique_indices=True)
