"""The one place that picks an implementation."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pallas_kernels import platform
from pallas_kernels.notices import tell_once

# Where an implementation runs; those not named here run everywhere.
_NEEDS = {"mosaic_tpu": "tpu", "triton": "gpu", "mosaic_gpu": "gpu"}


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
  check_name(name, tuple(implementations))
  return implementations[name]


def check_name(name: str, known: Sequence[str]) -> None:
  """Raises a ValueError unless `name` is one of `known`."""
  if name not in known:
    listed = ", ".join(map(repr, known))
    raise ValueError(
      f"`implementation` must be None or one of {listed}, got {name!r}."
    )


def first_that_fits(
  operation: str,
  order: Sequence[str],
  name: str | None,
  refusal: Callable[[str], str | None],
) -> str:
  """Name of the implementation to run.

  What is chosen for want of a name is logged with the reasons.

  Args:
    operation: What it implements.
    order: Implementations from best to the one that covers everything.
    name: What the caller asked for; `None` for the first of `order` that
      runs on this platform and does not refuse.
    refusal: Why the named implementation does not cover these inputs; None
      if it does.

  Raises:
    ValueError: There is no implementation of that name.
    NotImplementedError: The named one refuses; the message says why.
  """
  if name is not None:
    check_name(name, order)
    reason = _wrong_platform(name) or refusal(name)
    if reason:
      raise NotImplementedError(
        f"`implementation={name!r}` does not cover this: {reason} "
        "`implementation=None` takes one that does."
      )
    return name
  refused: list[str] = []
  for candidate in order:
    reason = _wrong_platform(candidate) or refusal(candidate)
    if not reason:
      because = " ".join(refused) or "it is the best one."
      tell_once(
        f"{operation} on {platform.current()}: implementation {candidate!r}, "
        f"because {because} `implementation=` takes another one."
      )
      return candidate
    refused.append(f"{candidate!r} does not cover this: {reason}")
  raise AssertionError(f"{order[-1]} must not refuse")


def load(operation: str, name: str) -> Any:
  """The module of an implementation of `pallas_kernels.<operation>`."""
  # Imported when used: Pallas and its backends take a while, and not every
  # installation has every backend.
  return importlib.import_module(f"pallas_kernels.{operation}.{name}")


def choose(
  operation: str,
  name: str | None,
  settings: Any,
  operands: Any,
  *,
  order: Sequence[str],
  named: Sequence[str],
) -> str:
  """Name of the implementation to run, of modules that have a `refusal`.

  Args:
    operation: Folder of `pallas_kernels`.
    name: What the caller asked for; `None` for the best one.
    settings, operands: What `refusal` looks at.
    order: From best to the one that covers everything.
    named: What can be asked for; "reference" never refuses.

  Raises:
    ValueError: There is no implementation of that name.
    NotImplementedError: The named one refuses; the message says why.
  """

  def refusal(candidate: str) -> str | None:
    if candidate == "reference":
      return None
    reason: str | None = load(operation, candidate).refusal(settings, operands)
    return reason

  order = order if name is None else named
  return first_that_fits(operation, order, name, refusal)


def _wrong_platform(name: str) -> str | None:
  needed = _NEEDS.get(name)
  here = platform.current()
  if needed is None or platform.interpret() or here == needed:
    return None
  return f"it needs a {needed.upper()}, and JAX runs on {here!r}."
