"""How fast a program could run at the best, and what keeps it from faster."""

import dataclasses
import math
from collections.abc import Iterable

import jax
from jax.sharding import Mesh

from jaxheads.planning.chips import Topology
from jaxheads.planning.collectives import Collective


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds that one run of a program takes at the least, by resource.

  Each resource at its published speed and never idle. They can work beside each
  other, so the longest is a bound from below; the sum is what it would take if
  they waited for each other.

  Attributes:
    compute: Matrix products.
    hbm: Main memory.
    ici: Links between chips.
  """

  compute: float
  hbm: float
  ici: float

  @property
  def seconds(self) -> float:
    """The longest."""
    return max(dataclasses.astuple(self))

  @property
  def bound(self) -> str:
    """Name of the resource that takes longest."""
    return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


def roofline(
  topology: Topology,
  mesh: Mesh,
  *,
  flops: float,
  hbm_bytes: float,
  collectives: Iterable[Collective],
) -> Roofline:
  """The bounds of one run.

  Args:
    topology: What it runs on.
    mesh: How its devices are arranged.
    flops, hbm_bytes: Of one device.
    collectives: What it sends.
  """
  speeds: dict[str, float] = {}
  seconds = 0.0
  for collective in collectives:
    if not collective.total_bytes:
      continue
    axes = collective.axes
    if axes not in speeds:
      speeds[axes] = topology.ici_bytes_per_s(
        groups_over(axes.split("+"), mesh)
      )
    seconds += collective.total_bytes / speeds[axes]
  return Roofline(
    compute=flops / topology.flops_per_s,
    hbm=hbm_bytes / topology.hbm_bytes_per_s,
    ici=seconds,
  )


def groups_over(
  axes: Iterable[str], mesh: Mesh
) -> tuple[tuple[jax.Device, ...], ...]:
  """Devices of which each group differs along these axes only."""
  inner = [mesh.axis_names.index(axis) for axis in axes]
  outer = [n for n in range(mesh.devices.ndim) if n not in inner]
  width = math.prod(mesh.devices.shape[n] for n in inner)
  rows = mesh.devices.transpose(*outer, *inner).reshape(-1, width)
  return tuple(map(tuple, rows))
