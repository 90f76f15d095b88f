"""Checks of array shapes at public doors."""

from typing import Any


def check_shape(
  name: str, array: Any, spec: str, sizes: dict[str, int]
) -> None:
  """Checks an array's shape against named axes, and learns their sizes.

  Args:
    name: The argument, for the message.
    array: Anything with a `shape`; `None` passes.
    spec: Axis names, such as "B T D"; a "#" before one also allows size 1.
      Axes that `sizes` does not know yet take the array's size.
    sizes: Known axes; updated.

  Raises:
    ValueError: The number of axes or the size of one does not fit.

  Example:
    >>> sizes = {"D": 8}
    >>> check_shape("x", numpy.zeros((2, 3, 8)), "B T D", sizes)
    >>> sizes
    {'D': 8, 'B': 2, 'T': 3}
  """
  if array is None:
    return
  axes = spec.split()
  fits = len(axes) == len(array.shape)
  for axis, size in zip(axes, array.shape, strict=False):
    expected = sizes.get(axis.lstrip("#"), size)
    fits = fits and (size == expected or (axis[0] == "#" and size == 1))
  if not fits:
    wanted = ", ".join(_describe(axis, sizes) for axis in axes)
    raise ValueError(
      f"`{name}` must have shape [{wanted}], got {list(array.shape)}."
    )
  for axis, size in zip(axes, array.shape, strict=True):
    if axis[0] != "#":
      sizes[axis] = size


def _describe(axis: str, sizes: dict[str, int]) -> str:
  name = axis.lstrip("#")
  size = f"{name}={sizes[name]}" if name in sizes else name
  return f"1 or {size}" if axis[0] == "#" else size
