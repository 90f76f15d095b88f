"""What is compared: cache policies, with settings that fit short prompts."""

import dataclasses
import math

import numpy as np

from jaxheads.kvcache import (
  CacheShape,
  Full,
  Policy,
  Ranked,
  Streaming,
  TaskKV,
  WindowAttention,
)
from jaxheads.kvcache.scorers import Chance, KeyNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What the methods share, smaller than published as prompts are shorter."""

  window: int = 8
  """Last queries of a prompt that scores are made of (L)."""
  kernel: int = 5
  """Tokens of the average that smooths scores."""
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

  def task_kv(self, **changes: object) -> TaskKV:
    """Task-KV as published, and what to change in it."""
    settings: dict[str, object] = dataclasses.asdict(self) | changes
    return TaskKV(**settings)  # type: ignore[arg-type]

  def ranked(self, **changes: object) -> Ranked:
    """SnapKV, and what to change in it."""
    scorer = WindowAttention(window=self.window, kernel=self.kernel)
    settings: dict[str, object] = {
      "scorer": scorer,
      "recent": self.window,
    } | changes
    return Ranked(**settings)  # type: ignore[arg-type]


def methods(
  settings: Settings, *, length: int, heads: tuple[tuple[int, ...], ...]
) -> dict[str, Policy]:
  """Every policy by name.

  Args:
    settings: Shared by all.
    length: Tokens of the prompts.
    heads: Of each layer, the most often farthest heads first: those that a
      static list would name.
  """
  task_kv, ranked = settings.task_kv, settings.ranked
  # Long enough for recent tokens to take the place of all middle ones, and
  # shorter than a prompt whose question is still to come.
  recent = max(settings.recent, 3 * length // 4)
  return {
    "full": Full(),
    "streaming": Streaming(sinks=settings.sinks),
    "snapkv": ranked(),
    "pyramidkv": ranked(slope=20.0),
    "adakv": ranked(floor=0.2),
    "key norm": ranked(scorer=KeyNorm()),
    "chance": ranked(scorer=Chance()),
    "task-kv": task_kv(),
    "task-kv wo": task_kv(space="wo"),
    "task-kv extra": task_kv(center="extra"),
    "task-kv off": task_kv(center="off"),
    "task-kv vnorm": task_kv(ranking="vnorm"),
    "task-kv nearest": task_kv(ranking="nearest"),
    **{
      f"task-kv random {seed}": task_kv(ranking="random", seed=seed)
      for seed in range(3)
    },
    "task-kv static": task_kv(ranking="static", heads=heads),
    "task-kv no full": task_kv(beta=0.0, m=0, center="off"),
    "task-kv no middle": task_kv(recent=recent),
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
  most = math.floor(
    budget * math.prod(shape) * pages(np.array(length), page_size) + 1e-9
  )

  def fits(thousandths: int) -> bool:
    lengths = policy.plan(length, thousandths / 1000, shape).lengths
    return int(pages(lengths, page_size).sum()) <= most

  # Lengths do not fall as the budget grows.
  low, high = 1, 1000
  while low < high:
    mid = (low + high + 1) // 2
    low, high = (mid, high) if fits(mid) else (low, mid - 1)
  return low / 1000


def pages(lengths: np.ndarray, page_size: int) -> np.ndarray:
  """Pages of rows of these lengths."""
  return -(-lengths // page_size)
