"""Mosaic GPU's routed kernel without a GPU: what it visits, and its numbers.

JAX from 0.12 on interprets it; what the hardware makes of it,
`experiments/check_gpu.py` tells.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform
from pallas_kernels.head_attention import HeadContexts, Strided
from pallas_kernels.head_attention.mosaic_gpu import chips
from pallas_kernels.head_attention.tiling import Tiling as KernelTiling
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.walks import Place, Shards
from pallas_kernels.packing import gather_rows, pack
from pallas_kernels.routed_attention import (
  mosaic_gpu,
  reference,
  routed_attention,
  xla,
)
from pallas_kernels.routed_attention.mosaic_gpu.implementation import (
  make_problem,
)
from pallas_kernels.routed_attention.mosaic_gpu.tiles import (
  COLUMNS,
  Tile,
  kinds,
  tiles_of,
)
from pallas_kernels.routed_attention.operands import (
  Operands,
  Settings,
  seen_up_to,
)
from pallas_kernels.routed_attention.tiling import Tiling
from tests import s2_cases
from tests.interpreted_gpus import CHIPS, needs_interpreter
from tests.routed_cases import HEADS, draw, picks, segments, visible

STRIDED = {
  name: HEADS[name]
  for name in (
    "strided",
    "strided, shared by the group",
    "strided and dense",
    "window",
    "strided, not causal in a block",
  )
}
STRIDED["everything"] = s2_cases.strided(4, local=1, stride=1)
BLOCKS = Tiling(block_q=8, block_kv=16, block_edge=16)
# Of the kernel: a block is one tile or two.
TILINGS = (
  KernelTiling(block_q=8, block_kv=8),
  KernelTiling(block_q=4, block_kv=16),
  KernelTiling(block_q=8, block_kv=2),
)


def settings_of(pattern, tiling, H=8, **changes):
  """As `routed_attention` makes them."""
  return Settings(
    pattern=pattern,
    is_causal=True,
    scale=H**-0.5,
    tiling=tiling,
    **changes,
  )


def operands_of(arrays, active, block_rows, options):
  """As `routed_attention` makes them."""
  q = arrays["q"]
  packing = pack(active, num_active=q.shape[2], block_rows=block_rows)
  return Operands(
    gather_rows(q, packing),
    arrays["k"],
    arrays["v"],
    packing,
    jnp.int32(options.get("q_offset", 0)),
    options.get("mask"),
    options.get("q_segment_ids"),
    options.get("kv_segment_ids"),
  )


@functools.partial(jax.jit, static_argnames=("shards", "box", "most"))
def shown(tile, limits, *, shards, box, most):
  """What a kernel would do.

  Args:
    tile: All tiles.
    limits: Of their rows, [tiles, rows].
    shards: The heads' arithmetic.
    box: Tokens that one copy brings.
    most: Visits to try.
  Returns:
    Visits of every tile; the keys that each brings, [tiles, visits, keys];
    which of them it shows to which rows, [tiles, visits, rows, keys].
  """
  table = tile.table()
  assert table.shape[1] == COLUMNS
  tile = Tile.read([table[:, column, None] for column in range(COLUMNS)])
  visits = tile.places(shards)
  visit = jnp.arange(most, dtype=jnp.int32)[None]
  place = Place(*(x[..., None] for x in visits.place(visit)))
  edge_visit = jnp.maximum(visit - visits.full_count, 0)
  edge = Place(*(x[..., None, None] for x in visits.edge(edge_visit)))
  span = jnp.arange(shards.problem.tiling.block_kv, dtype=jnp.int32)
  position = lambda token, place: shards.position(
    token, place.stride, place.residue
  )
  # The copies, box by box, and the mask's idea of what they bring.
  brought = position(place.token + span // box * box, place) + span % box
  keys = position(edge.token + span, edge)
  mask = shards.mask(
    edge, limits[:, None, :, None], keys, tile.residue[..., None, None]
  )
  is_full = visit < visits.full_count
  total = visits.full_count + visits.edge_count
  mask = is_full[..., None, None] | mask
  agrees = is_full[..., None] | (keys[..., 0, :] == brought)
  agrees |= (visit >= total)[..., None]
  return total[:, 0], brought, mask & (visit < total)[..., None, None], agrees


@pytest.mark.parametrize("heads", STRIDED.values(), ids=STRIDED)
@hypothesis.given(
  seed=st.integers(0, 1000),
  density=st.sampled_from([0.0, 0.3, 1.0]),
  tiling=st.sampled_from(TILINGS),
  offset=st.sampled_from([0, 13, -6]),
)
@hypothesis.settings(max_examples=4)
def test_visits_show_what_the_pattern_says(
  heads, seed, density, tiling, offset
):
  """Every visible pair once, no other; full visits ask no mask."""
  arrays = draw(seed)
  B, T, N, _ = arrays["q"].shape
  S = arrays["k"].shape[1]
  active = picks(seed, (B, T, N), density)
  settings = settings_of(heads.pattern, BLOCKS)
  operands = operands_of(arrays, active, BLOCKS.block_q, {"q_offset": offset})
  packing = operands.packing
  problem = dataclasses.replace(make_problem(settings, operands), tiling=tiling)
  limits = seen_up_to(settings, operands).reshape(-1, tiling.block_q)
  counts = np.zeros((packing.num_rows, S), int)
  for kind in kinds(settings, N):
    shards = Shards.of(problem, kind.run.local, kind.run.stride)
    total, keys, mask, agrees = jax.tree.map(
      np.asarray,
      shown(
        tiles_of(kind, settings, operands, tiling),
        limits,
        shards=shards,
        box=min(heads.pattern.block_size, tiling.block_kv),
        most=2 + 2 * -(-S // tiling.block_kv),
      ),
    )
    assert total.max() <= mask.shape[1]
    assert agrees.all()
    # Tiles of other heads, and past the last block, visit nothing.
    blocks = np.arange(total.size) * tiling.block_q // packing.block_rows
    is_used = blocks < int(packing.num_blocks)
    is_own = kind.is_member[np.asarray(packing.block_head)[blocks]]
    assert not total[~(is_used & is_own)].any()
    for tile, visit in np.argwhere(mask.any(axis=(2, 3))):
      inside = keys[tile, visit] < S
      assert not mask[tile, visit][:, ~inside].any()
      rows = tile * tiling.block_q + np.arange(tiling.block_q)
      where = np.ix_(rows, keys[tile, visit][inside])
      np.add.at(counts, where, mask[tile, visit][:, inside])
  used = np.asarray(packing.row_valid)
  seen = _visible_from(arrays, heads, offset)
  batch, head = (
    np.asarray(x)[used] for x in (packing.row_batch, packing.row_head)
  )
  position = np.asarray(packing.row_position)[used]
  np.testing.assert_array_equal(counts[used], seen[batch, head, position])


def _visible_from(arrays, heads, offset):
  """As `visible`; queries before the first key see nothing."""
  if offset >= 0:
    return visible(arrays, heads.blocks, heads.pattern, {"q_offset": offset})
  B, T, N, _ = arrays["q"].shape
  late = {**arrays, "q": arrays["q"][:, : T + offset]}
  seen = np.zeros((B, N, T, arrays["k"].shape[1]), bool)
  seen[:, :, -offset:] = visible(late, heads.blocks, heads.pattern, {})
  return seen


def test_a_tile_reads_the_keys_of_its_own_head():
  """Query heads share KV heads; a block of rows may be several tiles."""
  arrays = draw(0, K=2, N=4)
  active = picks(0, arrays["q"].shape[:3], 0.5)
  pattern = STRIDED["strided"].pattern
  settings = settings_of(pattern, BLOCKS)
  operands = operands_of(arrays, active, BLOCKS.block_q, {})
  (kind,) = kinds(settings, 4)
  tiling = KernelTiling(block_q=4, block_kv=8)
  tile = tiles_of(kind, settings, operands, tiling)
  packing = operands.packing
  heads = np.asarray(packing.row_head)[::4]
  np.testing.assert_array_equal(tile.kv_head, heads // 2)
  np.testing.assert_array_equal(tile.sequence, packing.row_batch[::4])
  residues = [rule.residue for rule in pattern.rules]
  np.testing.assert_array_equal(tile.residue, np.asarray(residues)[heads])


RULE = Strided(local=2, stride=3, residue=1)


def small(
  rules=(RULE, RULE),
  *,
  block=32,
  block_rows=128,
  block_kv=64,
  H=64,
  has_pattern=True,
  interpret=False,
  **sizes,
):
  """A problem as small as the kernel's tiles allow."""
  settings = settings_of(
    HeadContexts(block, tuple(rules)) if has_pattern else None,
    Tiling(block_q=block_rows, block_kv=block_kv, block_edge=block_kv),
    H,
    interpret=interpret,
  )
  return settings, small_operands(len(rules), H, block_rows, **sizes)


