"""Routed attention on TPUs, in interpret mode, against NumPy."""

import functools
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.head_attention.mosaic_tpu.items import (
  EDGE,
  FIRST,
  LAST,
  read_step,
)
from pallas_kernels.packing import pack
from pallas_kernels.routed_attention.mosaic_tpu import implementation, worklist
from pallas_kernels.routed_attention.operands import Operands, Settings
from pallas_kernels.routed_attention.tiling import Tiling
from tests import s2_cases
from tests.routed_cases import (
  HEADS,
  check,
  draw,
  expected,
  picks,
  routed,
  segments,
  visible,
)

# Run always; the others on request. "strided" is what the tests below run.
ALWAYS = (
  "strided, shared by the group",
  "strided and dense",
  "window",
  "strided, not causal in a block",
)
EVERY = HEADS | {"everything": s2_cases.strided(4, local=1, stride=1)}
TILINGS = (
  Tiling(block_q=8, block_kv=8, block_edge=8),
  Tiling(block_q=16, block_kv=8, block_edge=8),
  Tiling(block_q=8, block_kv=16, block_edge=8),
)
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def run(heads, arrays, active, options, tiling=TILINGS[0], interpret=True):
  return routed(
    arrays,
    active,
    options,
    pattern=heads.pattern,
    tiling=tiling,
    implementation="mosaic_tpu",
    interpret=interpret,
  )


def small(seed):
  """Few tiles each way: interpreting takes long."""
  return draw(seed, T=27, S=34)


@pytest.mark.slow
@pytest.mark.parametrize(
  "heads",
  [
    pytest.param(
      heads,
      marks=[] if name in (*ALWAYS, "everything") else [pytest.mark.exhaustive],
      id=name,
    )
    for name, heads in EVERY.items()
  ],
)
@hypothesis.given(
  seed=st.integers(0, 1000),
  density=st.sampled_from([0.4, 1.0, 0.0]),
  tiling=st.sampled_from(TILINGS),
  offset=st.sampled_from([0, 13]),
  has_segments=st.booleans(),
)
@hypothesis.settings(max_examples=2)
def test_equals_masked_dense_attention(
  heads, seed, density, tiling, offset, has_segments
):
  arrays = small(seed)
  active = picks(seed, arrays["q"].shape[:3], density)
  options = {"q_offset": jnp.int32(offset)}
  if has_segments:
    options |= segments(seed, arrays, offset)
  got = run(heads, arrays, active, options, tiling)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, options))


@pytest.mark.parametrize(
  ("name", "missing"),
  [
    ("strided", 3),
    ("mixed", 1),
    pytest.param("strided and dense", 3, marks=pytest.mark.exhaustive),
  ],
)
def test_no_races_and_nothing_uninitialised_is_read(name, missing):
  arrays = small(0)
  # A head with every token, one with none, two with some.
  active = picks(0, arrays["q"].shape[:3], 0.5)
  active = active.at[:, :, 0].set(True).at[:, :, missing].set(False)
  heads = HEADS[name]
  options = segments(0, arrays, 0) if name == "mixed" else {}
  got = run(heads, arrays, active, options, interpret=RACES)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, options))


def test_long_lists_are_cut(monkeypatch):
  arrays = small(1)
  active = picks(1, arrays["q"].shape[:3], 0.7)
  heads = HEADS["strided"]
  monkeypatch.setattr(worklist, "MOST_ITEMS", 24)
  # A tiling of its own: nothing that was traced before is used again.
  tiling = Tiling(block_q=8, block_kv=8, block_edge=4)
  got = run(heads, arrays, active, {}, tiling)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, {}))


# Tables whose blocks are longer than a tile of keys; of which a tile holds more
# than a word has bits; of which the queries touch more than a row has lanes.
SIZES = {
  "long blocks": (s2_cases.random_blocks(2, block=32), TILINGS[0]),
  "many a tile": (
    s2_cases.random_blocks(2, block=1, reach=128),
    Tiling(block_q=16, block_kv=64, block_edge=64),
  ),
  "many rows": (
    s2_cases.random_blocks(2, block=1, reach=200, causal=False),
    Tiling(block_q=32, block_kv=16, block_edge=16),
  ),
}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("long blocks", marks=pytest.mark.exhaustive),
    "many a tile",
    "many rows",
  ],
)
def test_blocks_of_any_size_are_looked_up(name):
  heads, tiling = SIZES[name]
  T, S = (140, 150) if name == "many rows" else (30, 90)
  arrays = draw(2, B=1, T=T, S=S, K=1, N=2)
  active = picks(2, arrays["q"].shape[:3], 0.5)
  options = {"q_offset": jnp.int32(min(50, 200 - T))}
  got = run(heads, arrays, active, options, tiling)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, options))


def operands_of(arrays, active, block_rows, offset=0):
  """What an implementation is given."""
  packing = pack(active, num_active=active.shape[2], block_rows=block_rows)
  rows = jnp.zeros((packing.num_rows, arrays["q"].shape[3]))
  keys = arrays["k"], arrays["v"]
  return Operands(rows, *keys, packing, jnp.int32(offset), None, None, None)


@functools.partial(jax.jit, static_argnums=0)
def lists(settings, operands):
  """Block by block, and tile by tile; and the KV head of every block."""
  (run,) = implementation.make_runs(settings, operands)
  return (
    worklist.by_block(run.layout, run.blocks),
    worklist.by_near_tile(run.layout, run.blocks),
    run.blocks.kv_head,
  )


