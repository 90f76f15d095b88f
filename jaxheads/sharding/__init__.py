"""Work and memory split over the devices of one mesh."""

from jaxheads.sharding.mesh import (
  AXES,
  MeshShape,
  axis_size,
  make_mesh,
  parse_mesh,
)
from jaxheads.sharding.partition import per_device
from jaxheads.sharding.rules import (
  RULES,
  check_heads,
  constrain,
  param_specs,
  shardings,
  spec,
)

__all__ = [
  "AXES",
  "RULES",
  "MeshShape",
  "axis_size",
  "check_heads",
  "constrain",
  "make_mesh",
  "param_specs",
  "parse_mesh",
  "per_device",
  "shardings",
  "spec",
]
