"""What only the portable implementation promises, or could get wrong.

The loops are for large problems; here they run small ones, which the default
would treat as one dense tile.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.head_attention import (
  HeadContexts,
  Ranged,
  Strided,
  Table,
  Tiling,
  head_attention,
)
from pallas_kernels.head_attention.xla import dense

BLOCK = 16


@pytest.fixture(autouse=True)
def _loops(monkeypatch):
  monkeypatch.setattr(dense, "_PAIRS", 0)
  # What was traced before does not know of the change.
  jax.clear_caches()


def strided(heads=4, *, local=2, stride=4, block=BLOCK):
  rules = tuple(
    Strided(local=local, stride=stride, residue=head % max(stride, 1))
    for head in range(heads)
  )
  return HeadContexts(block, rules)


def table(heads=4, *, blocks=20, density=0.4):
  rng = np.random.default_rng(0)
  masks = [rng.random((blocks, blocks)) < density for _ in range(heads)]
  return HeadContexts(BLOCK, tuple(map(Table.from_mask, masks)))


def closed(heads=4):
  rules = [
    Strided(local=1, stride=3, residue=1, sinks=2),
    Ranged(near=3, near_stride=2, near_residue=1, far_stride=3, far_residue=0),
  ]
  return HeadContexts(BLOCK, tuple(rules[head % 2] for head in range(heads)))


PATTERNS = {"strided": strided(), "table": table(), "closed": closed()}


def inputs(T, S, *, B=1, N=4, K=2, H=16, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  q = jax.random.normal(keys[0], (B, T, N, H))
  k = jax.random.normal(keys[1], (B, S, K, H))
  v = jax.random.normal(keys[2], (B, S, K, H))
  return q, k, v, jax.random.normal(keys[3], q.shape)


def with_gradients(implementation, q, k, v, d_out, **options):
  """Output, log-sum-exp, dq, dk, dv."""

  def attend(q, k, v):
    return head_attention(
      q, k, v, return_lse=True, implementation=implementation, **options
    )

  (out, lse), pull = jax.vjp(attend, q, k, v)
  return out, lse, *pull((d_out, jnp.ones_like(lse)))


def assert_close(actual, expected):
  for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
    a, e = np.asarray(a), np.asarray(e)
    assert not np.isnan(a).any()
    np.testing.assert_array_equal(np.isinf(a), np.isinf(e))
    finite = np.isfinite(e)
    scale = max(1.0, np.abs(e[finite]).max(initial=0.0))
    limit = (1e-5 if index < 2 else 2e-5) * scale
    assert np.abs(a[finite] - e[finite]).max(initial=0.0) <= limit


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_traced_offset_gives_what_a_static_one_does(kind):
  q, k, v, _ = inputs(40, 300)

  @jax.jit
  def traced(q, k, v, offset):
    return head_attention(
      q, k, v, pattern=PATTERNS[kind], q_offset=offset, implementation="xla"
    )

  for offset in (0, 37, 259):
    static = head_attention(
      q, k, v, pattern=PATTERNS[kind], q_offset=offset, implementation="xla"
    )
    np.testing.assert_allclose(
      traced(q, k, v, jnp.int32(offset)), static, atol=2e-6, rtol=0
    )
  assert traced._cache_size() == 1


@pytest.mark.parametrize("kind", PATTERNS)
def test_decoding_step_by_step_gives_what_one_pass_does(kind):
  length = 90
  q, k, v, _ = inputs(length, length)
  whole = head_attention(q, k, v, pattern=PATTERNS[kind], implementation="xla")

  @jax.jit
  def step(q, k, v, offset):
    return head_attention(
      q, k, v, pattern=PATTERNS[kind], q_offset=offset, implementation="xla"
    )

  for t in (0, 1, 15, 16, 31, 47, 63, 64, 65, 89):
    one = step(q[:, t : t + 1], k, v, jnp.int32(t))
    np.testing.assert_allclose(one, whole[:, t : t + 1], atol=2e-6, rtol=0)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("pattern", "T", "S", "offset"),
  [
    # A window of several tiles, whole ones among them.
    pytest.param(strided(local=70, stride=3), 1500, 1500, 0, id="window"),
    # A block larger than a tile.
    pytest.param(strided(local=1, stride=3, block=1024), 80, 4000, 3900,
                 id="large blocks"),
    # Several whole tiles of the shard, and queries after the last key.
    pytest.param(strided(local=1, stride=1), 300, 1400, 1300, id="dense"),
  ],
)  # fmt: skip
def test_every_kind_of_tile(pattern, T, S, offset):
  given = inputs(T, S)
  options = dict(pattern=pattern, q_offset=offset)
  assert_close(
    with_gradients("xla", *given, **options),
    with_gradients("reference", *given, **options),
  )


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", PATTERNS)
def test_small_tiles_cross_every_boundary(kind):
  given = inputs(150, 300, B=2)
  options = dict(pattern=PATTERNS[kind], q_offset=120, logits_soft_cap=3.0)
  small = Tiling(block_q=8, block_kv=32)
  assert_close(
    with_gradients("xla", *given, tiling=small, **options),
    with_gradients("reference", *given, **options),
  )


@pytest.mark.parametrize("kind", PATTERNS)
def test_what_is_hidden_may_be_huge(kind):
  # The second half belongs to another segment: nobody sees it.
  q, k, v, d_out = inputs(100, 200)
  options = dict(
    pattern=PATTERNS[kind],
    q_offset=100,
    q_segment_ids=jnp.zeros((1, 100), jnp.int32),
    kv_segment_ids=(jnp.arange(200)[None] >= 130).astype(jnp.int32),
  )
  hidden = (jnp.arange(200) >= 130)[None, :, None, None]
  huge = [jnp.where(hidden, 1e30, x) for x in (k, v)]
  small = [jnp.where(hidden, 0.0, x) for x in (k, v)]
  assert_close(
    with_gradients("xla", q, *huge, d_out, **options),
    with_gradients("xla", q, *small, d_out, **options),
  )


def test_a_hidden_future_may_be_huge():
  # Hidden by the tile's mask alone: the keys after the query.
  q, k, v, d_out = inputs(100, 200)
  late = (jnp.arange(200) >= 100)[None, :, None, None]
  options = dict(pattern=strided(), q_offset=0)
  huge = [jnp.where(late, 1e30, x) for x in (k, v)]
  small = [jnp.where(late, 0.0, x) for x in (k, v)]
  assert_close(
    with_gradients("xla", q, *huge, d_out, **options),
    with_gradients("xla", q, *small, d_out, **options),
  )


@pytest.mark.parametrize("kind", PATTERNS)
def test_the_same_bits_twice(kind):
  given = inputs(200, 200)
  call = jax.jit(
    lambda *arrays: with_gradients("xla", *arrays, pattern=PATTERNS[kind])
  )
  for first, second in zip(call(*given), call(*given), strict=True):
    np.testing.assert_array_equal(first, second)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  "pattern",
  [
    pytest.param(strided(block=64, local=8, stride=8), id="strided"),
    pytest.param(
      HeadContexts(64, (Strided(local=2, stride=8, sinks=1),) * 4),
      id="closed form",
    ),
  ],
)
def test_memory_is_linear_in_the_length(pattern):
  def temporary_bytes(length):
    arrays = [
      jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
      for heads in (4, 2, 2, 4)
    ]
    call = jax.jit(
      lambda *arrays: with_gradients("xla", *arrays, pattern=pattern)
    )
    compiled = call.lower(*arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary_bytes(2**14), temporary_bytes(2**17)
  # Far below a bit for each pair of tokens, or a byte for each pair of blocks
  # and head on top of the linear part.
  assert long <= 8.5 * short
  assert long < (2**17) ** 2 / 8


def test_a_small_problem_is_one_tile(monkeypatch):
  monkeypatch.setattr(dense, "_PAIRS", 256 * 256)
  jax.clear_caches()
  given = inputs(70, 90, B=2)
  options = dict(pattern=closed(), q_offset=20, logits_soft_cap=2.0)
  call = jax.jit(lambda *a: with_gradients("xla", *a, **options))
  assert "while" not in call.lower(*given).as_text()
  assert_close(call(*given), with_gradients("reference", *given, **options))
