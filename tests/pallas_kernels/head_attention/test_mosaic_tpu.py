"""What only the TPU kernels can get wrong; the rest is in the general suite."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platform
from pallas_kernels.head_attention import (
  HeadContexts,
  Strided,
  Table,
  Tiling,
  head_attention,
  mosaic_tpu,
)
from pallas_kernels.head_attention.mosaic_tpu import implementation, items
from pallas_kernels.head_attention.mosaic_tpu.plan import (
  Layout,
  forward_plan,
  key_plan,
)
from pallas_kernels.head_attention.mosaic_tpu.tile import Overlap
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.schedule import (
  StridedHeads,
  TableHeads,
  Visits,
)

TILING = Tiling(block_q=32, block_kv=32)
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def strided(*residues, local=2, stride=4, block=8):
  return HeadContexts(
    block_size=block,
    rules=tuple(
      Strided(local=local, stride=stride, residue=residue)
      for residue in residues
    ),
  )


def tables(masks, block=8, is_causal=True):
  return HeadContexts(
    block_size=block,
    rules=tuple(Table.from_mask(mask) for mask in masks),
    is_causal=is_causal,
  )


def random_masks(heads, blocks, density=0.2):
  return np.random.default_rng(3).random((heads, blocks, blocks)) < density


@functools.lru_cache
def inputs(T, S, N, K, H=16, Hv=8, B=1, dtype=jnp.float32):
  random = np.random.default_rng(0)
  shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, Hv), (B, T, N, Hv))
  return tuple(jnp.asarray(random.normal(size=s), dtype) for s in shapes)


def run(pattern, arrays, implementation, interpret=True, **options):
  """Output, log-sum-exp and gradients of both, as float32 arrays."""
  q, k, v, cotangent = arrays
  options = {"tiling": TILING, **options}

  def loss(q, k, v):
    out, lse = head_attention(
      q,
      k,
      v,
      pattern=pattern,
      implementation=implementation,
      return_lse=True,
      **options,
    )
    finite = jnp.where(jnp.isfinite(lse), lse, 0.0)
    weighed = out.astype(jnp.float32) * cotangent.astype(jnp.float32)
    return weighed.sum() + jnp.sin(finite).sum(), (out, lse)

  gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
  with platform.interpreting(interpret):
    (_, results), gradients = gradient(q, k, v)
  return [np.asarray(x, np.float32) for x in (*results, *gradients)]


def check(pattern, arrays, interpret=True, **options):
  """The kernels against the dense mask."""
  expected = run(pattern, arrays, "reference", **options)
  got = run(pattern, arrays, "mosaic_tpu", interpret, **options)
  limits = (1e-5, 1e-5, 2e-5, 2e-5, 2e-5)
  for mine, right, limit in zip(got, expected, limits, strict=True):
    seen = np.isfinite(right)
    np.testing.assert_array_equal(np.isfinite(mine), seen)
    size = np.abs(right, where=seen, out=np.zeros_like(right)).max()
    np.testing.assert_allclose(
      mine[seen], right[seen], rtol=0, atol=limit * size
    )
  return got


@pytest.mark.slow
@pytest.mark.parametrize(
  "pattern",
  [
    pytest.param(strided(0, 1, 2, 3), id="strided"),
    pytest.param(tables(random_masks(4, 12), is_causal=False), id="tables"),
  ],
)
def test_no_races_and_nothing_uninitialised_is_read(pattern, capsys):
  arrays = inputs(75, 90, N=4, K=2)
  check(pattern, arrays, RACES)
  assert "RACE" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
  "kv_heads",
  [
    # Whose steps come back to the one query tile at once, after two and after
    # three.
    pytest.param(6, id="one member"),
    pytest.param(3, id="two members", marks=pytest.mark.exhaustive),
    pytest.param(2, id="three members"),
  ],
)
def test_key_tiles_with_one_query_tile(kv_heads, capsys):
  pattern = strided(0, 0, 0, 0, 0, 0)
  cores = dataclasses.replace(RACES, num_cores_or_threads=2)
  check(pattern, inputs(30, 90, N=6, K=kv_heads, B=2), cores)
  assert "RACE" not in capsys.readouterr().out


def test_a_race_would_be_seen(capsys):
  # Two steps of a parallel axis that write the same block, so that the test
  # above cannot pass because nothing is watched.
  from jax.experimental import pallas as pl

  def kernel(out_ref):
    out_ref[...] = jnp.ones_like(out_ref)

  call = pl.pallas_call(
    kernel,
    grid=(2,),
    out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
    out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    interpret=dataclasses.replace(RACES, num_cores_or_threads=2),
  )
  try:
    call().block_until_ready()
    raised = False
  except Exception:
    raised = True
  finally:
    pltpu.reset_tpu_interpret_mode_state()
  assert raised or "RACE" in capsys.readouterr().out


@pytest.mark.parametrize(
  "pattern",
  [
    pytest.param(strided(0, 0, 0, 0), id="one row a group"),
    pytest.param(
      strided(0, 0, 1, 1),
      id="two residues in a group",
      marks=pytest.mark.exhaustive,
    ),
    pytest.param(strided(3, 1, 0, 2), id="a residue each"),
    pytest.param(strided(0, 1, 1, 1), id="rows of two sizes"),
    pytest.param(
      HeadContexts(
        block_size=8,
        rules=(
          *strided(0).rules,
          *strided(1, 2, 3, local=1, stride=5).rules,
        ),
      ),
      id="a group across runs",
      marks=pytest.mark.exhaustive,
    ),
    pytest.param(tables(random_masks(1, 12).repeat(4, 0)), id="one table"),
    pytest.param(tables(random_masks(2, 12)[[0, 1, 1, 0]]), id="two tables"),
  ],
)
def test_gradients_are_summed_over_the_query_heads_of_a_kv_head(pattern):
  check(pattern, inputs(70, 96, N=4, K=1))


@pytest.mark.slow
@pytest.mark.parametrize(
  "overlap",
  [
    Overlap(32, ahead=1),
    Overlap(8, ahead=2, pieces=2),
    Overlap(16, ahead=1, pieces=2, scales_first=True),
    # Too small to be cut.
    Overlap(16, ahead=1, pieces=4, scales_first=True),
  ],
  ids=str,
)
def test_however_a_tile_is_cut(overlap, monkeypatch):
  monkeypatch.setattr(implementation, "overlap", lambda *_, **__: overlap)
  check(strided(0, 1), inputs(70, 96, N=2, K=2))


def test_heads_that_share_a_table_share_its_list():
  arrays = inputs(70, 96, N=4, K=2)
  check(tables(random_masks(2, 12)[[0, 0, 1, 1]]), arrays)
  plan = key_plan(
    Layout(
      run=TableHeads(0, 4, tables(random_masks(1, 12).repeat(4, 0)).rules),
      block=8,
      is_causal=True,
      tiling=TILING,
      q_length=70,
      kv_length=96,
      q_offset=26,
      groups=2,
    )
  )
  (call,) = plan.near.calls
  assert (call.rows, call.members) == (2, 2)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  "pattern",
  [
    pytest.param(strided(0, 1, 2, 3), id="strided"),
    pytest.param(tables(random_masks(4, 16)), id="tables"),
  ],
)
def test_long_lists_are_split_and_change_no_bit(pattern, monkeypatch):
  arrays = inputs(128, 128, N=4, K=2)
  whole = run(pattern, arrays, "mosaic_tpu")
  calls = []
  attend = implementation.attend
  monkeypatch.setattr(
    implementation,
    "attend",
    lambda *args, **options: calls.append(1) or attend(*args, **options),
  )
  monkeypatch.setattr(items, "_TABLE_WORDS", 16)
  for cached in (forward_plan, key_plan):
    cached.cache_clear()
  try:
    split = run(pattern, arrays, "mosaic_tpu")
  finally:
    for cached in (forward_plan, key_plan):
      cached.cache_clear()
  assert len(calls) > 1
  for one, other in zip(whole, split, strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.exhaustive
def test_tiles_without_visits_give_zeros():
  masks = random_masks(2, 16)
  masks[:, 4:9] = False  # Query tile 1.
  masks[:, :, 8:12] = False  # Key tile 2.
  masks[1] = False
  arrays = inputs(128, 128, N=2, K=2)
  out, lse, dq, dk, dv = check(tables(masks), arrays, RACES)
  assert not out[:, 32:64].any() and not dq[:, 32:64].any()
  assert np.isneginf(lse[:, 32:64]).all()
  assert not dk[:, 64:96].any() and not dv[:, 64:96].any()
  assert not out[:, :, 1].any() and not dk[:, :, 1].any()


def test_queries_after_the_last_key_tile():
  # The second query tile's window starts after the last key.
  pattern = strided(0, 1, local=1, stride=0 + 3)
  check(pattern, inputs(80, 40, N=2, K=2), q_offset=21)


@pytest.mark.exhaustive
def test_huge_hidden_keys_leave_no_trace():
  pattern = strided(0, 1)
  q, k, v, cotangent = inputs(64, 64, N=2, K=2)
  hidden = np.arange(64) >= 50
  at = jnp.asarray(hidden)[None, :, None, None]
  arrays = (
    q[:, :50],
    jnp.where(at, 1e30, k),
    jnp.where(at, 3e38, v),
    cotangent[:, :50],
  )
  clean = run(
    pattern, (q[:, :50], k, v, cotangent[:, :50]), "mosaic_tpu", q_offset=0
  )
  dirty = run(pattern, arrays, "mosaic_tpu", q_offset=0)
  for one, other in zip(clean[:3], dirty[:3], strict=True):
    np.testing.assert_array_equal(one, other)
  for one, other in zip(clean[3:], dirty[3:], strict=True):
    assert not other[:, hidden].any()
    np.testing.assert_array_equal(one[:, ~hidden], other[:, ~hidden])


def dense(pattern, arrays):
  """Textbook attention in the arrays' dtype: float32 softmax, cast weights."""
  q, k, v, cotangent = arrays
  groups = q.shape[2] // k.shape[2]
  i = np.arange(q.shape[1]) // pattern.block_size
  keep = np.stack([rule.keep(i[:, None], i[None]) for rule in pattern.rules])
  keep &= np.tri(q.shape[1], dtype=bool)

  def loss(q, k, v):
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    logits = jnp.einsum(
      "btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32
    )
    weights = jax.nn.softmax(
      jnp.where(keep, logits * q.shape[-1] ** -0.5, -jnp.inf)
    )
    out = jnp.einsum(
      "bnts,bsnh->btnh",
      weights.astype(v.dtype),
      v,
      preferred_element_type=jnp.float32,
    ).astype(v.dtype)
    weighed = out.astype(jnp.float32) * cotangent.astype(jnp.float32)
    return weighed.sum(), out

  with jax.default_matmul_precision("highest"):
    (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
      q, k, v
    )
  return [np.asarray(x, np.float32) for x in (out, *gradients)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_bfloat16_is_about_as_exact_as_dense_bfloat16(sharpness):
  pattern = strided(0, 1, 2, 3)
  narrow = inputs(96, 96, N=4, K=2, H=32, Hv=32, dtype=jnp.bfloat16)
  narrow = (narrow[0] * jnp.bfloat16(sharpness), *narrow[1:])
  exact = dense(pattern, [x.astype(jnp.float32) for x in narrow])
  textbook = dense(pattern, narrow)
  q, k, v, cotangent = narrow

  def loss(q, k, v):
    out = head_attention(
      q,
      k,
      v,
      pattern=pattern,
      implementation="mosaic_tpu",
      tiling=TILING,
    )
    weighed = out.astype(jnp.float32) * cotangent.astype(jnp.float32)
    return weighed.sum(), out

  with platform.interpreting(True):
    (_, out), gradients = jax.jit(
      jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    )(q, k, v)
  mine = [np.asarray(x, np.float32) for x in (out, *gradients)]
  for ours, theirs, right, factor in zip(
    mine, textbook, exact, (2, 3, 3, 3), strict=True
  ):
    error = np.sqrt(np.mean((ours - right) ** 2))
    allowed = np.sqrt(np.mean((theirs - right) ** 2))
    assert error <= factor * allowed


SETTINGS = Settings(
  pattern=strided(0, 1),
  scale=1.0,
  logits_soft_cap=None,
  q_offset=0,
  tiling=None,
)


def refusal(T=128, S=128, H=64, Hv=64, dtype=jnp.bfloat16, **changes):
  settings = dataclasses.replace(SETTINGS, **changes)
  shapes = ((1, T, 2, H), (1, S, 2, H), (1, S, 2, Hv))
  arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
  return mosaic_tpu.refusal(settings, Operands(*arrays, None, None, None))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(q_offset=None), "`q_offset` is traced.*pass an int"),
    (dict(dtype=jnp.float16), "float32 or bfloat16, got float16"),
    (dict(T=0), "must not be empty"),
    (dict(H=60), "`q` must have .* multiple of 8, got 60.* 64"),
    (dict(Hv=20), "`v` must have .* multiple of 8, got 20.* 24"),
    (
      dict(tiling=Tiling(block_q=64, block_kv=128)),
      "`tiling.block_q` must be at least 128, got 64",
    ),
    (
      dict(tiling=Tiling(block_q=128, block_kv=64)),
      "`tiling.block_kv` must be at least 128, got 64",
    ),
    (
      dict(T=8192, S=8192, tiling=Tiling(block_q=4096, block_kv=4096)),
      "vector memory.*block_q=.*block_kv=.* fits",
    ),
    (
      dict(pattern=tables(random_masks(2, 64), block=2)),
      "blocks of at least 4 tokens",
    ),
    (
      dict(
        pattern=tables(random_masks(2, 16)),
        tiling=Tiling(block_q=512, block_kv=128),
      ),
      "`tiling.block_q` must be at most 256",
    ),
    (
      dict(
        pattern=tables(random_masks(2, 2), block=256),
        tiling=Tiling(block_q=128, block_kv=128),
      ),
      "`tiling.block_kv` must be at least the pattern's block of 256",
    ),
    (
      dict(S=1 << 22, tiling=Tiling(block_q=128, block_kv=128)),
      "`tiling.block_kv` must be at least 256",
    ),
  ],
)
def test_refuses_what_it_does_not_cover(changes, message):
  reason = refusal(**changes)
  assert reason is not None
  assert re.search(message, reason, re.DOTALL), reason


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(T=1, S=5000),
    dict(dtype=jnp.float32, H=256, Hv=256, T=1 << 17, S=1 << 17),
    dict(pattern=tables(random_masks(2, 32), block=4)),
    dict(tiling=Tiling(block_q=1024, block_kv=1024)),  # Clipped.
  ],
)
def test_covers(changes):
  assert refusal(**changes) is None