def small_operands(
  N,
  H,
  block_rows,
  *,
  B=1,
  T=200,
  S=260,
  K=1,
  density=0.6,
  offset=60,
  dtype="bfloat16",
  has_segments=False,
  has_mask=False,
):
  arrays = draw(0, B=B, T=T, S=S, K=K, N=N, H=H, dtype=jnp.dtype(dtype))
  options = {"q_offset": offset}
  if has_segments:
    ids = segments(0, arrays, offset)
    options |= {name: jnp.sort(x, axis=1) for name, x in ids.items()}
  if has_mask:
    options["mask"] = jnp.ones((1, 1, 1, S), bool)
  return operands_of(arrays, picks(1, (B, T, N), density), block_rows, options)


def refusal(**changes):
  """Of the same, made of shapes only."""
  results = []

  def make():
    settings, operands = small(**changes)
    results.append(settings)
    return operands

  operands = jax.eval_shape(make)
  return mosaic_gpu.refusal(results[0], operands)


@pytest.mark.parametrize("capability", ["9.0", "10.0", "10.3"])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize(
  "changes",
  [
    {},
    dict(has_pattern=False),
    dict(block_rows=512, block_kv=512, block=64),
    dict(has_segments=True, K=2),
    dict(rules=(Strided(local=1), RULE), dtype="float16", block=8),
  ],
)
def test_covers_strided_heads(monkeypatch, capability, H, changes):
  monkeypatch.setattr(launches, "capability", lambda: capability)
  assert refusal(H=H, **changes) is None


