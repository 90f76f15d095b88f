"""Which hardware a kernel is for: the one here, or one that is not."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_target: contextvars.ContextVar[str | None] = contextvars.ContextVar(
  "target", default=None
)
_interpret: contextvars.ContextVar[Any] = contextvars.ContextVar(
  "interpret", default=False
)


def current() -> str:
  """The platform to compile for: "cpu", "gpu" or "tpu"."""
  return _target.get() or jax.default_backend()


def interpret() -> Any:
  """What `pallas_call` gets as `interpret`: False outside `interpreting`."""
  return _interpret.get()


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
  """Kernels traced inside are for `target`, whatever this machine is."""
  token = _target.set(target)
  try:
    yield
  finally:
    _target.reset(token)


@contextlib.contextmanager
def interpreting(params: Any = True) -> Iterator[None]:
  """Pallas kernels traced inside run on any machine, slowly.

  Args:
    params: True, or `jax.experimental.pallas.tpu.InterpretParams` for TPU
      kernels (races, uninitialised memory).
  """
  token = _interpret.set(params)
  try:
    yield
  finally:
    _interpret.reset(token)