def of_items(work):
  """Block, tile and flags of every item of a list."""
  length = int(work.length)
  words = types.SimpleNamespace(
    place=np.asarray(work.place)[:length], tiles=np.asarray(work.tiles)[:length]
  )
  step = read_step(words, 0, np.arange(length), 0, 1)
  return step.q_tile, step.near_tile, step.flags


@pytest.mark.parametrize("density", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("offset", [0, 13])
@pytest.mark.parametrize(
  "name", ["tables", "tables, not causal", "ranged", "a block over a word"]
)
def test_what_is_looked_up_is_visited_where_it_is_seen(name, offset, density):
  tiling = TILINGS[1]
  if name in HEADS:
    heads, arrays = HEADS[name], draw(3, T=61, S=70)
  else:
    # 33 blocks of keys, the last of which is shorter than a tile.
    heads = s2_cases.random_blocks(4, block=16, causal=False, reach=33)
    arrays = draw(3, T=61, S=517)
  active = picks(3, arrays["q"].shape[:3], density)
  operands = operands_of(arrays, active, tiling.block_q, offset)
  packing = operands.packing
  block_by_block, tile_by_tile, kv_head = lists(
    Settings(heads.pattern, False, 1.0, tiling), operands
  )
  seen = visible(arrays, heads.blocks, heads.pattern, {"q_offset": offset})
  tiles = -(-seen.shape[3] // tiling.block_kv)
  hidden = tiles * tiling.block_kv - seen.shape[3]
  seen = np.pad(seen, ((0, 0), (0, 0), (0, 0), (0, hidden)))
  seen = seen.reshape(*seen.shape[:3], tiles, -1)
  wanted = {}
  positions = np.asarray(packing.row_position).reshape(-1, tiling.block_q)
  for number, rows in enumerate(positions):
    batch, head = packing.block_batch[number], packing.block_head[number]
    by_tile = seen[batch, head][rows[rows >= 0]]  # [queries, tiles, keys]
    for tile in range(tiles):
      if by_tile[:, tile].any():
        wanted[number, tile] = bool(by_tile[:, tile].all())
  assert wanted, "nothing to visit"
  kv_head = np.asarray(kv_head)
  for work, output in (
    (block_by_block, lambda block, _: block),
    (tile_by_tile, lambda block, tile: kv_head[block] * tiles + tile),
  ):
    block, tile, flags = of_items(work)
    got = dict(
      zip(
        zip(block.tolist(), tile.tolist(), strict=True),
        ((flags & EDGE) == 0).tolist(),
        strict=True,
      )
    )
    assert len(got) == len(block), "a tile comes twice"
    assert got == wanted
    # An output tile's items are neighbours, between its FIRST and its LAST.
    outputs = output(block, tile)
    starts = np.append(True, outputs[1:] != outputs[:-1])
    assert starts.sum() == np.unique(outputs).size
    np.testing.assert_array_equal((flags & FIRST) != 0, starts)
    np.testing.assert_array_equal(
      (flags & LAST) != 0, np.append(starts[1:], True)
    )


def test_sinks_are_visited_and_nothing_between_them_and_the_window():
  heads = s2_cases.window(1, block=8, local=2, sinks=1)
  tiling = TILINGS[0]
  arrays = draw(4, B=1, T=96, S=96, K=1, N=1)
  operands = operands_of(arrays, jnp.ones((1, 96, 1), bool), tiling.block_q)
  settings = Settings(heads.pattern, False, 1.0, tiling)
  for work in lists(settings, operands)[:2]:
    block, tile, _ = of_items(work)
    got = set(zip(block.tolist(), tile.tolist(), strict=True))
    assert len(got) == len(block)
    assert got == {(n, t) for n in range(12) for t in (0, n - 1, n) if t >= 0}


def test_only_a_mask_is_refused_whatever_the_pattern():
  arrays = draw(0, B=1, T=16, S=16)
  operands = operands_of(arrays, jnp.ones((1, 16, 4), bool), 128)
  # Compiled, tiles of head attention would need blocks of 4 tokens here.
  for heads in (*EVERY.values(), s2_cases.random_blocks(4, block=1)):
    settings = Settings(
      heads.pattern,
      False,
      1.0,
      Tiling(block_q=128, block_kv=128, block_edge=128),
    )
    assert implementation.refusal(settings, operands) is None
    masked = operands._replace(mask=jnp.ones((1, 1, 16, 16), bool))
    reason = implementation.refusal(settings, masked)
    assert reason is not None and reason.startswith("`mask` ")


@pytest.mark.slow
@pytest.mark.parametrize(
  "sinks", [pytest.param(0, marks=pytest.mark.exhaustive), 5]
)
def test_halves_of_a_tile_that_see_nothing_are_left_out(sinks):
  # Tiles large enough to be halved, and heads with many and with few queries.
  arrays = draw(3, B=1, T=420, S=420, N=2, K=1)
  active = picks(3, arrays["q"].shape[:3], 0.35)
  active = active.at[:, :, 0].set(True)
  heads = s2_cases.strided(2, block=16, stride=4, local=3, reach=27)
  if sinks:
    heads = s2_cases.with_sinks(heads, sinks)
  tiling = Tiling(block_q=256, block_kv=64, block_edge=64)
  got = run(heads, arrays, active, {}, tiling)
  check(got, expected(arrays, active, heads.blocks, heads.pattern, {}))