SINKS = (Strided(local=2, sinks=1),) * 2


@pytest.mark.parametrize(
  ("capability", "changes", "message"),
  [
    ("8.0", {}, "wgmma.*this GPU has 8.0"),
    ("9.0", dict(has_mask=True), "`mask` is not known .* use a `pattern`"),
    ("9.0", dict(rules=SINKS), "sinks"),
    ("9.0", dict(dtype="float32"), "float32"),
    ("9.0", dict(H=96), "64, 128 or 256.*96"),
    ("9.0", dict(block=4), "at least 8 tokens.*got 4"),
    ("9.0", dict(block=16, has_segments=True), "of 32, got 16"),
    ("9.0", dict(interpret=True), "interpreted"),
    ("9.0", dict(block_rows=32), "64 or 128 queries.*got 32 x 64"),
    ("10.0", dict(block_rows=64), "128 or 256 queries.*got 64 x 64"),
    ("9.0", dict(block_kv=32), "multiple of 64 keys.*got 128 x 32"),
    ("9.0", dict(S=20), "at least 64 queries and 32 keys.*and 20"),
  ],
)
def test_says_why_it_refuses(monkeypatch, capability, changes, message):
  monkeypatch.setattr(launches, "capability", lambda: capability)
  reason = refusal(**changes)
  assert reason is not None
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(reason)


