"""Which head goes to which device, so that all have equal work.

Heads are not equal: a routed head answers some tokens and a shared one all of
them, a sharded head sees some keys and a dense one all, a compressed head
keeps some tokens in the cache and a full one all. Split in their own order,
like heads end up together, and every layer waits for one device.
"""

import dataclasses
import functools
import operator
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from jaxheads import head_order
from jaxheads.s2 import Pattern
from pallas_kernels.head_attention import Rule

if TYPE_CHECKING:
  from jaxheads.models import ModelConfig

# Partial dealings that the exact search looks at before it takes the best one
# so far: a dozen groups never need them all.
_MOST_PARTIAL_DEALINGS = 50_000
# Loads that differ by less, relative to the mean, are equal.
_EQUAL = 1e-9


def deal(
  work: Float[np.ndarray, "*layers groups"],
  shards: int,
  *,
  rules: Sequence[Hashable] | None = None,
) -> tuple[int, ...]:
  """The order of groups whose consecutive shards have the least largest work.

  Every shard gets as many groups. Of layers dealt alike, the sum over layers
  of the largest shard counts: each layer waits for its own. The result is the
  best there is for a dozen groups or where most groups are alike, a good one
  for many different groups, and never worse than the groups' own order.

  Args:
    work: Of each group, by layer if there are several; not negative.
    shards: Parts; divides the groups.
    rules: What each group sees. Of dealings equally good the one in which most
      shards have the same rules in the same order is taken: devices that run
      the same program need no choice between several.
  Returns:
    The group at each place; the groups' own order if none is better.
  Raises:
    ValueError: `shards` does not divide the groups, or work is negative or not
      finite.

  Source:
    Longest processing time first (Graham, Bounds on multiprocessing timing
    anomalies, 1969), then swaps, then branch and bound.
  """
  work = np.atleast_2d(np.asarray(work, np.float64))
  groups = work.shape[1]
  _check_shards(shards, groups, "groups")
  if not (np.isfinite(work) & (work >= 0)).all():
    raise ValueError(f"`work` must be finite and not negative, got {work}.")
  distinct = list(dict.fromkeys([None] * groups if rules is None else rules))
  kinds = [0] * groups if rules is None else [distinct.index(r) for r in rules]
  if len(kinds) != groups:
    raise ValueError(
      f"`rules` must hold one for each of the {groups} groups, got "
      f"{len(kinds)}."
    )
  each = groups // shards
  own = [list(range(s * each, (s + 1) * each)) for s in range(shards)]
  # Groups that no one can tell apart.
  alike = [(tuple(work[:, g]), kinds[g]) for g in range(groups)]
  found = [own]
  if all(kinds.count(kind) % shards == 0 for kind in set(kinds)):
    found.append(_in_order(_search(work, shards, kinds), alike, kinds))
  if len(distinct) > 1:
    found.append(_in_order(_search(work, shards, [0] * groups), alike, kinds))

  def rank(dealing: list[list[int]]) -> tuple[float, int]:
    programs = {tuple(kinds[group] for group in shard) for shard in dealing}
    return _cost(work, dealing), len(programs)

  best, (cost, programs) = own, rank(own)
  tolerance = _EQUAL * work.sum() / shards
  for dealing in found[1:]:
    new_cost, new_programs = rank(dealing)
    if new_cost < cost - tolerance or (
      new_cost <= cost + tolerance and new_programs < programs
    ):
      best, cost, programs = dealing, new_cost, new_programs
  return tuple(group for shard in best for group in shard)


