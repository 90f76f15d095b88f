"""The one place that picks an implementation."""

from collections.abc import Callable, Mapping
from typing import Any


def select(
  implementations: Mapping[str, Callable[..., Any]],
  name: str | None,
  *,
  default: str,
) -> Callable[..., Any]:
  """The implementation called `name`, or the default one.

  Args:
    implementations: What this operation has, by name.
    name: What the caller asked for; `None` for the default.
    default: Name of the implementation that works everywhere.

  Raises:
    ValueError: There is no implementation of that name.
  """
  if name is None:
    name = default
  if name not in implementations:
    listed = ", ".join(repr(known) for known in implementations)
    raise ValueError(
      f"`implementation` must be None or one of {listed}, got {name!r}."
    )
  return implementations[name]