def test_is_never_the_default_and_needs_a_gpu():
  settings, operands = small()
  attend = functools.partial(
    routed_attention,
    *operands[:4],
    pattern=settings.pattern,
    tiling=settings.tiling,
  )
  with pytest.raises(NotImplementedError, match="GPU"):
    attend(implementation="mosaic_gpu")
  chosen = []
  with platform.compiling_for("gpu"), pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      mosaic_gpu, "refusal", lambda *problem: chosen.append("mosaic_gpu")
    )
    jax.eval_shape(attend)
  assert not chosen


CASES = {
  # Late queries: tiles of both kinds are shown whole, to unused rows as well.
  "strided": dict(S=460, offset=260),
  "split blocks, two sequences": dict(B=2, T=300, block_rows=512, block_kv=512),
  "one warp group": dict(one_group=True, block=16),
  "two kinds": dict(rules=(RULE, Strided(local=1, stride=1)), density=0.4),
  "segments": dict(has_segments=True, T=150, K=2),
  "no pattern": dict(
    has_pattern=False, H=128, dtype="float16", S=340, offset=140
  ),
  "heads of 256": dict(H=256, density=1.0, T=140),
  "before the first key": dict(offset=-30),
  "window": dict(rules=(Strided(local=3),), block=16, T=300, S=300, offset=0),
}
# The others on request.
ALWAYS = ("strided", "segments")


@needs_interpreter
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.exhaustive)
    for name in CASES
  ],
)
@pytest.mark.parametrize("capability", CHIPS)
def test_numbers_are_the_references(monkeypatch, capability, case):
  """Also without races: asynchronous reads and writes have their barriers."""
  assert jax.device_count() == 8
  monkeypatch.setattr(launches, "capability", lambda: capability)
  monkeypatch.setattr(chips, "find", lambda: CHIPS[capability])
  options = dict(CASES[case])
  if options.pop("one_group", False):
    options["block_rows"] = CHIPS[capability].rows
  params = plgpu.InterpretGPUParams(detect_races=True)
  settings, operands = small(interpret=params, **options)
  assert mosaic_gpu.refusal(settings, operands) is None
  out, lse = mosaic_gpu.forward(settings, operands)
  assert out.dtype == operands.q.dtype
  q, k, v = (x.astype(jnp.float32) for x in operands[:3])
  exact = operands._replace(q=q, k=k, v=v)
  wanted = reference.attention(settings, exact)
  limit = 2 * float(jnp.finfo(out.dtype).eps) * float(jnp.abs(wanted).max())
  np.testing.assert_allclose(np.asarray(out, np.float32), wanted, 0, limit)
  # Unused rows, whatever they were shown, and those that see nothing.
  _, wanted_lse = xla.forward(settings, exact)
  np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=2e-5)
  empty = np.isneginf(wanted_lse)
  assert empty.any()
  assert not np.asarray(out, np.float32)[empty].any()


@needs_interpreter
@pytest.mark.slow
def test_gradients_are_of_these_numbers(monkeypatch):
  """Triton's backward pass takes this forward pass's log-sum-exp."""
  monkeypatch.setattr(launches, "capability", lambda: "10.0")
  settings, operands = small(dtype="float16", T=130, S=190)
  gpu = dataclasses.replace(settings, interpret=plgpu.InterpretGPUParams())
  out, lse = mosaic_gpu.forward(gpu, operands)
  d_out = jax.random.normal(jax.random.key(0), out.shape, out.dtype)
  # Two interpreters: each knows its own primitives.
  plain = dataclasses.replace(settings, interpret=True)
  actual = mosaic_gpu.backward(plain, operands, out, lse, d_out)

  def loss(q, k, v):
    rows = reference.attention(settings, operands._replace(q=q, k=k, v=v))
    return (rows * d_out.astype(jnp.float32)).sum()

  exact = (x.astype(jnp.float32) for x in operands[:3])
  wanted = jax.grad(loss, argnums=(0, 1, 2))(*exact)
  for one, two in zip(actual, wanted, strict=True):
    one, two = (np.asarray(x, np.float32) for x in (one, two))
    np.testing.assert_allclose(one, two, rtol=0, atol=4e-3 * np.abs(two).max())
