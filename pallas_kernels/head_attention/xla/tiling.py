"""Sizes of the loops on XLA, chosen by measurement on CPUs."""

from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import StridedHeads
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.xla import strided, table
from pallas_kernels.head_attention.xla.rows import Layout, Run

# Logits of a step: enough to share between the cores, and they stay in cache.
_LOGITS = 2**20
# Heads with rules of their own wait for the slowest one of a step.
_TABLE_LOGITS = 2**18
# A masked tile up to that many keys holds a whole window.
_WIDEST = 1024
# Positions that int32 can hold after a few additions.
_FAR_AWAY = 2**30


def default(
  settings: Settings, operands: Operands, run: Run, *, backward: bool
) -> Tiling:
  """Tile sizes for a run of heads.

  Large tiles are cheaper by the pair; a small query tile computes less in
  vain around its window. Backward also adds to the keys' sums at every visit:
  from 4,096 keys on, fewer and larger visits are cheaper.
  """
  heads, block = run.heads, settings.pattern.block_size
  block_q = 128
  if isinstance(heads, StridedHeads):
    window = heads.local * block
    # What a late query sees of its shard.
    shard = operands.k.shape[1] // 2 // max(heads.stride, 1)
    if not heads.stride:
      shard = 0
    if heads.stride == 1 or window >= 2048:
      block_q = 512
    elif shard >= 4 * window:
      block_q = 256
    if backward and heads.stride and operands.k.shape[1] >= 4096:
      block_q = max(block_q, 512 if operands.k.shape[1] >= 8192 else 256)
  while block_q > 64 and block_q * run.fold > 512:
    block_q //= 2
  return Tiling(block_q=block_q, block_kv=512)


def plan(
  settings: Settings, operands: Operands, run: Run, *, backward: bool
) -> tuple[Layout, strided.Shape | table.Shape]:
  """Static sizes of the loops over a run of heads."""
  tiling = settings.tiling or default(
    settings, operands, run, backward=backward
  )
  batch, length = operands.q.shape[:2]
  kv_length = operands.k.shape[1]
  block, heads = settings.pattern.block_size, run.heads
  is_strided = isinstance(heads, StridedHeads)

  block_q = tiling.block_q
  while block_q // 2 >= length:
    block_q //= 2
  logits = run.units * run.fold * block_q * tiling.block_kv
  most = max(1, (_LOGITS if is_strided else _TABLE_LOGITS) // logits)
  pairs = batch * run.kv_heads
  while pairs > most or batch * run.kv_heads % pairs:
    pairs -= 1
  layout = Layout(
    batch=batch,
    length=length,
    kv_heads=run.kv_heads,
    units=run.units,
    fold=run.fold,
    block_q=block_q,
    pairs=pairs,
  )

  # How far into a block the first query of a tile may lie.
  offset = settings.q_offset
  inside = block - 1
  if offset is not None and offset % block == 0:
    inside = max(block - block_q, 0)
  q_blocks = -(-(block_q + inside) // block)
  if not isinstance(heads, StridedHeads):
    part = min(block, tiling.block_kv)
    return layout, table.Shape(
      block=block,
      part=part,
      parts=min(tiling.block_kv // part, -(-kv_length // part)),
      q_blocks=q_blocks,
      kv_length=kv_length,
      is_causal=settings.pattern.is_causal,
    )
  local = min(heads.local, _FAR_AWAY // block)
  held = -(-kv_length // block)
  edge = min(max(block, 128 if heads.stride == 1 else 64), tiling.block_kv)
  # Every multiple of `edge` up to `width` is compiled.
  width = tiling.block_kv
  shard = -(-held // max(heads.stride, 1)) * block
  while width > edge and width // 2 >= shard:
    width //= 2
  return layout, strided.Shape(
    block=block,
    local=local,
    stride=heads.stride,
    kv_length=kv_length,
    window=min(local - 1 + q_blocks, held) * block,
    width=width,
    edge=edge,
    widest=_WIDEST,
  )
