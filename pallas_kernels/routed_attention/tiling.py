"""Tile sizes of routed attention."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Tile sizes, in tokens.

  Attributes:
    block_q: Packed queries of one tile; also `Packing.block_rows`.
    block_kv: Keys of one tile that every query of the block sees whole.
    block_edge: Keys of one tile around the diagonal; divides `block_kv`.
  """

  block_q: int
  block_kv: int
  block_edge: int

  def __post_init__(self) -> None:
    for name in ("block_q", "block_kv", "block_edge"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"`{name}` must be at least 1, got {getattr(self, name)}."
        )
    if self.block_kv % self.block_edge:
      raise ValueError(
        f"`block_edge` must divide `block_kv` ({self.block_kv}), "
        f"got {self.block_edge}."
      )


# XLA shares a tile between CPU cores from about this many logits on.
_SHARED_TILE = 2**17


def default_tiling(
  q_length: int, kv_length: int, active_fraction: float = 1.0
) -> Tiling:
  """Tiles that suit CPUs; never longer than the sequences need.

  A tile of n queries of a sparse head spans n / density positions, and all of
  them pay for the last one's keys: the fewer queries a head has, the shorter
  its tiles. Tiles of fewer than 2^17 logits would run on one core.
  """
  expected_rows = q_length * active_fraction
  block_q = 512 if expected_rows >= 2048 else 256
  block_q = block_q if expected_rows >= 512 else 128
  block_kv = 2 * _SHARED_TILE // block_q
  longest = _power_of_two_at_least(kv_length)
  return Tiling(
    block_q=min(block_q, _power_of_two_at_least(q_length)),
    block_kv=min(block_kv, longest),
    block_edge=min(block_kv // 2, longest),
  )


def _power_of_two_at_least(length: int) -> int:
  return 1 << max(0, length - 1).bit_length()
