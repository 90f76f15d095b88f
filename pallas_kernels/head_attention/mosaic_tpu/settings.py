"""Tile sizes of the TPU kernels, and what they refuse."""

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.head_attention.mosaic_tpu.items import (
  MAX_KV_TILES,
  MAX_Q_TILES,
)
from pallas_kernels.head_attention.mosaic_tpu.plan import Layout
from pallas_kernels.head_attention.mosaic_tpu.query_sums import BUFFERS
from pallas_kernels.head_attention.mosaic_tpu.tile import Overlap
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  TableHeads,
  split_heads,
)
from pallas_kernels.head_attention.tiling import Tiling

_LANES = 128
_SUBLANES = 8
_WORD_BITS = 32
_MIB = 1 << 20

# The least that a TPU has (v4), and what the compiler gives a kernel unasked.
_SMALLEST_VMEM = 16 * _MIB

# Tried in the order of their cost; a tile costs the logits that it computes and
# a part that does not depend on them, about 0.35 of 512 x 512 logits; and about
# so many keys more than its queries see (static schedules).
_TILE_SIZES = (256, 512, 1024)
_STEP_COST = 0.35 * 512 * 512
_HIDDEN_KEYS = 128

Run = StridedHeads | TableHeads


def make_layouts(settings: Settings, operands: Operands) -> list[Layout]:
  """The runs of heads with their tile sizes; shapes and dtypes only."""
  assert settings.q_offset is not None
  return [
    Layout(
      run=run,
      block=settings.pattern.block_size,
      is_causal=settings.pattern.is_causal,
      tiling=_run_tiling(settings, operands, run),
      q_length=operands.q.shape[1],
      kv_length=operands.k.shape[1],
      q_offset=settings.q_offset,
      groups=operands.q.shape[2] // operands.k.shape[2],
    )
    for run in split_heads(settings.pattern)
  ]


