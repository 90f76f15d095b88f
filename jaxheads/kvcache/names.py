"""Policies by name, for command lines and requests."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from jaxheads.kvcache.expected import ExpectedAttention
from jaxheads.kvcache.full import Full
from jaxheads.kvcache.policy import Policy
from jaxheads.kvcache.ranked import Ranked
from jaxheads.kvcache.scorers import Chance, KeyNorm, WindowAttention
from jaxheads.kvcache.shard_only import ShardOnly
from jaxheads.kvcache.static_heads import StaticHeads
from jaxheads.kvcache.streaming import Streaming
from jaxheads.kvcache.task_kv import TaskKV


def _ranked(scorer: type[Any], /, **settings: Any) -> Ranked:
  """A `Ranked`, with the settings that are the scorer's given to it."""
  names = {field.name for field in dataclasses.fields(scorer)}
  own = {name: settings.pop(name) for name in names & settings.keys()}
  return Ranked(scorer=scorer(**own), **settings)


_expected = functools.partial(_ranked, ExpectedAttention)
_window = functools.partial(_ranked, WindowAttention)

POLICIES: dict[str, Callable[..., Policy]] = {
  "full": Full,
  "streaming": Streaming,
  "snapkv": _window,
  "pyramid": functools.partial(_window, slope=20.0),
  "ada_snapkv": functools.partial(_window, floor=0.2),
  "ada_pyramid": functools.partial(_window, slope=20.0, floor=0.2),
  "expected": functools.partial(_expected, sinks=4, recent=0),
  "ada_expected": functools.partial(_expected, sinks=4, recent=0, floor=0.2),
  "key_norm": functools.partial(_ranked, KeyNorm),
  "random": functools.partial(_ranked, Chance),
  "static_heads": StaticHeads,
  "shard_only": ShardOnly,
  "task_kv": TaskKV,
}


def make_policy(name: str, **settings: Any) -> Policy:
  """The policy of that name.

  Args:
    name: One of `POLICIES`.
    **settings: Those of the policy's class; of `Ranked` ones also their
      scorer's.

  Raises:
    ValueError: There is no such name, or a setting is out of range.
    TypeError: The policy has no such setting.

  Example:
    >>> make_policy("snapkv", window=16, kernel=5).window
    16
  """
  if name not in POLICIES:
    listed = ", ".join(repr(known) for known in POLICIES)
    raise ValueError(f"`policy` must be one of {listed}, got {name!r}.")
  return POLICIES[name](**settings)
