"""Policies by name, for command lines and requests."""

from collections.abc import Callable
from typing import Any

from jaxheads.kvcache.full import Full
from jaxheads.kvcache.policy import Policy
from jaxheads.kvcache.ranked import Ranked
from jaxheads.kvcache.streaming import Streaming
from jaxheads.kvcache.task_kv import TaskKV

POLICIES: dict[str, Callable[..., Policy]] = {
  "full": Full,
  "streaming": Streaming,
  "snapkv": Ranked,
  "task_kv": TaskKV,
}


def make_policy(name: str, **settings: Any) -> Policy:
  """The policy of that name; `settings` are its own.

  Raises:
    ValueError: There is no such name, or a setting is out of range.
    TypeError: The policy has no such setting.
  """
  if name not in POLICIES:
    listed = ", ".join(repr(known) for known in POLICIES)
    raise ValueError(f"`policy` must be one of {listed}, got {name!r}.")
  return POLICIES[name](**settings)
