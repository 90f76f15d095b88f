"""Fair comparison of compiled calls on a machine whose speed drifts."""

import json
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Call = Callable[[], Any]  # Returns when its work is done.
Calls = dict[str, Call]


class Unavailable(Exception):
  """A variant that this machine cannot run; the message says why."""


def interleave(
  calls: Mapping[str, Call], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
  """Milliseconds of every call in every round; and why some have none.

  Calls run in turn, round after round: ratios within a round favour nobody.
  """
  reasons: dict[str, str] = {}
  times: dict[str, list[float]] = {}
  for name, call in calls.items():
    reason = _failure(call)
    if reason is None:
      times[name] = []
    else:
      reasons[name] = reason
  for _ in range(rounds):
    for name in times:
      start = time.perf_counter()
      calls[name]()
      times[name].append((time.perf_counter() - start) * 1e3)
  return times, reasons


def _failure(call: Call) -> str | None:
  """Compiles and runs; why that fails, in a line."""
  try:
    call()
  except (jax.errors.JaxRuntimeError, MemoryError, RuntimeError) as error:
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
      return "out of memory"
    return f"failed: {(text or repr(error)).splitlines()[0][:120]}"
  return None


def environment() -> dict[str, Any]:
  """What the figures depend on."""
  device = jax.devices()[0]
  return {
    "jax": jax.__version__,
    "python": platform.python_version(),
    "platform": device.platform,
    "device": device.device_kind,
    "cpus": os.cpu_count(),
  }


def write_json(path: pathlib.Path, figures: Mapping[str, Any]) -> None:
  """Writes the figures, with the folder if it is not there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(figures, indent=2) + "\n")
