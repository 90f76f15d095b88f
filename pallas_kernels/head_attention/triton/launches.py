"""Tile sizes of the Triton kernels, and what fits into shared memory."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton.problem import padded

# Bytes of shared memory that one program can have, by compute capability.
_SHARED = {
  "7.5": 64 * 1024,
  "8.0": 163 * 1024,
  "8.6": 99 * 1024,
  "8.7": 163 * 1024,
  "8.9": 99 * 1024,
  "9.0": 227 * 1024,
  "10.0": 227 * 1024,
  "10.3": 227 * 1024,
  "12.0": 99 * 1024,
  "12.1": 99 * 1024,
}
# Chips that programs are compiled for without having one.
_CHIPS = {"A100": "8.0", "H100": "9.0", "H200": "9.0", "B200": "10.0"}
LEAST_TILE = 16  # Of the tensor cores' products.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
  """How one kernel is compiled: its tiles, and Triton's two numbers."""

  tiling: Tiling
  num_warps: int
  num_stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launches:
  """The three kernels of a call."""

  forward: Launch
  dq: Launch
  dkv: Launch


# (block_q, block_kv, stages), from large to small: the first that fits is
# taken.
_CANDIDATES = {
  "forward": (
    (128, 64, 3),
    (128, 64, 2),
    (64, 64, 2),
    (64, 32, 2),
    (32, 32, 1),
    (16, 16, 1),
  ),
  # Two products more a tile, and two more operands that stay.
  "dq": ((64, 64, 2), (64, 32, 2), (32, 32, 2), (32, 32, 1), (16, 16, 1)),
  "dkv": ((64, 64, 2), (32, 64, 2), (32, 32, 2), (32, 32, 1), (16, 16, 1)),
}
# float32 products are done without tensor cores, by code that Triton unrolls
# over the whole tile: 128 x 64 takes minutes to compile, and 32 x 32 spills
# where heads have more than 128 entries.
_FLOAT32 = (
  ((32, 32, 2), (32, 32, 1), (16, 16, 1)),
  ((16, 16, 2), (16, 16, 1)),
)
# Accumulators that four warps hold; more, and the compiler spills registers:
# kilobytes a thread for the keys' gradients of heads of 256.
_FOUR_WARPS = 16 * 1024


def _warps(kind: str, block_q: int, block_kv: int, H: int, Hv: int) -> int:
  sums = {
    "forward": block_q * padded(Hv),
    "dq": block_q * padded(H),
    "dkv": block_kv * (padded(H) + padded(Hv)),
  }
  return 4 if sums[kind] < _FOUR_WARPS else 8


def shared_bytes(
  kind: str, block_q: int, block_kv: int, stages: int, row_bytes: int
) -> int:
  """Shared memory of a kernel, as Triton's pipeline uses it.

  Args:
    kind: "forward", "dq" or "dkv".
    block_q, block_kv: Rows of the tiles.
    stages: Copies of what is streamed.
    row_bytes: A row of q and v together, or of q and d_out, padded.
  """
  # The streamed pair is there once per stage; the resident pair and the
  # weights (two of them in gradients) pass through it to the tensor cores.
  if kind == "dkv":
    resident, streamed = block_kv, block_q
  else:
    resident, streamed = block_q, block_kv
  kept = row_bytes // 2 if kind == "forward" else row_bytes
  if kind == "dkv" and (capability() or "").startswith("10."):
    # Compiled for sm_100, the kernel holds its keys and values twice.
    kept *= 2
  return stages * streamed * row_bytes + resident * kept


def shared_limit() -> tuple[int, str]:
  """Bytes of shared memory of one program, and on what.

  Of the GPU here, or of the one compiled for; else the least of all.
  """
  found = capability()
  if found in _SHARED:
    return _SHARED[found], f"compute capability {found}"
  return min(_SHARED.values()), "an unknown GPU"


def capability() -> str | None:
  """Compute capability of the GPU here, or of the one compiled for.

  "9.0", say; None if nobody knows.
  """
  if jax.default_backend() == "gpu":
    return str(getattr(jax.devices()[0], "compute_capability", None))
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = "" if device is None else device.device_kind
  return next((_CHIPS[name] for name in _CHIPS if name in kind), None)


def choose(
  tiling: Tiling | None,
  *,
  H: int,
  Hv: int,
  dtype: Any,
  T: int,
  S: int,
) -> Launches:
  """Tiles of every kernel.

  Args:
    tiling: What the caller asks for; `None` for the defaults.
    H, Hv: Head sizes.
    dtype: Of q, k and v.
    T, S: Queries and keys: no tile is much longer.
  """
  limit, _ = shared_limit()
  itemsize = jnp.dtype(dtype).itemsize
  row_bytes = (padded(H) + padded(Hv)) * itemsize
  is_wide = itemsize > 2
  launches = {}
  for kind, candidates in _CANDIDATES.items():
    if tiling is not None:
      # The caller's tiles, with as much overlap as there is room for.
      tiles = (tiling.block_q, tiling.block_kv)
      fitting: list[tuple[int, int, int]] = [(*tiles, 2), (*tiles, 1)]
    elif is_wide:
      fitting = list(_FLOAT32[max(padded(H), padded(Hv)) > 128])
    else:
      fitting = list(candidates)
    block_q, block_kv, stages = next(
      candidate
      for candidate in fitting
      if shared_bytes(kind, *candidate, row_bytes) <= limit
    )
    if tiling is None:
      block_q = min(block_q, padded(T))
      block_kv = min(block_kv, padded(S))
    launches[kind] = Launch(
      tiling=Tiling(block_q=block_q, block_kv=block_kv),
      num_warps=8 if is_wide else _warps(kind, block_q, block_kv, H, Hv),
      num_stages=stages,
    )
  return Launches(**launches)


def refusal(
  tiling: Tiling | None, *, H: int, Hv: int, dtype: Any
) -> str | None:
  """Why these tiles do not fit, with the nearest that do."""
  limit, chip = shared_limit()
  row_bytes = (padded(H) + padded(Hv)) * jnp.dtype(dtype).itemsize
  if max(H, Hv) > 256:
    return (
      "heads may have at most 256 entries (`q`, `k`, `v`), got "
      f"{max(H, Hv)}: a tile's accumulators would not fit the registers."
    )
  if tiling is None:
    return None
  if min(tiling.block_q, tiling.block_kv) < LEAST_TILE:
    return (
      f"`tiling` must be at least {LEAST_TILE} x {LEAST_TILE}, got "
      f"{tiling.block_q} x {tiling.block_kv}. `Tiling(block_q="
      f"{max(LEAST_TILE, tiling.block_q)}, block_kv="
      f"{max(LEAST_TILE, tiling.block_kv)})` works."
    )
  needed = _needed(tiling, row_bytes)
  if needed <= limit:
    return None
  block_q, block_kv = tiling.block_q, tiling.block_kv
  while _needed(Tiling(block_q=block_q, block_kv=block_kv), row_bytes) > limit:
    if block_q >= block_kv:
      block_q //= 2
    else:
      block_kv //= 2
  return (
    f"`tiling` of {tiling.block_q} x {tiling.block_kv} needs {needed} bytes "
    f"of shared memory; {chip} has {limit}. `Tiling(block_q={block_q}, "
    f"block_kv={block_kv})` fits."
  )


def _needed(tiling: Tiling, row_bytes: int) -> int:
  return max(
    shared_bytes(kind, tiling.block_q, tiling.block_kv, 1, row_bytes)
    for kind in _CANDIDATES
  )
