"""Routed attention on GPUs, in interpret mode, against NumPy."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _dispatch, platform
from pallas_kernels.head_attention import HeadContexts, Strided
from pallas_kernels.head_attention.triton import strided
from pallas_kernels.head_attention.triton.walks import Shards
from pallas_kernels.packing import pack
from pallas_kernels.routed_attention import api, routed_attention, triton
from pallas_kernels.routed_attention.operands import (
  UNUSED,
  Operands,
  Settings,
  seen_up_to,
)
from pallas_kernels.routed_attention.tiling import Tiling
from pallas_kernels.routed_attention.triton import implementation
from pallas_kernels.routed_attention.triton.segments import (
  far_table,
  make_tiles,
  near_table,
)
from tests import s2_cases
from tests.routed_cases import (
  HEADS,
  check,
  draw,
  expected,
  picks,
  routed,
  segments,
)

# Query heads of two KV heads, or one, in groups of 1, 4 and 8.
STRIDED = {
  "strided": (HEADS["strided"], 4),
  "strided, shared by the group": (HEADS["strided, shared by the group"], 2),
  "strided, a residue a KV head": (
    s2_cases.strided(4, block=4, num_kv_heads=2),
    2,
  ),
  "strided, a group of 4": (s2_cases.strided(4, block=4, stride=3), 1),
  "strided, a group of 8": (s2_cases.strided(8, block=4, num_kv_heads=2), 1),
  "strided and dense": (HEADS["strided and dense"], 2),
  "strided and dense in a group": (HEADS["strided and dense"], 1),
  "window": (HEADS["window"], 2),
  "strided, not causal in a block": (
    HEADS["strided, not causal in a block"],
    2,
  ),
  "everything": (s2_cases.strided(4, local=1, stride=1), 4),
  "one head": (s2_cases.strided(1, block=4), 1),
}
# Tiles of float32 have 32 rows: the blocks of the last one have two tiles.
TILINGS = {
  rows: Tiling(block_q=rows, block_kv=16, block_edge=16) for rows in (16, 64)
}


def ragged(shape):
  """The first head takes every token, the last one none, some in between."""
  B, _, N = shape
  density = np.linspace(1, 0, max(N, 2))[:N] * np.linspace(1, 0.5, B)[:, None]
  random = np.random.default_rng(0).random(shape)
  return jnp.asarray(random < density[:, None])


def run(name, *, active=None, density=0.5, rows=64, offset=0, ids=False):
  """The kernels' results, and those of NumPy."""
  heads, kv_heads = STRIDED[name]
  arrays = draw(0, B=2, T=75, S=84, N=heads.pattern.num_heads, K=kv_heads, H=16)
  shape = arrays["q"].shape[:3]
  if active is None:
    active = picks(0, shape, density)
  else:
    active = active(shape)
  options = {"q_offset": jnp.int32(offset)}
  if ids:
    options |= segments(0, arrays, offset)
  got = routed(
    arrays,
    active,
    options,
    pattern=heads.pattern,
    tiling=TILINGS[rows],
    implementation="triton",
    interpret=True,
  )
  return got, expected(arrays, active, heads.blocks, heads.pattern, options)


@pytest.mark.slow
def test_equals_masked_dense_attention_with_ragged_heads():
  got, wanted = run("strided, shared by the group", active=ragged, offset=5)
  check(got, wanted)


@pytest.mark.exhaustive
def test_keys_of_heads_that_nobody_picked_have_no_gradients():
  (_, grads), _ = run("strided", active=ragged)
  for gradient in grads[1:]:
    assert not np.asarray(gradient)[:, :, -1].any()
    assert np.asarray(gradient)[:, :, 0].any()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", STRIDED)
@hypothesis.given(
  density=st.sampled_from([0.0, 0.3, 0.6, 1.0, None]),
  rows=st.sampled_from([16, 64]),
  offset=st.sampled_from([0, 13]),
  ids=st.booleans(),
)
@hypothesis.settings(max_examples=4)
def test_equals_masked_dense_attention(name, density, rows, offset, ids):
  active = ragged if density is None else None
  check(
    *run(
      name, active=active, density=density, rows=rows, offset=offset, ids=ids
    )
  )


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offset", [-5, 0, 30])
def test_equals_the_reference_without_a_pattern(is_causal, offset):
  arrays = draw(1, B=1, T=40, S=37, H=16)
  active = ragged(arrays["q"].shape[:3])
  options = {"q_offset": jnp.int32(offset)}
  got, wanted = (
    routed(
      arrays,
      active,
      options,
      pattern=None,
      is_causal=is_causal,
      tiling=TILINGS[16],
      implementation=name,
      interpret=True,
    )
    for name in ("triton", "reference")
  )
  check(got, wanted)


