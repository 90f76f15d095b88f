"""Tile sizes of routed attention."""

import dataclasses

from pallas_kernels import platform
from pallas_kernels.head_attention import tiling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling(tiling.Tiling):
  """Tile sizes, in tokens; all powers of two.

  Attributes:
    block_q: Packed queries of one tile; also `Packing.block_rows`.
    block_kv: Keys of one tile that every query of the block sees whole, or of
      one of a head's remote shard.
    block_edge: Keys of one tile around the diagonal; at most `block_kv`.
  """

  block_edge: int

  def __post_init__(self) -> None:
    super().__post_init__()
    edge = self.block_edge
    if edge < 1 or self.block_kv % edge:
      raise ValueError(
        f"`block_edge` must be a power of two of at most `block_kv` "
        f"({self.block_kv}), got {edge}."
      )


# XLA shares a tile between CPU cores from about this many logits on.
_SHARED_TILE = 2**17


# Rows of a register of a TPU, and a tile that is the best one or next to it, by
# static cycles at 32K tokens, with all keys visible and with sharded contexts.
_TPU_LEAST, _TPU_TILE = 128, 512


def default_tiling(
  q_length: int, kv_length: int, active_fraction: float = 1.0
) -> Tiling:
  """Tiles that suit the platform; never longer than the sequences need.

  A tile of n queries of a sparse head spans n / density positions, and all of
  them pay for the last one's keys: the fewer queries a head has, the shorter
  its tiles. On CPUs, tiles of fewer than 2^17 logits would run on one core.
  """
  expected_rows = q_length * active_fraction
  longest = _power_of_two_at_least(kv_length)
  if platform.current() == "tpu":
    rows = _power_of_two_at_least(int(expected_rows))
    block_kv = max(_TPU_LEAST, min(_TPU_TILE, longest))
    return Tiling(
      block_q=max(_TPU_LEAST, min(_TPU_TILE, rows)),
      block_kv=block_kv,
      block_edge=block_kv,
    )
  block_q = 512 if expected_rows >= 2048 else 256
  block_q = block_q if expected_rows >= 512 else 128
  block_kv = 2 * _SHARED_TILE // block_q
  return Tiling(
    block_q=min(block_q, _power_of_two_at_least(q_length)),
    block_kv=min(block_kv, longest),
    block_edge=min(block_kv // 2, longest),
  )


def _power_of_two_at_least(length: int) -> int:
  return 1 << max(0, length - 1).bit_length()
