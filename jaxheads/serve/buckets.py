"""Sizes that programs are compiled for, so that few of them serve all."""


def power_of_two(size: int) -> int:
  """The smallest power of two that is no less than `size`."""
  return 1 << max(0, size - 1).bit_length()


def bucket(size: int, least: int = 1) -> int:
  """The smallest of 1, 2, 3, 4, 6, 8, 12, ... times `least` that fits.

  Args:
    size: At least 1.
    least: Unit of all sizes.
  """
  units = -(-size // least)
  power = power_of_two(units)
  return least * (power * 3 // 4 if 4 * units <= 3 * power else power)


def buckets(most: int, least: int = 1) -> list[int]:
  """All that `bucket` gives for sizes up to `most`, ascending."""
  sizes = []
  size = 1
  while size <= most:
    sizes.append(bucket(size, least))
    size = sizes[-1] + 1
  return sizes
