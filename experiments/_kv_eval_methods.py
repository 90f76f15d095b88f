"""What is compared: cache policies, with settings that fit short prompts."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxheads.kvcache import CacheShape, Policy, make_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the methods share, smaller than published as prompts are shorter."""

  window: int = 8
  """Last queries of a prompt that scores are made of (L)."""
  kernel: int = 7
  """Tokens of the average that smooths scores; as published, since answers are
  as long here."""
  sinks: int = 2
  """First tokens that compressed heads keep (s1)."""
  recent: int = 16
  """Last tokens that compressed heads of Task-KV keep (s2)."""
  top: int = 32
  """Tokens that enter a semantic vector (t)."""
  beta: float = 0.25
  """Share of full heads in the first layer."""
  m: int = 1
  """Full heads in the last layer."""

  def task_kv(self, **changes: Any) -> Policy:
    """Task-KV as published, and what to change in it."""
    return make_policy("task_kv", **(dataclasses.asdict(self) | changes))

  def snapkv(self, **changes: Any) -> Policy:
    """SnapKV, and what to change in it."""
    settings = {
      "window": self.window,
      "kernel": self.kernel,
      "recent": self.window,
    }
    return make_policy("snapkv", **(settings | changes))


def methods(
  settings: Settings,
  *,
  length: int,
  theta: float,
  gates: tuple[tuple[float, ...], ...],
) -> dict[str, Policy]:
  """Every policy by name.

  Args:
    settings: Shared by all.
    length: Tokens of the prompts.
    theta: Of the model's rotary embedding.
    gates: How much each head of each layer looks past sinks and recent tokens.
  """
  task_kv, snapkv = settings.task_kv, settings.snapkv
  sinks, window = settings.sinks, settings.window
  # Long enough for recent tokens to take the place of all middle ones, and
  # shorter than a prompt whose question is still to come.
  recent = max(settings.recent, 3 * length // 4)
  expected: dict[str, Any] = dict(
    theta=theta, sinks=sinks, future=max(1, length // 8)
  )
  by_gate = tuple(
    tuple(int(head) for head in np.argsort(-np.array(layer), kind="stable"))
    for layer in gates
  )
  return {
    "full": make_policy("full"),
    "streaming": make_policy("streaming", sinks=sinks),
    "snapkv": snapkv(),
    "pyramid": snapkv(slope=20.0),
    "ada_snapkv": snapkv(floor=0.2),
    "expected": make_policy("expected", **expected),
    "ada_expected": make_policy("ada_expected", **expected),
    "static_heads": make_policy(
      "static_heads", gates=gates, sinks=sinks, recent=window
    ),
    "random": make_policy("random", recent=window),
    "task_kv": task_kv(),
    "task_kv wo": task_kv(space="wo"),
    "task_kv extra": task_kv(center="extra"),
    "task_kv off": task_kv(center="off"),
    "task_kv vnorm": task_kv(ranking="vnorm"),
    "task_kv nearest": task_kv(ranking="nearest"),
    **{
      f"task_kv random {seed}": task_kv(ranking="random", seed=seed)
      for seed in range(3)
    },
    "task_kv static": task_kv(ranking="static", heads=by_gate),
    "task_kv no full": task_kv(beta=0.0, m=0, center="off"),
    "task_kv no middle": task_kv(recent=recent),
  }


def page_budget(
  policy: Policy,
  budget: float,
  *,
  length: int,
  shape: CacheShape,
  page_size: int,
) -> float:
  """The largest budget whose pages are at most this share of the full cache's.

  Rounded to thousandths; the smallest one if even that takes more pages.
  """
  most = math.floor(budget * math.prod(shape) * pages(length, page_size) + 1e-9)

  def fits(thousandths: int) -> bool:
    lengths = policy.plan(length, thousandths / 1000, shape).lengths
    return int(pages(lengths, page_size).sum()) <= most

  # Lengths do not fall as the budget grows.
  low, high = 1, 1000
  while low < high:
    mid = (low + high + 1) // 2
    low, high = (mid, high) if fits(mid) else (low, mid - 1)
  return low / 1000


def pages(lengths: Any, page_size: int) -> Any:
  """Pages of rows of these lengths."""
  return -(-lengths // page_size)
