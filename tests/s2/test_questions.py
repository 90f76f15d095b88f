"""What can be asked of a pattern: efficiency, cache, density, form, cost."""

import json
import tracemalloc
import warnings

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads import s2
from pallas_kernels.head_attention import HeadContexts, Ranged, Strided
from tests import oracles_s2


def block_masks(pattern, blocks):
  mask = np.zeros((pattern.num_heads, blocks, blocks), bool)
  for n, i, j in np.ndindex(mask.shape):
    mask[n, i, j] = pattern.rules[n].keep(i, j)
  return mask


def quiet_strided(*args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return s2.strided(*args, require_union=False, **kwargs)


def some_patterns():
  mask = np.tril(np.random.default_rng(3).random((3, 12, 12)) < 0.4)
  return {
    "strided": s2.strided(4, block_size=8, local_blocks=2, vertical_stride=4),
    "shared": s2.strided(
      4, block_size=8, local_blocks=1, vertical_stride=2, num_kv_heads=2
    ),
    "dense heads": s2.strided(
      4, block_size=8, local_blocks=2, vertical_stride=7, dense_heads=1
    ),
    "window": s2.sliding_window(
      2, block_size=8, local_blocks=2, sink_blocks=1, num_kv_heads=1
    ),
    "dense": s2.dense(2, block_size=8),
    "ranges": s2.context_range(
      2, block_size=8, near_blocks=3, near_stride=2, far_stride=3
    ),
    "mask": s2.from_block_mask(mask, block_size=8),
    "two-sided": s2.from_block_mask(mask, block_size=8, is_causal=False),
  }


@pytest.fixture(params=some_patterns())
def pattern(request):
  return some_patterns()[request.param]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61])
def test_to_dense_is_the_token_mask(pattern, length):
  expected = oracles_s2.token_mask(
    block_masks(pattern, 8),
    8,
    q_length=length,
    kv_length=length,
    q_offset=0,
    is_causal=pattern.is_causal,
  )
  dense = pattern.to_dense(length)
  assert dense.dtype == bool
  np.testing.assert_array_equal(dense, expected)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 61, 96])
def test_density_counts_tokens(pattern, length):
  mask = oracles_s2.token_mask(
    block_masks(pattern, 12),
    8,
    q_length=length,
    kv_length=length,
    q_offset=0,
    is_causal=pattern.is_causal,
  )
  whole = length * (length + 1) / 2 if pattern.is_causal else length**2
  expected = mask.sum() / (pattern.num_heads * whole)
  np.testing.assert_allclose(pattern.density(length), expected, rtol=1e-12)


def test_density_of_a_long_context():
  # nnz by the paper's closed form: 2048 rows, window 16, stride 8.
  pattern = s2.strided(8, local_blocks=16, vertical_stride=8)
  pairs = 0
  for residue in range(8):
    for i in range(2048):
      row = oracles_s2.row_blocks(i, local=16, stride=8, residue=residue)
      pairs += (len(row) - 1) * 64 * 64 + 64 * 65 // 2
  length = 2048 * 64
  expected = pairs / (8 * length * (length + 1) / 2)
  np.testing.assert_allclose(pattern.density(length), expected, rtol=1e-12)


@pytest.mark.parametrize("length", [0, -1])
def test_lengths_below_one_are_refused(pattern, length):
  for ask in (pattern.to_dense, pattern.density, pattern.union_complete):
    with pytest.raises(ValueError, match=f"`length`.*{length}"):
      ask(length)


def test_lengths_beyond_a_mask_are_refused():
  pattern = some_patterns()["mask"]
  for ask in (pattern.to_dense, pattern.density, pattern.union_complete):
    with pytest.raises(ValueError, match="96.*97"):
      ask(97)


def test_strided_patterns_are_kv_efficient():
  for name in ("strided", "shared", "dense heads", "window", "dense"):
    assert some_patterns()[name].kv_efficient(), name
  assert s2.phi3_small().kv_efficient()


@hypothesis.given(
  seed=st.integers(0, 1000), density=st.sampled_from([0.1, 0.9])
)
@hypothesis.settings(max_examples=60)
def test_efficiency_of_any_mask(seed, density):
  mask = np.tril(np.random.default_rng(seed).random((2, 4, 4)) < density)
  pattern = s2.from_block_mask(mask, block_size=8)
  assert pattern.kv_efficient() == oracles_s2.kv_efficient(mask)


@hypothesis.given(
  near=st.integers(0, 5),
  strides=st.tuples(st.integers(1, 6), st.integers(1, 6)),
  head=st.integers(0, 5),
)
@hypothesis.settings(max_examples=100)
def test_efficiency_of_context_ranges(near, strides, head):
  rule = Ranged(
    near=near,
    near_stride=strides[0],
    near_residue=head % strides[0],
    far_stride=strides[1],
    far_residue=head % strides[1],
  )
  pattern = s2.Pattern(8, (rule,))
  assert pattern.kv_efficient() == oracles_s2.kv_efficient(
    block_masks(pattern, 45)
  )


def test_what_comes_back_is_named():
  # Head 1, row 3, column 1: dropped at row 2, wanted again.
  mask = np.tril(np.ones((2, 5, 5), bool))
  mask[1, 2, 1] = False
  pattern = s2.from_block_mask(mask, block_size=8)
  assert not pattern.kv_efficient()
  with pytest.raises(ValueError, match="head 1.*block 1.*row 3"):
    pattern.cache_blocks(3)


