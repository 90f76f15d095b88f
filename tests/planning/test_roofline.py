import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxheads.errors import UserError
from jaxheads.planning import chips
from jaxheads.planning.chips import CHIPS, Topology
from jaxheads.planning.collectives import Collective
from jaxheads.planning.roofline import groups_over, roofline
from jaxheads.sharding import AXES


@dataclasses.dataclass(frozen=True)
class Device:
  """A place in a torus."""

  coords: tuple[int, ...]


def slice_of(chip, *shape):
  devices = tuple(map(Device, np.ndindex(*shape)))
  name = f"{chip}:{'x'.join(map(str, shape))}"
  return Topology(name, CHIPS[chip], shape, devices)


def mesh_of(topology, *sizes):
  mesh = object.__new__(Mesh)
  array = np.empty(len(topology.devices), object)
  array[:] = topology.devices
  object.__setattr__(mesh, "devices", array.reshape(sizes))
  object.__setattr__(mesh, "axis_names", AXES)
  return mesh


def speed(topology, mesh, *axes):
  return topology.ici_bytes_per_s(groups_over(axes, mesh)) / 1e9


def test_links_are_those_of_the_dimensions_that_a_group_extends_over():
  pod = slice_of("v5e", 16, 16)
  mesh = mesh_of(pod, 1, 16, 1, 16)
  # Rings in both dimensions, of one link in each direction.
  assert speed(pod, mesh, "heads") == speed(pod, mesh, "fsdp") == 100
  assert speed(pod, mesh, "fsdp", "heads") == 200
  # A part of a ring is none.
  mesh = mesh_of(pod, 1, 64, 1, 4)
  assert speed(pod, mesh, "heads") == 50
  assert speed(pod, mesh, "fsdp") == 100 + 50
  # Eight in a row are no ring.
  small = slice_of("v6e", 8, 8)
  assert speed(small, mesh_of(small, 1, 64, 1, 1), "fsdp") == 2 * 100
  cube = slice_of("v5p", 4, 4, 4)
  assert speed(cube, mesh_of(cube, 1, 64, 1, 1), "fsdp") == 600


def collective(sent, times, axes):
  return Collective(
    kind="all-gather",
    axes=axes,
    group_size=16,
    operand="",
    operand_bytes=0,
    sent_bytes=sent,
    times=times,
    source="",
    name="",
  )


def test_the_slowest_resource_bounds():
  pod = slice_of("v5e", 16, 16)
  mesh = mesh_of(pod, 1, 16, 1, 16)
  found = roofline(
    pod,
    mesh,
    flops=197e12,
    hbm_bytes=819e9 / 2,
    collectives=[
      collective(1e9, 10, "heads"),
      collective(20e9, 2, "fsdp+heads"),
      collective(0, 3, "none"),
    ],
  )
  assert found.compute == 1.0
  assert found.hbm == 0.5
  assert found.ici == pytest.approx(10 / 100 + 40 / 200)
  assert (found.bound, found.seconds) == ("compute", 1.0)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("h100:8", "must begin with one of v4, v5e, v5p, v6e, tpu7x"),
    ("v5:2x2", "try v5[ep]:2x2"),
    ("v5e", "try v5e:2x2 or v5e:2x4"),
    ("v5e:3x5", "try v5e:2x4 or v5e:4x4"),
    ("v5e:32x16", "try v5e:16x16"),
    ("v5p:8x8", "try v5p:4x4x4 or v5p:4x4x8"),
    ("v6e:axb", "has no 'v6e:axb'"),
  ],
)
def test_slices_that_do_not_exist_are_refused_with_one_that_does(name, message):
  with pytest.raises(UserError, match=message):
    chips.find(name)