def visits(q_tile, kv_tile, is_far, is_full):
  return Visits(
    np.asarray(q_tile, np.int32),
    np.asarray(kv_tile, np.int32),
    np.asarray(is_far, bool),
    np.asarray(is_full, bool),
  )


def test_an_item_fetches_nothing_of_the_view_it_does_not_use():
  work = items.Worklist(
    visits(
      [0, 1, 1, 1, 2, 2, 2],
      [3, 5, 6, 4, 6, 4, 9],
      [0, 1, 1, 0, 1, 0, 0],
      [0, 1, 0, 1, 1, 1, 0],
    ),
    rows=np.zeros(7, int),
    outputs=np.asarray([0, 1, 1, 1, 2, 2, 2]),
  )
  one = np.zeros((1, 1), int)
  (call,) = items.make_calls(
    work, rows=1, heads=one, kv_heads=one, residues=one
  )
  steps = [items.read_step(call.tables, 0, item, 0, 1) for item in range(7)]
  assert [step.q_tile for step in steps] == [0, 1, 1, 1, 2, 2, 2]
  assert [step.near_tile for step in steps] == [3, 3, 3, 4, 4, 4, 9]
  assert [step.far_tile for step in steps] == [5, 5, 6, 6, 6, 6, 6]
  first = [bool(step.flags & items.FIRST) for step in steps]
  last = [bool(step.flags & items.LAST) for step in steps]
  assert first == [True, True, False, False, True, False, False]
  assert last == [True, False, False, True, False, False, True]