@pytest.mark.parametrize(
  ("blocks", "strided_blocks", "phi_blocks"),
  [(128, 30, 72), (2048, 270, 1032)],
  ids=["8K tokens", "128K tokens"],
)
def test_the_published_cache_sizes(blocks, strided_blocks, phi_blocks):
  own = s2.strided(8, block_size=64, local_blocks=16, vertical_stride=8)
  assert own.cache_blocks(blocks - 1) == (strided_blocks,) * 8
  grouped = s2.strided(32, local_blocks=16, vertical_stride=8, num_kv_heads=8)
  assert grouped.cache_blocks(blocks - 1) == (strided_blocks,) * 8
  # A KV head stores the union of its query heads.
  assert s2.phi3_small().cache_blocks(blocks - 1) == (phi_blocks,) * 8


@pytest.mark.parametrize(
  "name", ["strided", "shared", "dense heads", "window", "dense"]
)
def test_the_cache_holds_all_future_reads_and_no_more(name):
  pattern = some_patterns()[name]
  kv_heads = pattern.num_kv_heads or pattern.num_heads
  group = pattern.num_heads // kv_heads
  # Far enough beyond the last row asked for: what is read, is read there.
  mask = block_masks(pattern, 40)
  for i in range(25):
    expected = tuple(
      int(
        oracles_s2.retained_blocks(
          mask[kv_head * group : (kv_head + 1) * group], i
        ).sum()
      )
      for kv_head in range(kv_heads)
    )
    assert pattern.cache_blocks(i) == expected, f"row {i}"


def test_the_cache_of_shared_and_of_sliding_residues():
  options = dict(local_blocks=2, vertical_stride=4, num_kv_heads=2)
  sliding = quiet_strided(8, per_query_head=True, **options)
  # All four shares in each KV head: everything.
  assert sliding.cache_blocks(19) == (20, 20)
  shared = quiet_strided(8, **options)
  assert shared.cache_blocks(19) == (2 + 5, 2 + 4)


def test_rows_outside_of_a_mask_are_refused():
  pattern = s2.from_block_mask(
    np.tril(np.ones((4, 4), bool)), block_size=8, num_heads=2
  )
  assert pattern.cache_blocks(3) == (4, 4)
  for row, message in ((4, "covers 32.*40"), (-1, "`i`.*-1")):
    with pytest.raises(ValueError, match=message):
      pattern.cache_blocks(row)


def test_dicts_give_the_pattern_back(pattern):
  text = json.dumps(pattern.to_dict())
  again = s2.Pattern.from_dict(json.loads(text))
  assert again == pattern and hash(again) == hash(pattern)
  assert again.num_kv_heads == pattern.num_kv_heads
  assert again.is_causal == pattern.is_causal


def test_dicts_of_many_heads_stay_small():
  assert len(json.dumps(s2.phi3_small().to_dict())) < 2000


@pytest.mark.parametrize("missing", ["block_size", "rules", "rule_of_head"])
def test_dicts_that_are_no_pattern_are_refused(missing):
  fields = s2.phi3_small().to_dict()
  del fields[missing]
  with pytest.raises(ValueError, match=missing):
    s2.Pattern.from_dict(fields)


def test_dicts_of_unknown_rules_are_refused():
  fields = s2.phi3_small().to_dict()
  fields["rules"][0] = {"kind": "spiral"}
  with pytest.raises(ValueError, match="spiral"):
    s2.Pattern.from_dict(fields)


def test_patterns_are_head_contexts_and_values():
  first, second = s2.phi3_small(), s2.phi3_small()
  assert isinstance(first, HeadContexts)
  assert first == second and hash(first) == hash(second)
  other = s2.strided(
    32,
    local_blocks=16,
    vertical_stride=8,
    num_kv_heads=8,
    offset=1,
  )
  assert first != other


@pytest.mark.parametrize("kv_heads", [0, 3, 8])
def test_kv_heads_that_do_not_divide_are_refused(kv_heads):
  with pytest.raises(ValueError, match=f"`num_kv_heads`.*4.*{kv_heads}"):
    s2.Pattern(8, (Strided(local=1),) * 4, True, kv_heads)


@pytest.mark.parametrize(
  "make",
  [
    s2.phi3_small,
    lambda: s2.strided(32, local_blocks=16, vertical_stride=32),
    lambda: s2.sliding_window(32, local_blocks=64, sink_blocks=1),
    lambda: s2.dense(32),
    lambda: s2.context_range(32, near_blocks=64, near_stride=2, far_stride=16),
  ],
  ids=["phi3", "strided", "window", "dense", "ranges"],
)
def test_a_pattern_for_128k_tokens_takes_less_than_a_megabyte(make):
  make()  # Imports and caches are not the pattern's.
  length = 128 * 1024
  tracemalloc.start()
  try:
    pattern = make()
    pattern.check_lengths(length, length)
    hash(pattern)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 1e6, f"{peak} bytes"


def test_questions_about_128k_tokens_need_no_square():
  # 2048 x 2048 blocks of 32 heads would be 134 MB.
  pattern = s2.phi3_small()
  pattern.density(4096)
  tracemalloc.start()
  try:
    pattern.density(128 * 1024)
    pattern.union_complete(128 * 1024)
    pattern.cache_blocks(2047)
    pattern.kv_efficient()
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert peak < 32e6, f"{peak} bytes"


def test_plots_have_a_panel_a_head_and_the_union():
  pattern = s2.strided(
    6, block_size=8, local_blocks=2, vertical_stride=3, num_kv_heads=3
  )
  figure = pattern.plot(96)
  axes = [axis for axis in figure.axes if axis.images and axis.get_title()]
  assert len(axes) == len(pattern.distinct_rules) + 1
  masks = block_masks(pattern, 12)
  for axis, head in zip(axes, (0, 2, 4), strict=False):
    np.testing.assert_array_equal(axis.images[0].get_array(), masks[head])
  union = np.ma.filled(axes[-1].images[0].get_array(), 0)
  np.testing.assert_array_equal(union, masks.sum(axis=0))
