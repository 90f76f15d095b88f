"""What TPUs can do, as their vendor says, and the shapes they are wired in.

Source:
  Google Cloud's pages of each: peak in bfloat16, capacity and bandwidth of the
  main memory (HBM), bandwidth between chips (ICI) of all links together, in
  both directions.
  https://docs.cloud.google.com/tpu/docs/v5e
  https://docs.cloud.google.com/tpu/docs/v5p
  https://docs.cloud.google.com/tpu/docs/v6e
  https://docs.cloud.google.com/tpu/docs/tpu7x
  https://docs.cloud.google.com/tpu/docs/v4; its links from table 4 of
  https://arxiv.org/abs/2304.01433.
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence

import jax
from jax.experimental import topologies

from jaxheads.errors import UserError
from pallas_kernels.aot.targets import CompilerMissing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One chip; `devices` of JAX share it.

  Attributes:
    name: As in the name of a topology.
    devices: What JAX calls a device: a core, or both cores together.
    hbm_bytes: Capacity, before what the system keeps.
    hbm_bytes_per_s: Bandwidth of the main memory.
    flops_per_s: Peak of matrix products in bfloat16.
    link_bytes_per_s: Bandwidth of one link, in one direction.
    links: To other chips; two for each dimension of the torus.
    ring: A dimension of the slice closes to a ring if it is a multiple of this.
    largest: The largest slice.
  """

  name: str
  devices: int
  hbm_bytes: float
  hbm_bytes_per_s: float
  flops_per_s: float
  link_bytes_per_s: float
  links: int
  ring: int
  largest: tuple[int, ...]

  @property
  def dimensions(self) -> int:
    """Of the torus."""
    return self.links // 2


_GIB = 2.0**30
CHIPS = {
  chip.name: chip
  for chip in (
    Chip(
      name="v4",
      devices=2,
      hbm_bytes=32 * _GIB,
      hbm_bytes_per_s=1200e9,
      flops_per_s=275e12,
      link_bytes_per_s=50e9,
      links=6,
      ring=4,
      largest=(16, 16, 16),
    ),
    Chip(
      name="v5e",
      devices=1,
      hbm_bytes=16 * _GIB,
      hbm_bytes_per_s=819e9,
      flops_per_s=197e12,
      link_bytes_per_s=50e9,
      links=4,
      ring=16,
      largest=(16, 16),
    ),
    Chip(
      name="v5p",
      devices=1,
      hbm_bytes=95 * _GIB,
      hbm_bytes_per_s=2765e9,
      flops_per_s=459e12,
      link_bytes_per_s=100e9,
      links=6,
      ring=4,
      largest=(16, 16, 24),
    ),
    Chip(
      name="v6e",
      devices=1,
      hbm_bytes=32 * _GIB,
      hbm_bytes_per_s=1600e9,
      flops_per_s=918e12,
      link_bytes_per_s=100e9,
      links=4,
      ring=16,
      largest=(16, 16),
    ),
    Chip(
      name="tpu7x",
      devices=2,
      hbm_bytes=192 * _GIB,
      hbm_bytes_per_s=7380e9,
      flops_per_s=2307e12,
      link_bytes_per_s=100e9,
      links=6,
      ring=4,
      largest=(16, 16, 36),
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of chips that are not here.

  Attributes:
    name: "v5e:16x16".
    chip: Of what kind.
    shape: Chips along each dimension of the torus.
    devices: All, in JAX's order.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]
  devices: tuple[jax.Device, ...]

  @property
  def hbm_bytes(self) -> float:
    """Of one device."""
    return self.chip.hbm_bytes / self.chip.devices

  @property
  def hbm_bytes_per_s(self) -> float:
    """Of one device."""
    return self.chip.hbm_bytes_per_s / self.chip.devices

  @property
  def flops_per_s(self) -> float:
    """Of one device."""
    return self.chip.flops_per_s / self.chip.devices

  def ici_bytes_per_s(self, groups: Iterable[Sequence[jax.Device]]) -> float:
    """What one device can send while devices exchange in groups.

    Both links of each dimension that a group goes all around, one of each
    that it goes along. Devices of one chip share its links.
    """
    links = 0
    places = [[getattr(d, "coords", ()) for d in group] for group in groups]
    for dim, size in enumerate(self.shape):
      extent = max(len({place[dim] for place in group}) for group in places)
      if extent > 1:
        is_ring = extent == size and size % self.chip.ring == 0
        links += 2 if is_ring else 1
    return max(1, links) * self.chip.link_bytes_per_s / self.chip.devices


def find(name: str) -> Topology:
  """The slice of that name.

  Raises:
    UserError: There is none; the message names the nearest.
    CompilerMissing: The wheel `libtpu` is not installed.
  """
  chip_name, _, sizes = name.partition(":")
  chip = CHIPS.get(chip_name)
  if chip is None:
    near = difflib.get_close_matches(chip_name, CHIPS, 1, 0.3)
    raise UserError(
      f"`--topology` must begin with one of {', '.join(CHIPS)}, got {name!r}"
      + (f"; try {_nearest(CHIPS[near[0]], sizes)}" if near else "")
    )
  shape = tuple(int(n) for n in re.findall(r"\d+", sizes))
  problem = UserError(
    f"`--topology` has no {name!r}; try {_nearest(chip, sizes)}"
  )
  if sizes != "x".join(map(str, shape)) or len(shape) != chip.dimensions:
    raise problem
  if any(n > most for n, most in zip(sorted(shape), chip.largest, strict=True)):
    raise problem
  if any(n % 2 for n in shape[:2]):  # Of hosts with 2 x 2 chips.
    raise problem
  # As in `pallas_kernels.aot.targets`.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=name)
  except RuntimeError as error:
    if "not installed" in str(error):
      raise CompilerMissing(
        "The compiler for TPUs is the wheel `libtpu`: pip install "
        "'jaxheads[aot]'."
      ) from None
    raise problem from error
  devices = tuple(described.devices)
  if len(devices) != math.prod(shape) * chip.devices:
    raise AssertionError(
      f"{name} has {len(devices)} devices, {chip.devices} a chip are known"
    )
  return Topology(name, chip, shape, devices)


def _nearest(chip: Chip, sizes: str) -> str:
  """Two slices of about as many chips, the smaller first."""
  numbers = [int(n) for n in re.findall(r"\d+", sizes)] or [4]
  wanted = math.prod(numbers)
  listed = _slices(chip)
  below = [s for s in listed if math.prod(s) <= wanted][-1:] or listed[:1]
  above = [s for s in listed if math.prod(s) > wanted][:1]
  return " or ".join(
    f"{chip.name}:{'x'.join(map(str, shape))}" for shape in below + above
  )


def _slices(chip: Chip) -> list[tuple[int, ...]]:
  """Powers of two, as square as can be, from a host of 2 x 2."""
  shape = [2, 2, 1][: chip.dimensions]
  slices = [tuple(shape)]
  while math.prod(shape) * 2 <= math.prod(chip.largest):
    smallest = min(range(len(shape)), key=lambda n: (shape[n], -n))
    shape[smallest] *= 2
    slices.append(tuple(sorted(shape)) if len(shape) == 2 else tuple(shape))
  return slices