def place(
  config: "ModelConfig",
  shards: int,
  seq_len: int,
  *,
  head_load: Float[np.ndarray, "layers N"] | None = None,
  kept_tokens: Int[np.ndarray, "layers K"] | None = None,
) -> "ModelConfig":
  """The model with its heads stored so that `shards` devices have equal work.

  Layers that are alike and follow each other are dealt alike, so that they
  stay one loop.

  Args:
    config: The model; the `head_orders` it has are replaced.
    shards: Parts of the heads; divides the KV heads.
    seq_len: Tokens of a sequence.
    head_load: Fraction of tokens that each head answers, measured; by default
      a routed head answers `top_k / num_routed` of them. See
      `jaxheads.nn.RoutingStats`.
    kept_tokens: What each KV head keeps in a cache. Its work is then to read
      that. See `kept_by_head`.
  Raises:
    ValueError: Heads do not divide, or a measurement has another shape.
  """
  _check_shards(shards, config.num_kv_heads, "`num_kv_heads`")
  config = dataclasses.replace(config, head_orders=())
  if shards == 1:
    return config
  work = group_work(
    config, seq_len, head_load=head_load, kept_tokens=kept_tokens
  )
  group_size = config.num_heads // config.num_kv_heads
  orders: list[head_order.HeadOrder] = []
  for run in config.runs:
    first = len(orders)
    rules = None
    if run.context is not None:
      heads = run.context.rules
      rules = [
        heads[head : head + group_size]
        for head in range(0, config.num_heads, group_size)
      ]
    of_run = np.unique(work[first : first + run.num_layers], axis=0)
    groups = deal(of_run, shards, rules=rules)
    order = head_order.of_groups(groups, group_size)
    orders += [order] * run.num_layers
  return dataclasses.replace(config, head_orders=tuple(orders))


def place_on(mesh: Mesh, config: "ModelConfig", seq_len: int) -> "ModelConfig":
  """The model with its heads stored so that this mesh has equal work."""
  return place(config, head_shards(mesh, config), seq_len)


def head_shards(mesh: Mesh, config: "ModelConfig") -> int:
  """Parts that heads are split into.

  Devices along `context` exchange tokens for heads where that divides; if the
  parts of both axes are equal, so are those of `heads` alone.
  """
  heads = mesh.shape["heads"]
  both = heads * mesh.shape["context"]
  return heads if config.num_kv_heads % both else both


def group_work(
  config: "ModelConfig",
  seq_len: int,
  *,
  head_load: Float[np.ndarray, "layers N"] | None = None,
  kept_tokens: Int[np.ndarray, "layers K"] | None = None,
) -> Float[np.ndarray, "layers K"]:
  """Work of each KV head with its query heads, as kernels that skip do it.

  A query head's work is the share of tokens that it answers, times the pairs of
  a query and a key that it sees. Arguments are those of `place`.
  """
  layers, heads, kv_heads = (
    config.num_layers,
    config.num_heads,
    config.num_kv_heads,
  )
  if kept_tokens is not None:
    return _measured("kept_tokens", kept_tokens, (layers, kv_heads))
  if head_load is not None:
    head_load = _measured("head_load", head_load, (layers, heads))
  work = np.empty((layers, heads))
  for layer, (plan, context) in enumerate(
    zip(config.head_plans, config.contexts, strict=True)
  ):
    share = np.ones(heads)
    if plan is not None and plan.routes:
      share[plan.num_shared :] = (
        plan.top_k / plan.num_routed
        if head_load is None
        else head_load[layer, plan.num_shared :]
      )
    pairs = np.full(heads, seq_len * (seq_len + 1) / 2)
    if context is not None:
      pairs[:] = [
        _visible_pairs(context.block_size, rule, seq_len)
        for rule in context.rules
      ]
    work[layer] = share * pairs
  return work.reshape(layers, kv_heads, -1).sum(axis=-1)


def imbalance(
  work: Float[np.ndarray, "*layers groups"],
  order: Sequence[int] | None,
  shards: int,
) -> Float[np.ndarray, "*layers"]:
  """Largest work of a shard over the mean one; 1 is perfect.

  Args:
    work: Of each group.
    order: The group at each place; `None` is their own order.
    shards: Parts; divides the groups.
  """
  work = np.asarray(work, np.float64)
  _check_shards(shards, work.shape[-1], "groups")
  if order is not None:
    work = work[..., list(order)]
  loads = work.reshape(*work.shape[:-1], shards, -1).sum(axis=-1)
  mean = loads.mean(axis=-1)
  return np.where(mean > 0, loads.max(axis=-1) / np.where(mean > 0, mean, 1), 1)