@pytest.mark.exhaustive
def test_long_columns_are_cut_and_sum_to_the_same(monkeypatch):
  monkeypatch.setattr(strided, "COLUMN", 1)
  # Rows of their own: nothing that was traced before is used again.
  tiling = Tiling(block_q=32, block_kv=16, block_edge=8)
  monkeypatch.setitem(TILINGS, 32, tiling)
  pieces = []
  original = strided.far_kernel

  def far_kernel(*args, **options):
    pieces.append(options["pieces"])
    return original(*args, **options)

  monkeypatch.setattr(strided, "far_kernel", far_kernel)
  check(*run("strided, a residue a KV head", active=ragged, rows=32))
  assert pieces == [2]


@pytest.mark.exhaustive
def test_unused_rows_may_hold_anything_and_the_bits_are_the_same_twice():
  heads, _ = STRIDED["strided, shared by the group"]
  arrays = draw(2, B=1, T=45, S=45, H=16)
  packing = pack(
    picks(2, (1, 45, 4), 0.5), num_active=4, block_rows=TILINGS[64].block_q
  )
  unused = ~packing.row_valid[:, None]
  assert unused.any()
  rng = np.random.default_rng(2)
  q, d_out = (
    jnp.asarray(rng.normal(size=(packing.num_rows, 16)), jnp.float32)
    for _ in range(2)
  )

  @jax.jit
  def attend(q, d_out):
    with platform.interpreting():
      out, pullback = jax.vjp(
        lambda q, k, v: routed_attention(
          q,
          k,
          v,
          packing,
          pattern=heads.pattern,
          tiling=TILINGS[64],
          implementation="triton",
        ),
        q,
        arrays["k"],
        arrays["v"],
      )
      return out, pullback(d_out)

  clean = attend(jnp.where(unused, 0, q), jnp.where(unused, 0, d_out))
  dirty = attend(jnp.where(unused, 1e4, q), jnp.where(unused, jnp.inf, d_out))
  again = attend(jnp.where(unused, 1e4, q), jnp.where(unused, jnp.inf, d_out))
  for one in (dirty, again):
    jax.tree.map(np.testing.assert_array_equal, clean, one)
  for rows in (clean[0], clean[1][0]):
    assert not np.asarray(rows)[np.asarray(unused)[:, 0]].any()


