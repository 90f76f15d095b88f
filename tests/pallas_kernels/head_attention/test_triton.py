"""The Triton kernels, interpreted: values, gradients, visits, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.head_attention import triton
from pallas_kernels.head_attention.api import head_attention
from pallas_kernels.head_attention.contexts import (
  HeadContexts,
  Ranged,
  Rule,
  Strided,
  Table,
)
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import (
  TableHeads,
  split_heads,
  strided_visits,
)
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton import (
  implementation,
  launches,
  strided,
)
from pallas_kernels.head_attention.triton import lists as work_lists
from pallas_kernels.head_attention.triton.problem import describe
from pallas_kernels.head_attention.triton.walks import Shards

TILES = Tiling(block_q=16, block_kv=16)
# The interpreted program is compiled once and run once.
_QUICK = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """A small problem."""

  rules: tuple[Rule, ...]
  block: int = 16
  T: int = 64
  S: int | None = None
  K: int = 1
  H: int = 16
  Hv: int | None = None
  q_offset: int | None = None
  is_traced: bool = False
  is_causal: bool = True
  cap: float | None = None
  has_segments: bool = False
  tiling: Tiling | None = TILES
  dtype: str = "float32"

  @property
  def pattern(self) -> HeadContexts:
    return HeadContexts(self.block, self.rules, self.is_causal)

  def arrays(self) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(7), 6)
    S, N = self.S or self.T, len(self.rules)
    dtype = jnp.dtype(self.dtype)
    H, Hv = self.H, self.Hv or self.H
    return (
      jax.random.normal(keys[0], (1, self.T, N, H), dtype),
      jax.random.normal(keys[1], (1, S, self.K, H), dtype),
      jax.random.normal(keys[2], (1, S, self.K, Hv), dtype),
      jax.random.normal(keys[3], (1, self.T, N, Hv)),
      jnp.sort(jax.random.randint(keys[4], (1, self.T), 0, 3)),
      jnp.sort(jax.random.randint(keys[5], (1, S), 0, 3)),
    )


def _results(case: Case, implementation: str) -> dict[str, np.ndarray]:
  """Output, log-sum-exp and gradients of a loss that uses both."""
  q, k, v, weights, q_segment_ids, kv_segment_ids = case.arrays()
  options = {}
  if case.has_segments:
    options = dict(q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids)
  offset = k.shape[1] - case.T if case.q_offset is None else case.q_offset

  def loss(q, k, v, offset):
    out, lse = head_attention(
      q,
      k,
      v,
      pattern=case.pattern,
      logits_soft_cap=case.cap,
      q_offset=offset,
      tiling=case.tiling,
      return_lse=True,
      implementation=implementation,
      **options,
    )
    wide = out.astype(jnp.float32)
    # Rows that see nothing have no finite log-sum-exp to use.
    used = jnp.sin(jnp.where(jnp.isneginf(lse), 0.0, lse))
    return (wide * weights).sum() + used.sum(), (wide, lse)

  grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
  run = jax.jit(
    grad if case.is_traced else lambda q, k, v, _: grad(q, k, v, offset),
    compiler_options=_QUICK,
  )
  with platform.interpreting():
    (_, (out, lse)), (dq, dk, dv) = run(q, k, v, jnp.int32(offset))
  named = dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)
  return {name: np.asarray(x, np.float64) for name, x in named.items()}


def _shard(residue: int, local: int = 2, stride: int = 3) -> Strided:
  return Strided(local=local, stride=stride, residue=residue)


def _random(seed: int, blocks: int) -> Table:
  keep = np.random.default_rng(seed).random((blocks, blocks)) < 0.5
  return Table.from_mask(keep)


CASES = {
  "grouped heads, one residue a KV head": Case(
    rules=(_shard(0), _shard(0), _shard(2), _shard(2)), T=80, K=2
  ),
  "a residue for every query head": Case(
    rules=(_shard(2), _shard(0), _shard(1), _shard(1)), T=75, K=2
  ),
  "blocks smaller than tiles": Case(
    rules=(_shard(1, 3, 4),),
    block=4,
    T=77,
    tiling=Tiling(block_q=16, block_kv=32),
  ),
  "blocks larger than tiles": Case(
    rules=(_shard(0, 1, 2),),
    block=32,
    T=101,
    tiling=Tiling(block_q=32, block_kv=16),
  ),
  "fewer queries than keys": Case(rules=(_shard(1),), T=35, S=107),
  "queries that start off a block": Case(
    rules=(_shard(1, 2, 2),), block=8, T=45, S=90, q_offset=13
  ),
  "queries past the last key": Case(
    rules=(_shard(1, 1, 2),), block=8, T=45, S=20, q_offset=13
  ),
  "offset known at run time": Case(
    rules=(_shard(1),), T=40, S=80, is_traced=True
  ),
  "window and dense heads in one KV head": Case(
    rules=(_shard(0, 2, 0), _shard(0, 1, 1)), T=70
  ),
  "segments and soft cap": Case(
    rules=(_shard(0), _shard(1)), T=70, has_segments=True, cap=5.0
  ),
  "heads of other sizes": Case(rules=(_shard(0),), H=24, Hv=8),
  "default tiles": Case(rules=(_shard(0),), T=100, tiling=None),
  "sinks": Case(rules=(Strided(local=2, sinks=1),) * 2, T=90),
  "ranges that differ in one KV head": Case(
    rules=tuple(
      Ranged(near=2, near_stride=1, near_residue=0, far_stride=3, far_residue=r)
      for r in (0, 1)
    ),
    T=90,
  ),
  "tables, not causal": Case(
    rules=(_random(0, 6), _random(1, 6)), T=90, K=2, is_causal=False
  ),
  "tables off the blocks, with segments": Case(
    rules=(_random(2, 12),),
    block=8,
    T=45,
    S=90,
    q_offset=13,
    has_segments=True,
    cap=3.0,
  ),
  "tables with blocks larger than tiles": Case(
    rules=(_random(3, 3),), block=32, T=90
  ),
  "tables with tiny blocks": Case(
    rules=(_random(4, 45),),
    block=2,
    T=90,
    tiling=Tiling(block_q=16, block_kv=32),
  ),
  "tables with more blocks a tile than a word has bits": Case(
    rules=(_random(5, 90),),
    block=1,
    T=90,
    tiling=Tiling(block_q=32, block_kv=64),
  ),
  "runs of both kinds in one KV head": Case(
    rules=(_shard(0), Strided(local=2, sinks=1), _shard(0)), T=70
  ),
}


# One of each kind; the others show combinations.
_FIRST = (
  "a residue for every query head",
  "blocks smaller than tiles",
  "fewer queries than keys",
  "queries past the last key",
  "offset known at run time",
  "segments and soft cap",
  "ranges that differ in one KV head",
  "tables off the blocks, with segments",
)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[] if name in _FIRST else pytest.mark.exhaustive)
    for name in CASES
  ],
)
def test_equals_the_reference(name):
  expected = _results(CASES[name], "reference")
  actual = _results(CASES[name], "triton")
  for key, wanted in expected.items():
    limit = 2e-5 if key.startswith("d") else 1e-5
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(np.isfinite(actual[key]), finite)
    np.testing.assert_array_equal(actual[key][~finite], wanted[~finite])
    error = np.abs(actual[key][finite] - wanted[finite]).max(initial=0)
    assert error <= limit * np.abs(wanted[finite]).max(initial=1e-9), key


@pytest.mark.exhaustive
def test_bfloat16_rounds_no_worse_than_dense_attention_does():
  case = Case(rules=(_shard(0), _shard(1)), T=80, dtype="bfloat16")
  q, k, v, weights, *_ = case.arrays()
  exact = _results(case, "reference")
  actual = _results(case, "triton")
  mask = np.stack(
    [
      rule.keep(np.arange(80)[:, None] // 16, np.arange(80)[None] // 16)
      & (np.arange(80)[None] <= np.arange(80)[:, None])
      for rule in case.rules
    ]
  )

  def dense(q, k, v):
    logits = jnp.einsum(
      "btnh,bsh->bnts", q, k[:, :, 0], preferred_element_type=jnp.float32
    )
    logits = jnp.where(mask, logits * 0.25, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    kept = jnp.exp(logits - lse[..., None]).astype(v.dtype)
    out = jnp.einsum("bnts,bsh->btnh", kept, v[:, :, 0])
    wide = out.astype(jnp.float32)
    return (wide * weights).sum() + jnp.sin(lse).sum(), wide

  (_, out), grads = jax.jit(
    jax.value_and_grad(dense, argnums=(0, 1, 2), has_aux=True)
  )(q, k, v)
  rounded = dict(zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True))
  for key, value in rounded.items():
    theirs = np.abs(np.asarray(value, np.float64) - exact[key]).max()
    ours = np.abs(actual[key] - exact[key]).max()
    assert ours <= (3 if key.startswith("d") else 2) * theirs, key


@pytest.mark.exhaustive
def test_huge_hidden_keys_and_values_leave_no_trace():
  # Hidden by the pattern (the middle) and by the causal order (the end).
  case = Case(rules=(_shard(0, 1, 4),), T=64)
  q, k, v, *_ = case.arrays()
  hidden = np.zeros(64, bool)
  hidden[16:32] = True

  def loss(q, k, v):
    out = head_attention(
      q[:, 48:],
      k,
      v,
      pattern=case.pattern,
      tiling=case.tiling,
      implementation="triton",
    )
    return (out**2).sum()

  run = jax.jit(
    jax.value_and_grad(loss, argnums=(0, 1, 2)), compiler_options=_QUICK
  )
  with platform.interpreting():
    value, grads = run(q, k, v)
    for huge in (3e38, -3e38):
      where = hidden[None, :, None, None]
      other, other_grads = run(
        q, jnp.where(where, huge, k), jnp.where(where, huge, v)
      )
      assert value == other
      for one, two in zip(grads, other_grads, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.exhaustive
def test_long_columns_are_cut_and_sum_to_the_same(monkeypatch):
  sharded = Case(rules=(_shard(0), _shard(0)), T=90)
  listed = Case(rules=(Strided(local=1, sinks=1),) * 2, T=90)
  whole = [_results(case, "triton") for case in (sharded, listed)]
  for module in (implementation, strided):
    monkeypatch.setattr(module, "COLUMN", 2)
  lists_of = implementation.deal_columns
  dealt = []

  def watch(*args, **options):
    dealt.append(lists_of(*args, **options))
    return dealt[-1]

  monkeypatch.setattr(implementation, "deal_columns", watch)
  cut = [_results(case, "triton") for case in (sharded, listed)]
  assert dealt[0].is_split
  for one, two in zip(whole, cut, strict=True):
    for key in ("dk", "dv"):
      error = np.abs(one[key] - two[key]).max()
      assert error <= 2e-5 * np.abs(one[key]).max()


@pytest.mark.exhaustive
def test_the_same_bits_twice():
  case = CASES["a residue for every query head"]
  q, k, v, *_ = case.arrays()

  def loss(q, k, v):
    out = head_attention(
      q,
      k,
      v,
      pattern=case.pattern,
      tiling=case.tiling,
      implementation="triton",
    )
    return (out**2).sum()

  run = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), compiler_options=_QUICK)
  with platform.interpreting():
    one, two = run(q, k, v), run(q, k, v)
  jax.tree.map(np.testing.assert_array_equal, one, two)


def _operands(case: Case) -> Operands:
  q, k, v, *_ = case.arrays()
  return Operands(q, k, v, None, None, jnp.int32(case.q_offset or 0))


def _settings(case: Case, **changes) -> Settings:
  values = dict(
    pattern=case.pattern,
    scale=1.0,
    logits_soft_cap=None,
    q_offset=case.q_offset or 0,
    tiling=case.tiling,
  )
  return Settings(**{**values, **changes})


@pytest.mark.parametrize(
  ("block", "local", "stride", "block_q", "block_kv", "offset"),
  [
    (16, 2, 3, 32, 64, 0),
    (8, 1, 2, 16, 32, 5),
    (32, 3, 4, 64, 16, 40),
    (16, 2, 0, 16, 16, 7),
    (16, 1, 1, 32, 16, 0),
  ],
)
def test_walks_visit_what_the_schedule_lists(
  block, local, stride, block_q, block_kv, offset
):
  """Every key once, full tiles full, and no more tiles than the schedule."""
  tiling = Tiling(block_q=block_q, block_kv=block_kv)
  rule = Strided(local=local, stride=stride, residue=max(stride - 1, 0))
  case = Case(
    rules=(rule,), block=block, T=150, S=190, q_offset=offset, tiling=tiling
  )
  problem = describe(_settings(case), _operands(case), tiling)
  shards = Shards(problem, local, stride)
  (run,) = split_heads(case.pattern)
  listed = strided_visits(
    run,
    block=block,
    tiling=tiling,
    q_length=150,
    kv_length=190,
    q_offset=offset,
  )
  for tile in range(problem.q_tiles):
    queries = offset + tile * block_q + np.arange(block_q)
    visits = shards.visits(jnp.int32(tile), rule.residue, offset)
    walk = shards.walk(visits, jnp.asarray(queries, jnp.int32), rule.residue)
    seen = np.zeros((block_q, 190), int)
    for visit in range(int(walk.full_count)):
      seen[:, np.asarray(walk.full(jnp.int32(visit)))] += 1
    for visit in range(int(walk.edge_count)):
      keys, mask = map(np.asarray, walk.edge(jnp.int32(visit)))
      inside = keys < 190
      assert not mask[:, ~inside].any()
      np.add.at(seen, (slice(None), keys[inside]), mask[:, inside])
    keys = np.arange(190)
    wanted = rule.keep(queries[:, None] // block, keys[None] // block)
    wanted &= keys[None] <= queries[:, None]
    exist = queries < offset + 150
    np.testing.assert_array_equal(seen[exist], wanted[exist])
    count = int(walk.full_count) + int(walk.edge_count)
    if block_kv >= block:
      assert count <= (listed.q_tile == tile).sum()


def test_lists_are_as_long_as_what_is_visited():
  keep = np.zeros((8, 8), bool)
  keep[7] = True  # One row sees everything, the others only themselves.
  keep |= np.eye(8, dtype=bool)
  rules = (Table.from_mask(keep), Table.from_mask(np.eye(8, dtype=bool)))
  case = Case(rules=(*rules, rules[0]), T=128, K=3)
  problem = describe(_settings(case), _operands(case), case.tiling)
  heads = TableHeads(0, 3, case.rules)
  lists = work_lists.query_lists(heads, problem)
  np.testing.assert_array_equal(lists.rules, [0, 1, 0])
  assert lists.full_starts[-1] == 7
  assert lists.edge_starts[-1] == 16  # The diagonals of two rules.
  assert lists.full_tiles.size == 7
  assert lists.edge_tiles.size == lists.edge_bits.shape[0] == 16
  by_key = work_lists.key_lists(heads, problem)
  assert by_key.full_starts[-1] == 7
  np.testing.assert_array_equal(by_key.full_tiles, np.full(7, 7))


def test_columns_are_dealt_evenly_and_wholly():
  case = Case(rules=(Strided(local=1, sinks=1),) * 4, T=640, K=2)
  problem = describe(_settings(case), _operands(case), case.tiling)
  heads = TableHeads(0, 4, case.rules)
  lists = work_lists.key_lists(heads, problem)
  columns = work_lists.deal_columns(heads, lists, problem, at_most=8)
  size = columns.end - columns.begin
  assert size.max() <= 8
  # The sink: 40 query tiles of two heads. The others: the tile's own.
  np.testing.assert_array_equal(
    np.diff(columns.starts)[[0, 1, 40]], [10, 1, 10]
  )
  assert size.sum() == 2 * (40 + 39) * 2
  assert (
    work_lists.deal_columns(heads, lists, problem, at_most=80).tile.size
    == columns.starts.size - 1
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(tiling=Tiling(block_q=8, block_kv=64)), "block_q=16, block_kv=64"),
    (dict(tiling=Tiling(block_q=1024, block_kv=1024)), "shared memory.*fits"),
    (dict(q_offset=None), None),
  ],
)
def test_says_why_it_refuses(change, message):
  case = Case(rules=(_shard(0),))
  reason = triton.refusal(_settings(case, **change), _operands(case))
  if message is None:
    assert reason is None
  else:
    with pytest.raises(AssertionError, match=message):
      raise AssertionError(reason)


def test_refuses_a_traced_offset_with_work_lists():
  case = Case(rules=(Strided(local=1, sinks=1),))
  reason = triton.refusal(_settings(case, q_offset=None), _operands(case))
  assert reason is not None
  assert "`q_offset`" in reason


def test_patterns_longer_than_any_sequence_do_not_wrap():
  case = Case(rules=(Strided(local=2**40),), T=48)
  problem = describe(_settings(case), _operands(case), TILES)
  shards = Shards.of(problem, 2**40, 0)
  visits = shards.visits(jnp.int32(2), jnp.int32(0), 0)
  assert (int(visits.full_count), int(visits.edge_count)) == (2, 1)
  keys = jnp.arange(48)
  assert (shards.last_query(keys, jnp.int32(0)) >= 47).all()
  rule = Strided(local=1, stride=2**27)
  settings = _settings(case, pattern=HeadContexts(16, (rule,)))
  assert "`stride=0`" in (triton.refusal(settings, _operands(case)) or "")


def test_refuses_wide_heads_and_other_types():
  case = Case(rules=(_shard(0),), H=512)
  assert "256" in (triton.refusal(_settings(case), _operands(case)) or "")
  case = Case(rules=(_shard(0),))
  q, k, v, *rest = _operands(case)
  eights = [x.astype(jnp.float8_e4m3fn) for x in (q, k, v)]
  reason = triton.refusal(_settings(case), Operands(*eights, *rest))
  assert "bfloat16" in (reason or "")


@pytest.mark.parametrize("H", [16, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_default_tiles_fit_the_smallest_gpu(H, dtype):
  chosen = launches.choose(None, H=H, Hv=H, dtype=dtype, T=4096, S=4096)
  for kind in ("forward", "dq", "dkv"):
    tiling = getattr(chosen, kind).tiling
    assert launches.refusal(tiling, H=H, Hv=H, dtype=dtype) is None
