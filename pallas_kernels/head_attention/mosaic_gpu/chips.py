"""The chips that these kernels are for, and what differs between them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from pallas_kernels.head_attention.mosaic_gpu import blackwell, hopper
from pallas_kernels.head_attention.mosaic_gpu.products import Products
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.problem import Problem

STEPS = 2  # Visits in flight.
SHARED_BYTES = 227 * 1024  # Of one program, on both chips.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """A generation of tensor cores.

  Attributes:
    name: For messages.
    rows: Queries of one warp group.
    tilings: Tiles by head size.
    has_tensor_memory: The tensor cores work there, and tell barriers when
      they are done.
    scratch: Memory for the products, by name.
    products: The products; takes that memory by the same names.
  """

  name: str
  rows: int
  tilings: Mapping[int, Tiling]
  has_tensor_memory: bool
  scratch: Callable[[Problem], dict[str, Any]]
  products: Callable[..., Products]

  def tiling(self, asked: Tiling | None, H: int) -> Tiling:
    """The tiles that are asked for, or the chip's own."""
    return asked or self.tilings[H]

  def groups(self, tiling: Tiling) -> int:
    """Warp groups that compute."""
    return tiling.block_q // self.rows


HOPPER = Chip(
  name="Hopper",
  rows=hopper.ROWS,
  tilings=hopper.TILINGS,
  has_tensor_memory=False,
  scratch=hopper.scratch,
  products=hopper.HopperProducts,
)
BLACKWELL = Chip(
  name="Blackwell",
  rows=blackwell.ROWS,
  tilings=blackwell.TILINGS,
  has_tensor_memory=True,
  scratch=blackwell.scratch,
  products=blackwell.BlackwellProducts,
)
# By the major number of the compute capability. 12 is Blackwell by name, but
# has neither of the two kinds of product.
_CHIPS = {"9": HOPPER, "10": BLACKWELL}


def find() -> Chip | None:
  """The chip here, or the one compiled for; Hopper if nobody knows."""
  capability = launches.capability()
  if capability is None:
    return HOPPER
  return _CHIPS.get(capability.split(".")[0])


def shared_bytes(tiling: Tiling, H: int) -> int:
  """Shared memory of one program: queries, keys and values in 16 bits."""
  return 2 * H * (tiling.block_q + 2 * STEPS * tiling.block_kv) + 8 * 1024


def tiling_refusal(chip: Chip, tiling: Tiling, H: int) -> str | None:
  """Why these tiles do not work, with those that do; None if they do."""
  best = chip.tilings[H]
  # One warp group, or as many as share a tile of keys best.
  queries = sorted({chip.rows, best.block_q})
  if tiling.block_q not in queries or tiling.block_kv % 64:
    return (
      f"`tiling` must be {' or '.join(map(str, queries))} queries by a "
      f"multiple of 64 keys, got {tiling.block_q} x {tiling.block_kv}."
    )
  needed = {"bytes of shared memory": (shared_bytes(tiling, H), SHARED_BYTES)}
  if chip.has_tensor_memory:
    needed["columns of tensor memory"] = (
      blackwell.columns(tiling, H),
      blackwell.COLUMNS,
    )
  for what, (size, limit) in needed.items():
    if size > limit:
      return (
        f"`tiling` of {tiling.block_q} x {tiling.block_kv} needs {size} {what},"
        f" of {limit}. `Tiling(block_q={best.block_q}, "
        f"block_kv={best.block_kv})` fits."
      )
  return None
