"""Work and memory split over the devices of one mesh."""

from jaxheads.sharding.mesh import AXES as AXES
from jaxheads.sharding.mesh import MeshShape as MeshShape
from jaxheads.sharding.mesh import axis_size as axis_size
from jaxheads.sharding.mesh import make_mesh as make_mesh
from jaxheads.sharding.mesh import parse_mesh as parse_mesh
from jaxheads.sharding.partition import per_device as per_device
from jaxheads.sharding.rules import RULES as RULES
from jaxheads.sharding.rules import check_heads as check_heads
from jaxheads.sharding.rules import constrain as constrain
from jaxheads.sharding.rules import param_specs as param_specs
from jaxheads.sharding.rules import shardings as shardings
from jaxheads.sharding.rules import spec as spec