def report(
  config: "ModelConfig",
  shards: int,
  seq_len: int,
  *,
  head_load: Float[np.ndarray, "layers N"] | None = None,
  kept_tokens: Int[np.ndarray, "layers K"] | None = None,
) -> str:
  """Largest over mean work of the devices, in the heads' own order and now.

  For each kind of layer, the worst layer of that kind.

  Args:
    config: A model that was placed.
    shards, seq_len, head_load, kept_tokens: As `place` was given them.
  Returns:
    Such as "heads over 2 devices, largest over mean active work: MoH layers
    1.33x -> 1.00x".
  """
  work = group_work(
    config, seq_len, head_load=head_load, kept_tokens=kept_tokens
  )
  worst: dict[str, list[float]] = {}
  orders = config.head_orders or (None,) * config.num_layers
  for layer, order in enumerate(orders):
    parts = []
    if config.head_plans[layer] is not None:
      parts.append("MoH")
    if config.contexts[layer] is not None:
      parts.append("S2")
    of_kind = worst.setdefault(" + ".join(parts) or "dense", [1.0, 1.0])
    groups = order and head_order.of_kv_heads(order, config.num_kv_heads)
    for index, given in enumerate((None, groups)):
      found = float(imbalance(work[layer], given, shards))
      of_kind[index] = max(of_kind[index], found)
  told = ", ".join(
    f"{kind} layers {before:.2f}x -> {after:.2f}x"
    for kind, (before, after) in worst.items()
  )
  return f"heads over {shards} devices, largest over mean active work: {told}"


def kept_by_head(
  lengths: Int[np.ndarray, "R K"], head_of_slot: Int[np.ndarray, "R K"]
) -> Int[np.ndarray, "R K"]:
  """Tokens that each KV head keeps, from what each row slot keeps.

  Args:
    lengths, head_of_slot: Of a `jaxheads.kvcache.Plan` that has `heads`, or of
      a prompt that was read.
  """
  kept = np.empty_like(np.asarray(lengths))
  np.put_along_axis(kept, np.asarray(head_of_slot), np.asarray(lengths), -1)
  return kept


def _check_shards(shards: int, count: int, what: str) -> None:
  if shards < 1 or count % shards:
    raise ValueError(
      f"`shards` must be a divisor of the {count} {what}, got {shards}."
    )


