"""One mesh of devices, from a laptop to a pod: four named axes, always all."""

import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxheads.errors import UserError

# From the axis that communicates least to the one that does most, so that
# neighbours on the network are neighbours on the last one.
#   data     sequences; every device holds all parameters
#   fsdp     sequences; parameters and optimizer state are split too
#   context  tokens of a sequence
#   heads    heads, and with them features of the MLP and words
AXES = ("data", "fsdp", "context", "heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
  """Devices along each axis."""

  data: int = 1
  fsdp: int = 1
  context: int = 1
  heads: int = 1

  @property
  def size(self) -> int:
    """Devices in all."""
    return math.prod(dataclasses.astuple(self))

  def __str__(self) -> str:
    return ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES)


def parse_mesh(text: str | None, num_devices: int) -> MeshShape:
  """What `--mesh` says.

  Args:
    text: Such as "data=2,heads=4". An axis that is not named has one device,
      but `fsdp`, if not named, takes all that are left. `None` names none.
    num_devices: Devices that there are.
  Raises:
    UserError: It cannot be read, or needs another number of devices; the
      message names the axis and the nearest setting that fits.
  """
  named = _read(text or "")
  product = math.prod(named.values())
  free = "fsdp" not in named
  if num_devices % product or (not free and product != num_devices):
    raise UserError(
      f"`--mesh` {text!r} needs {'a multiple of ' if free else ''}{product} "
      f"devices, there are {num_devices}; {_nearest(named, num_devices)}"
    )
  if free:
    named["fsdp"] = num_devices // product
  return MeshShape(**named)


def make_mesh(
  shape: MeshShape, devices: list[jax.Device] | None = None
) -> Mesh:
  """The mesh of that shape over `devices` (default: every device)."""
  # `jax.make_mesh` refuses axes that are no product of whole dimensions of the
  # pod's network: 8 of 16 x 16 chips.
  placed = mesh_utils.create_device_mesh(
    dataclasses.astuple(shape),
    jax.devices() if devices is None else devices,
    allow_split_physical_axes=True,
  )
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def axis_size(*names: str) -> int:
  """Devices along these axes of the mesh that is set; 1 without one."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  return math.prod(sizes.get(name, 1) for name in names)


def nearest_divisor(wanted: int, number: int) -> int:
  """The divisor of `number` that is nearest to `wanted`, the smaller of two."""
  divisors = (n for n in range(1, number + 1) if number % n == 0)
  return min(divisors, key=lambda n: (abs(n - wanted), n))


def _read(text: str) -> dict[str, int]:
  named: dict[str, int] = {}
  for part in filter(None, text.split(",")):
    axis, equals, number = (word.strip() for word in part.partition("="))
    if axis not in AXES or not equals:
      raise UserError(
        f"`--mesh` takes axes such as data=2,fsdp=4, of {', '.join(AXES)}; "
        f"got {part.strip()!r}"
      )
    if axis in named:
      raise UserError(f"`--mesh` names {axis} twice: {text!r}")
    if not number.isdecimal() or int(number) < 1:
      raise UserError(
        f"`--mesh`: {axis} must be a number of devices, at least 1; got "
        f"{number!r}"
      )
    named[axis] = int(number)
  return named


def _nearest(named: dict[str, int], num_devices: int) -> str:
  """One axis changed so that the product fits; else all on fsdp."""
  free = "fsdp" not in named
  found = []
  for axis, size in named.items():
    others = math.prod(n for name, n in named.items() if name != axis)
    if num_devices % others:
      continue
    left = num_devices // others
    best = nearest_divisor(size, left) if free else left
    found.append((abs(best - size), axis, best))
  if not found:
    return f"the nearest is fsdp={num_devices}"
  _, axis, best = min(found)
  fits = ",".join(f"{name}={n}" for name, n in {**named, axis: best}.items())
  return f"{axis}={best} fits: `--mesh {fits}`"