def test_largest_numbers_survive_packing():
  most_q = items.MAX_Q_TILES - 1
  most_kv = items.MAX_KV_TILES - 1
  work = items.Worklist(
    visits([most_q], [most_kv], [0], [0]),
    rows=np.asarray([32767]),
    outputs=np.zeros(1),
    kept=np.ones((1, 32, 2), bool),
  )
  heads = np.zeros((32768, 1), int)
  (call,) = items.make_calls(
    work, rows=1, heads=heads, kv_heads=heads, residues=heads
  )
  step = items.read_step(call.tables, 0, 0, 0, 1)
  assert (step.q_tile, step.near_tile) == (most_q, most_kv)
  np.testing.assert_array_equal(call.tables.bits, [-1, -1])


def test_every_strided_visit_is_in_one_call_and_the_lists_are_shared():
  run = StridedHeads(0, 8, local=2, stride=4, residues=(0, 1, 2, 3) * 2)
  layout = Layout(
    run=run,
    block=64,
    is_causal=True,
    tiling=Tiling(block_q=512, block_kv=512),
    q_length=32768,
    kv_length=32768,
    q_offset=0,
    groups=1,
  )
  (call,) = forward_plan(layout).calls
  assert call.rows == 8
  # Two tiles of the window, and what the last query's has left behind.
  far = sum(-(-(512 * tile + 512 - 2 * 64) // 2048) for tile in range(64))
  assert call.items == 2 * 64 - 1 + far


@pytest.mark.slow
def test_heads_whose_sums_are_too_large_take_turns(monkeypatch):
  pattern = strided(0, 1, 2, 3, 0, 1)
  arrays = inputs(70, 96, N=6, K=3)
  calls = []
  add_gradients = implementation.add_gradients
  monkeypatch.setattr(
    implementation,
    "add_gradients",
    lambda *args, **options: calls.append(1) or add_gradients(*args, **options),
  )
  # Two KV heads, then one.
  monkeypatch.setattr(
    implementation, "_MOST_SUMS_BYTES", 4 * arrays[0].size * 2 // 3
  )
  check(pattern, arrays)
  # Near and far, twice.
  assert len(calls) == 4