def _measured(
  name: str, values: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.shape != shape:
    raise ValueError(
      f"`{name}` must be {list(shape)}, got {list(values.shape)}."
    )
  return values


@functools.lru_cache(maxsize=4096)
def _visible_pairs(block_size: int, rule: Rule, seq_len: int) -> int:
  return Pattern(block_size, (rule,)).visible_pairs(seq_len)


def _cost(work: np.ndarray, dealing: list[list[int]]) -> float:
  """Sum over layers of the largest shard."""
  loads = np.stack([work[:, shard].sum(axis=1) for shard in dealing])
  return float(loads.max(axis=0).sum())


def _in_order(
  dealing: list[list[int]], alike: Sequence[Hashable], kinds: list[int]
) -> list[list[int]]:
  """The same dealing; groups that are alike go to the shards in their order."""
  left: dict[Hashable, list[int]] = {}
  for group in range(len(alike)):
    left.setdefault(alike[group], []).append(group)
  return [
    sorted(
      (left[alike[group]].pop(0) for group in shard),
      key=lambda group: (kinds[group], group),
    )
    for shard in sorted(dealing, key=min)
  ]


def _search(work: np.ndarray, shards: int, kinds: list[int]) -> list[list[int]]:
  """The best dealing found in which every shard has as many of each kind."""
  groups = work.shape[1]
  room = {kind: kinds.count(kind) // shards for kind in kinds}
  # The largest first; alike ones beside each other.
  items = sorted(
    range(groups),
    key=lambda g: (-work[:, g].sum(), *-work[:, g], kinds[g], g),
  )
  dealing: list[list[int]] = [[] for _ in range(shards)]
  for group in items:
    free = [
      shard
      for shard in dealing
      if sum(kinds[other] == kinds[group] for other in shard)
      < room[kinds[group]]
    ]
    min(free, key=lambda shard: work[:, shard].sum()).append(group)
  _swap(work, dealing, kinds)
  return _branch_and_bound(work, dealing, kinds, items, room)


def _swap(work: np.ndarray, dealing: list[list[int]], kinds: list[int]) -> None:
  """Exchanges groups of two shards as long as that makes the cost smaller.

  Of equal costs the more even loads are smaller, so that several largest
  shards are reduced one after the other.
  """
  kind = np.asarray(kinds)
  # In units of the mean load, so that rounding makes nearly equal costs equal.
  work = work * len(dealing) / (work.sum() or 1.0)
  while True:
    loads = np.stack([work[:, shard].sum(axis=1) for shard in dealing], axis=1)
    squares = (loads**2).sum()
    best = (_round(loads.max(axis=1).sum()), _round(squares))
    exchange = None
    for s, one in enumerate(dealing):
      for t in range(s + 1, len(dealing)):
        other = dealing[t]
        # [layers, groups of s, groups of t]
        delta = work[:, other][:, None] - work[:, one][:, :, None]
        changed = np.stack(
          [loads[:, s, None, None] + delta, loads[:, t, None, None] - delta]
        )
        rest = np.delete(loads, (s, t), axis=1).max(axis=1, initial=0.0)
        largest = np.maximum(changed.max(axis=0), rest[:, None, None])
        cost = _round(largest.sum(axis=0))
        even = squares - (loads[:, s] ** 2 + loads[:, t] ** 2).sum()
        even = _round(even + (changed**2).sum(axis=(0, 1)))
        allowed = kind[one][:, None] == kind[other]
        cost = np.where(allowed, cost, np.inf)
        flat = np.lexsort((even.ravel(), cost.ravel()))[0]
        a, b = np.unravel_index(flat, cost.shape)
        if (cost[a, b], even[a, b]) < best:
          best = (cost[a, b], even[a, b])
          exchange = (one, a, other, b)
    if exchange is None:
      return
    one, a, other, b = exchange
    one[a], other[b] = other[b], one[a]


def _round(loads: Any) -> Any:
  return np.round(loads, 9)


def _branch_and_bound(
  work: np.ndarray,
  dealing: list[list[int]],
  kinds: list[int],
  items: list[int],
  room: dict[int, int],
) -> list[list[int]]:
  """A dealing that is no worse; the best there is, if it is found in time.

  Groups go to shards one by one. Of shards in the same state only the first is
  tried, and groups that are alike go to shards in their order.
  """
  shards = len(dealing)
  of_item = [tuple(work[:, group]) for group in items]
  kind_of_item = [kinds[group] for group in items]
  mean = work.sum(axis=1) / shards
  enough = float(mean.sum()) * (1 + _EQUAL)
  best, best_cost = [shard.copy() for shard in dealing], _cost(work, dealing)
  loads = [(0.0,) * len(work)] * shards
  free = [dict(room) for _ in range(shards)]
  at: list[int] = []  # The shard of each item so far.
  looked_at = 0

  def go() -> None:
    nonlocal best, best_cost, looked_at
    index = len(at)
    if index == len(items):
      cost = sum(map(max, zip(*loads, strict=True)))
      best_cost = cost
      best = [[] for _ in range(shards)]
      for group, shard in zip(items, at, strict=True):
        best[shard].append(group)
      return
    kind = kind_of_item[index]
    same = index and (of_item[index], kind) == (
      of_item[index - 1],
      kind_of_item[index - 1],
    )
    seen = set()
    choices = []
    for shard in range(shards):
      state = (loads[shard], *sorted(free[shard].items()))
      if free[shard][kind] and state not in seen:
        seen.add(state)
        if not same or shard >= at[-1]:
          choices.append((sum(loads[shard]), shard))
    for _, shard in sorted(choices):
      looked_at += 1
      if best_cost <= enough or looked_at > _MOST_PARTIAL_DEALINGS:
        return
      before = loads[shard]
      loads[shard] = tuple(map(operator.add, before, of_item[index]))
      bound = sum(
        max(*of_layer, least)
        for *of_layer, least in zip(*loads, mean, strict=True)
      )
      if bound < best_cost - _EQUAL * enough:
        at.append(shard)
        free[shard][kind] -= 1
        go()
        free[shard][kind] += 1
        at.pop()
      loads[shard] = before

  go()
  return best
