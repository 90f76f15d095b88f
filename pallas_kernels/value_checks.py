"""Checks of what arrays hold: where that is known, and on request under jit.

Shapes are known when a program is traced and are always checked. Values are
known outside of jit only: there a public door looks at them and raises. Inside,
it looks only within `value_checks`, through `jax.experimental.checkify`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify

# Part of the cache keys of `jax.jit`: nothing traced without checks is reused
# with them.
_under_jit = jax.make_user_context(default_value=False)


@contextlib.contextmanager
def value_checks() -> Iterator[None]:
  """Inside, functions traced by `jax.jit` and the like check their values too.

  A program with checks must go through `checkify.checkify`, which hands out
  what they found; JAX refuses to compile it otherwise. Programs traced outside
  of this context hold no trace of the checks.

  JAX 0.10 to 0.12 drop the checks of a `jax.lax.scan`, such as that over the
  layers of a `DecoderLM`, where `jax.grad` differentiates it: check the
  loss itself, without its gradient.

  Example:
    >>> checked = checkify.checkify(jax.jit(f), errors=checkify.user_checks)
    >>> with value_checks():
    ...   error, out = checked(x)
    >>> error.throw()  # The message that a call without jit raises.
  """
  with _under_jit(True):
    yield


def checks_under_jit() -> bool:
  """Whether this is within `value_checks`."""
  return bool(_under_jit.value)


def wanted(*arrays: Any) -> bool:
  """Whether `check_values` would look at these."""
  return checks_under_jit() or not _traced(arrays)


def check_values(
  name: str,
  arrays: tuple[Any, ...],
  allowed: Callable[..., tuple[Any, Any]],
  what: str,
) -> None:
  """Refuses arrays that hold something that is not allowed.

  Outside of jit the values are fetched and looked at. Under jit this costs
  nothing, unless within `value_checks`.

  Args:
    name: The argument, for the message.
    arrays: What `allowed` takes; NumPy's, JAX's or numbers.
    allowed: Of NumPy arrays or of traced ones: a bool array, False where a
      value is not allowed, and the values, of the same shape, for the message.
    what: What is allowed, for the message: "`name` must ...".

  Raises:
    ValueError: Something is not allowed; names the first index. Under jit the
      `checkify` error has the same message.
  """
  if not wanted(*arrays):
    return
  traced = _traced(arrays)
  if not traced:
    if not all(getattr(x, "is_fully_addressable", True) for x in arrays):
      return  # Other processes hold a part.
    arrays = tuple(np.asarray(array) for array in arrays)
  fine, values = allowed(*arrays)
  if not math.prod(fine.shape):
    return
  place = "".join(f"{{at{axis}}}, " for axis in range(fine.ndim))[:-2]
  message = f"`{name}` must {what}, got {{value}}"
  message += f" at [{place}]." if place else "."
  xp: Any = jnp if traced else np
  first = fine.reshape(-1).argmin()
  index = xp.unravel_index(first, fine.shape)
  shown = {f"at{axis}": number for axis, number in enumerate(index)}
  shown["value"] = values.reshape(-1)[first]
  if traced:
    checkify.check(fine.all(), message, **shown)
  elif not fine.all():
    raise ValueError(message.format(**shown))


def _traced(arrays: tuple[Any, ...]) -> bool:
  return any(isinstance(array, jax.core.Tracer) for array in arrays)