def problem_of(pattern, shape, *, rows, block_kv, S):
  """Settings and operands of shapes; the picks [B, T, N] may be an array."""
  settings = Settings(
    pattern=pattern,
    is_causal=True,
    scale=1.0,
    tiling=Tiling(block_q=rows, block_kv=block_kv, block_edge=block_kv),
  )
  B, _, N = shape
  packing = jax.eval_shape(
    functools.partial(pack, num_active=N, block_rows=rows),
    jax.ShapeDtypeStruct(shape, bool),
  )
  k = jax.ShapeDtypeStruct((B, S, N // 2, 16), jnp.float32)
  q = jax.ShapeDtypeStruct((packing.num_rows, 16), jnp.float32)
  offset = jax.ShapeDtypeStruct((), jnp.int32)
  return settings, Operands(q, k, k, packing, offset, None, None, None)


class Kernels:
  """What the kernels would visit, as arrays."""

  def __init__(self, pattern, active, *, rows, block_kv, offset, S):
    B, _, N = active.shape
    settings, operands = problem_of(
      pattern, active.shape, rows=rows, block_kv=block_kv, S=S
    )
    launch = implementation._launches(settings, operands).dkv
    self.problem = implementation._problem(settings, operands, launch)
    assert self.problem.tiling.block_kv == block_kv
    self.block_q = self.problem.tiling.block_q
    self.runs = settings.runs(N)
    self.pairs = [
      strided.pairs_of(run, self.problem.groups) for run in self.runs
    ]

    @jax.jit
    def compute(active):
      packing = pack(active, num_active=N, block_rows=rows)
      placed = operands._replace(packing=packing, q_offset=jnp.int32(offset))
      limits = seen_up_to(settings, placed)
      tiles = make_tiles(packing, limits, self.block_q)
      near, far, near_starts, walks = [], [], [], []
      for run, pairs in zip(self.runs, self.pairs, strict=True):
        shards = Shards.of(self.problem, run.local, run.stride)
        near.append(near_table(shards, run, tiles))
        far.append(jnp.zeros((B, 0, 0, 0, 3), jnp.int32))
        if run.stride:
          far[-1] = far_table(shards, run, tiles, pairs)
        near_starts.append(shards.near_start(tiles.first))
        walks.append(self._walks(shards, run, tiles, limits))
      return {
        "limits": limits,
        "row_head": packing.row_head,
        "tiles": tiles._replace(longest=None),
        "near": near,
        "far": far,
        "near_starts": near_starts,
        "walks": walks,
      }

    vars(self).update(jax.tree.map(np.asarray, compute(jnp.asarray(active))))

  def _walks(self, shards, run, tiles, limits):
    """Of every tile: counts, keys of full visits, keys and masks of others."""
    visits = jnp.arange(self.problem.kv_tiles + 4)
    residues = jnp.asarray(run.residues, jnp.int32)

    def walk(first, last, head, limits):
      residue = residues.at[head - run.start].get(mode="clip")
      found = shards.visits_between(first, jnp.maximum(last, 0), residue)
      walk = shards.walk(found, limits, residue)
      full, edge = jax.vmap(walk.full)(visits), jax.vmap(walk.edge)(visits)
      return walk.full_count, walk.edge_count, full, *edge

    positions = limits.reshape(-1, self.block_q)
    return jax.vmap(walk)(tiles.first, tiles.last, tiles.head, positions)

  def run_of(self, head):
    """Which run a head belongs to."""
    return next(i for i, run in enumerate(self.runs) if head < run.stop)

  def rows(self, tile):
    return slice(tile * self.block_q, (tile + 1) * self.block_q)


@pytest.mark.parametrize(
  ("block", "rules", "rows", "block_kv", "offset", "is_causal"),
  [
    (8, [(2, 3, 0), (2, 3, 1), (2, 3, 2), (2, 3, 0)], 32, 32, 0, True),
    # Runs that share a KV head.
    (32, [(1, 2, 0), (1, 2, 1), (1, 2, 0), (2, 0, 0)], 64, 16, 5, False),
    (4, [(3, 0, 0), (1, 1, 0), (3, 4, 3), (3, 4, 1)], 16, 16, -9, True),
    # Queries past the last key.
    (16, [(1, 1, 0), (1, 3, 0), (1, 3, 2), (4, 0, 0)], 64, 32, 80, True),
  ],
)
def test_every_visible_pair_is_visited_once_from_both_sides(
  block, rules, rows, block_kv, offset, is_causal
):
  B, T, S, N = 2, 90, 101, 4
  rng = np.random.default_rng(3)
  active = rng.random((B, T, N)) < np.array([1, 0.4, 0.1, 0.7])
  # One sequence has heads without a query.
  active[1] &= np.array([True, False, True, False])
  rules = tuple(
    Strided(local=local, stride=stride, residue=residue)
    for local, stride, residue in rules
  )
  pattern = HeadContexts(block, rules, is_causal)
  found = Kernels(
    pattern, active, rows=rows, block_kv=block_kv, offset=offset, S=S
  )
  used, limits = found.limits != UNUSED, found.limits[:, None]
  assert used.sum() == active.sum()
  wanted = np.zeros((used.size, S), bool)
  for row in np.nonzero(used & (found.limits >= 0))[0]:
    rule = rules[found.row_head[row]]
    wanted[row] = rule.keep(limits[row] // block, np.arange(S) // block)
  wanted &= np.arange(S) <= limits

  count = np.zeros((used.size, S), int)
  tiles = found.tiles
  for tile in range(tiles.starts[-1]):
    if tiles.last[tile] < 0:
      continue
    walk = found.walks[found.run_of(tiles.head[tile])]
    fulls, edges, full, keys, masks = (x[tile] for x in walk)
    assert max(fulls, edges) <= len(full)
    for visit in range(fulls):
      count[found.rows(tile), full[visit]] += 1
    for visit in range(edges):
      inside = keys[visit] < S
      assert not masks[visit][:, ~inside].any()
      count[found.rows(tile), keys[visit][inside]] += masks[visit][:, inside]
  np.testing.assert_array_equal(count[used], wanted[used])

  count = np.zeros((used.size, S), int)

  def add(first, stop, keys, mask):
    for tile in range(first, stop):
      at = found.rows(tile)
      count[at, keys] += mask(tile, limits[at])

  def everything(tile, limit):
    return 1

  groups = found.problem.groups
  for number, run in enumerate(found.runs):
    near, far = found.near[number], found.far[number]
    for at in np.ndindex(near.shape[:-1]):
      head = (run.start // groups + at[1]) * groups + at[3]
      rule = rules[head]
      keys = np.arange(at[2] * block_kv, (at[2] + 1) * block_kv)
      inside = keys[keys < S]
      last = (inside // block + rule.local) * block - 1
      if rule.stride:
        own = inside // block % rule.stride == rule.residue
        last[own] = 2**31 - 1
      some, whole, whole_end, some_end = near[at]
      # Heads of other runs are none of this table's.
      assert run.start <= head < run.stop or not near[at].any()

      def edge(tile, limit, keys=inside, last=last):
        return (keys <= limit) & (limit <= last)

      add(some, whole, inside, edge)
      add(whole, whole_end, keys, everything)
      add(whole_end, some_end, inside, edge)
    for at in np.ndindex(far.shape[:-1]):
      pair = found.pairs[number][at[1]]
      tokens = np.arange(at[2] * block_kv, (at[2] + 1) * block_kv)
      keys = (tokens // block * run.stride + pair.residue) * block
      keys += tokens % block
      some, whole, stop = far[at]
      # Nothing is visited for keys that are not there.
      assert keys[0] < S or some == whole == stop

      def edge(tile, limit, keys=keys[keys < S], number=number):
        return keys < found.near_starts[number][tile]

      add(some, whole, keys[keys < S], edge)
      add(whole, stop, keys, everything)
  np.testing.assert_array_equal(count[used], wanted[used])


def test_blocks_past_the_last_visit_nothing():
  active = np.zeros((2, 90, 4), bool)
  active[1, 7, 2] = True
  pattern = HeadContexts(8, (Strided(local=2, stride=2),) * 4)
  found = Kernels(pattern, active, rows=64, block_kv=16, offset=0, S=101)
  # One block of two tiles, and the query is its last row.
  tiles = found.tiles
  np.testing.assert_array_equal(tiles.starts, [0] * 6 + [2] * 3)
  assert (tiles.first[1], tiles.last[1]) == (7, 7)
  assert tiles.last.size > 2
  assert (np.delete(tiles.last, 1) < 0).all()
  (near,) = found.near
  assert (near[..., 3] - near[..., 0]).sum() == 1


def refusal(change=None, **options):
  settings, operands = problem_of(
    HeadContexts(8, (Strided(local=2),) * 4),
    (1, 40, 4),
    rows=options.pop("rows", 16),
    block_kv=16,
    S=50,
  )
  settings = dataclasses.replace(settings, **options)
  return triton.refusal(settings, (change or (lambda x: x))(operands)) or ""


def test_is_the_choice_on_gpus_where_it_covers():
  pattern = HeadContexts(8, (Strided(local=2),) * 4)
  settings, operands = problem_of(
    pattern, (1, 40, 4), rows=64, block_kv=16, S=50
  )

  def choice(operands):
    return _dispatch.choose(
      "routed_attention", None, settings, operands, order=api._ORDER, named=()
    )

  mask = jax.ShapeDtypeStruct((1, 1, 1, 50), bool)
  with platform.compiling_for("gpu"):
    assert choice(operands) == "triton"
    assert choice(operands._replace(mask=mask)) == "xla"
  assert choice(operands) == "xla"


def test_says_why_it_refuses():
  assert refusal() == ""
  # Larger tiles than fit are cut, whatever the block.
  large = Tiling(block_q=512, block_kv=512, block_edge=512)
  assert refusal(rows=512, tiling=large) == ""
  rules = (Strided(local=2, sinks=1), *(Strided(local=2),) * 3)
  assert "has sinks" in refusal(pattern=HeadContexts(8, rules))
  assert "`packing.block_rows`" in refusal(rows=8)
  mask = jax.ShapeDtypeStruct((1, 1, 1, 50), bool)
  assert "`mask`" in refusal(lambda o: o._replace(mask=mask))
  half = jax.ShapeDtypeStruct((1, 50, 2, 16), jnp.bfloat16)
  assert "one dtype" in refusal(lambda o: o._replace(k=half))
  rows, wide = (
    jax.ShapeDtypeStruct(shape, jnp.float32)
    for shape in ((64, 512), (1, 50, 2, 512))
  )
  assert "256" in refusal(lambda o: o._replace(q=rows, k=wide, v=wide))