def vmem_limit(layout: Layout, operands: Operands) -> int:
  """Vector memory to ask for, in bytes."""
  needed = _vmem_bytes(layout.block, layout.run, layout.tiling, operands)
  return min(_vmem_capacity(), max(_SMALLEST_VMEM, needed + needed // 4))


def overlap(layout: Layout, *, backward: bool) -> Overlap:
  """How the kernels cut their query tiles on this TPU."""
  try:
    info = pltpu.get_tpu_info()
  except ValueError:
    return overlap_on(0, layout, backward=backward)
  return overlap_on(
    info.generation, layout, backward=backward, is_lite=info.is_lite
  )


def overlap_on(
  generation: int, layout: Layout, *, backward: bool, is_lite: bool = False
) -> Overlap:
  """The same on TPUs of a generation; 0 if it is unknown.

  Chosen by the bundles that the compiler schedules for a full tile, and for
  both edges of a window of 512 keys, of 512 x 512 x 128 in bfloat16. Forward,
  of 256 and of 128 queries: v4 1893, 1330, 1109 and 1586, 1180, 1058; v5p 1124,
  911, 882 and 1262, 867, 779; v6e 804, 689, 593 and 929, 757, 640. The first
  of v5e takes 1079, and 1051 of 128 queries if it multiplies twice ahead and
  scales first, which pays in no larger tile. Backward, full tiles of all and of
  256 queries: v5e 2251 and 2451, v4 2587 and 2496, v6e 1546 and 1314; edges of
  256 and of 128 queries: v4 1993, 1672 and 1768, 1404, v6e 1103, 1013 and 1014,
  917.
  """
  newer = generation >= 6
  if backward:
    cut = newer or generation == 4
    return Overlap(256 if cut else layout.tiling.block_q, ahead=2)
  if newer:
    return Overlap(256, ahead=1, pieces=2, scales_first=True, edge_chunk=256)
  if is_lite and layout.tiling.block_q <= 512:
    return Overlap(128, ahead=2, pieces=2, scales_first=True)
  return Overlap(128 if generation == 4 else 256, ahead=1, pieces=2)


def refusal(settings: Settings, operands: Operands) -> str | None:
  """Why these inputs are not covered; None if they are.

  Looks at shapes, dtypes and static settings only.
  """
  q, _, v = operands[:3]
  if settings.q_offset is None:
    return (
      "`q_offset` is traced, and the tiles to visit are static; pass an int."
    )
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    return f"`q` must be float32 or bfloat16, got {q.dtype}; cast to float32."
  if 0 in q.shape or 0 in v.shape:
    return f"`q` and `v` must not be empty, got shapes {q.shape} and {v.shape}."
  for name, array in (("q", q), ("v", v)):
    size = array.shape[-1]
    if size % _SUBLANES:
      nearest = -(-size // _SUBLANES) * _SUBLANES
      return (
        f"`{name}` must have a head size that is a multiple of {_SUBLANES}, "
        f"got {size}; pad it with zeros to {nearest}."
      )
  for run in split_heads(settings.pattern):
    reason = _tiling_refusal(settings, operands, run)
    if reason is not None:
      return reason
  return None


def _tiling_refusal(
  settings: Settings, operands: Operands, run: Run
) -> str | None:
  block = settings.pattern.block_size
  if isinstance(run, TableHeads):
    # The words of a tile have a bit for every block of its queries.
    most = _most_queries(settings)
    least = _SUBLANES if settings.interpret else _LANES
    if most < least:
      return (
        f"`pattern` must have blocks of at least {least * block // most} "
        f"tokens for heads with tables or sinks, got {block}."
      )
    if settings.tiling is not None and settings.tiling.block_q > most:
      return (
        f"`tiling.block_q` must be at most {most} for heads with tables or "
        f"sinks over blocks of {block}, got {settings.tiling.block_q}."
      )
    if settings.tiling is not None and settings.tiling.block_kv < block:
      return (
        f"`tiling.block_kv` must be at least the pattern's block of {block} "
        f"for heads with tables or sinks, got {settings.tiling.block_kv}."
      )
  tiling = _run_tiling(settings, operands, run)
  tiles = (
    ("block_q", tiling.block_q, operands.q.shape[1], MAX_Q_TILES),
    ("block_kv", tiling.block_kv, operands.k.shape[1], MAX_KV_TILES),
  )
  for name, size, length, most in tiles:
    least = _SUBLANES if settings.interpret else _LANES
    least = max(least, _power_of_two(-(-length // most)))
    if size < least:
      return f"`tiling.{name}` must be at least {least}, got {size}."
  if settings.interpret:
    return None
  capacity = _vmem_capacity()
  needed = _vmem_bytes(block, run, tiling, operands)
  if needed > capacity:
    fits = _shrink(block, run, tiling, operands)
    advice = (
      f"block_q={fits.block_q}, block_kv={fits.block_kv} fits"
      if fits is not None
      else "no tile sizes fit; use smaller blocks or heads"
    )
    return (
      f"`tiling` of {tiling.block_q} x {tiling.block_kv} needs about "
      f"{needed // _MIB} MiB of vector memory, this TPU has "
      f"{capacity // _MIB}; {advice}."
    )
  return None


def _run_tiling(settings: Settings, operands: Operands, run: Run) -> Tiling:
  """Tile sizes for a run of heads, at most what the lengths need."""
  T, S = operands.q.shape[1], operands.k.shape[1]
  most_q = max(_LANES, _power_of_two(T))
  most_kv = max(_LANES, _power_of_two(S))
  least_kv = 1
  if isinstance(run, TableHeads):
    most_q = min(most_q, _most_queries(settings))
    least_kv = settings.pattern.block_size

  def clip(block_q: int, block_kv: int) -> Tiling:
    return Tiling(
      block_q=min(block_q, most_q),
      block_kv=max(min(block_kv, most_kv), least_kv),
    )

  if settings.tiling is not None:
    return clip(settings.tiling.block_q, settings.tiling.block_kv)
  block = settings.pattern.block_size
  candidates = [
    clip(block_q, block_kv)
    for block_q in _TILE_SIZES
    for block_kv in _TILE_SIZES
  ]
  capacity = _vmem_capacity()
  fitting = [
    tiling
    for tiling in candidates
    if _vmem_bytes(block, run, tiling, operands) <= capacity
  ]
  return min(
    fitting or [clip(_LANES, _LANES)],
    key=lambda tiling: _cost_per_query(block, run, tiling, S),
  )


def _cost_per_query(block: int, run: Run, tiling: Tiling, S: int) -> float:
  """Of one in the middle of the sequence, in logits."""
  block_q, block_kv = tiling.block_q, tiling.block_kv
  if isinstance(run, TableHeads):
    # What is visited depends on the table: neither coarse nor many tiles.
    return abs(block_q - 512) + abs(block_kv - 512)
  # The window starts at every multiple of block_q inside a key tile.
  starts = range(0, max(block_q, block_kv), block_q)
  window = (run.local - 1) * block
  near = sum(
    (start + block_q - 1) // block_kv - (start - window) // block_kv + 1
    for start in starts
  ) / len(starts)
  keys, far = float(window + _HIDDEN_KEYS), 0.0
  if run.stride:
    held = S / 2 / run.stride
    far = held / max(block_kv, block) + 0.5
    keys += held + _HIDDEN_KEYS
  return keys + (near + far) * _STEP_COST / block_q


def _shrink(
  block: int, run: Run, tiling: Tiling, operands: Operands
) -> Tiling | None:
  """The nearest tile sizes that fit into the vector memory."""
  block_q, block_kv = tiling.block_q, tiling.block_kv
  while max(block_q, block_kv) > _LANES:
    if block_q >= block_kv:
      block_q //= 2
    else:
      block_kv //= 2
    smaller = Tiling(block_q=block_q, block_kv=block_kv)
    if _vmem_bytes(block, run, smaller, operands) <= _vmem_capacity():
      return smaller
  return None


def _vmem_bytes(
  block: int, run: Run, tiling: Tiling, operands: Operands
) -> int:
  """Estimate of what the backward kernel takes, which takes the most.

  A little more than the compiler allocates for v4 (2.7 to 16.7 MiB), where
  query tiles are not cut; less where they are.
  """
  item = operands.q.dtype.itemsize
  sizes = sum(-(-array.shape[-1] // _LANES) * _LANES for array in operands[1:3])
  keys = tiling.block_kv
  # Accumulators, and two buffers for gradients; also for those added to.
  key_sums = 3
  if isinstance(run, StridedHeads) and run.stride:
    keys = max(keys, block)
    key_sums = 3 if run.stride == 1 else 5
  # Two buffers for each operand that is fetched; sums are float32.
  query_sums = BUFFERS * operands.q.shape[-1]
  queries_bytes = tiling.block_q * (2 * sizes * item + query_sums * 4)
  keys_bytes = keys * sizes * (2 * item + key_sums * 4)
  # Logits, weights and their gradients; float32 products take three parts.
  tile_bytes = 24 if item == 4 else 9
  if operands.q_segment_ids is not None:
    queries_bytes += 2 * tiling.block_q * _SUBLANES * 4
    keys_bytes += 2 * keys * _LANES * 4
    tile_bytes += item // 2
  return queries_bytes + keys_bytes + keys * tiling.block_q * tile_bytes


def _vmem_capacity() -> int:
  """Vector memory of the TPU to compile for; the least if it is unknown."""
  try:
    return pltpu.get_tpu_info().vmem_capacity_bytes
  except ValueError:
    return _SMALLEST_VMEM


def _most_queries(settings: Settings) -> int:
  """Largest query tile of a head with a table, whose words have 32 bits."""
  assert settings.q_offset is not None
  block = settings.pattern.block_size
  # A tile that starts inside a block touches one more.
  aligned = settings.q_offset % block == 0
  return block * (_WORD_BITS if aligned else _WORD_BITS // 2)


def _power_of_two(size: int) -> int:
  return 1 << max(size - 1, 0).bit_length()
