"""Tile sizes of head attention."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Tile sizes, in tokens; both powers of two.

  Attributes:
    block_q: Queries of one tile.
    block_kv: Keys of one tile. A tile of a head's remote shard gathers
      `block_kv // block_size` blocks that lie `stride` blocks apart.
  """

  block_q: int
  block_kv: int

  def __post_init__(self) -> None:
    for name in ("block_q", "block_kv"):
      size = getattr(self, name)
      if size < 1 or size & (size - 1):
        raise ValueError(f"`{name}` must be a power of two, got {size}.")
