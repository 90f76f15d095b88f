"""Ready patterns against the paper's formula, and the traps of its versions."""

import warnings

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads import s2
from pallas_kernels.head_attention import Strided, Table
from tests import oracles_s2

LENGTH_IN_BLOCKS = 30


def block_masks(pattern, blocks=LENGTH_IN_BLOCKS):
  """What the rules keep, asked one pair of blocks at a time."""
  mask = np.zeros((pattern.num_heads, blocks, blocks), bool)
  for n, i, j in np.ndindex(mask.shape):
    mask[n, i, j] = pattern.rules[n].keep(i, j)
  return mask


def columns_of_last_row(pattern, head, blocks=256):
  """The remote blocks that a head's last row keeps."""
  rule = pattern.rules[head]
  i = blocks - 1
  return [j for j in range(i - rule.local) if rule.keep(i, j)]


@st.composite
def strided_arguments(draw):
  num_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
  divisors = [k for k in range(1, num_heads + 1) if num_heads % k == 0]
  num_kv_heads = draw(st.sampled_from([None, *divisors]))
  per_query_head = draw(st.booleans())
  shared = num_kv_heads is not None and not per_query_head
  return num_heads, dict(
    local=draw(st.integers(1, 4)),
    stride=draw(st.integers(1, 9)),
    num_kv_heads=num_kv_heads,
    offset=draw(st.integers(0, 9)),
    step=draw(st.sampled_from([None, 0, 1, 2])),
    sign=draw(st.sampled_from([-1, 1])),
    dense_heads=draw(st.integers(0, num_kv_heads if shared else num_heads)),
    per_query_head=per_query_head,
  )


def build(num_heads, arguments, **more):
  """`s2.strided` with the oracle's names of the arguments."""
  arguments = dict(arguments)
  local, stride = arguments.pop("local"), arguments.pop("stride")
  return s2.strided(
    num_heads,
    block_size=8,
    local_blocks=local,
    vertical_stride=stride,
    **arguments,
    **more,
  )


@hypothesis.given(drawn=strided_arguments())
@hypothesis.settings(max_examples=100)
def test_strided_is_the_formula(drawn):
  num_heads, arguments = drawn
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pattern = build(num_heads, arguments, require_union=False)
  blocks = LENGTH_IN_BLOCKS
  expected = oracles_s2.strided_blocks(num_heads, blocks, blocks, **arguments)
  np.testing.assert_array_equal(block_masks(pattern), expected)


def test_strided_with_every_option_left_out():
  pattern = s2.strided(8, local_blocks=2, vertical_stride=8)
  assert pattern.block_size == 64 and pattern.is_causal
  expected = oracles_s2.strided_blocks(8, 30, 30, local=2, stride=8)
  np.testing.assert_array_equal(block_masks(pattern), expected)


def test_the_papers_rows():
  with pytest.warns(UserWarning, match="1 of the 3"):
    pattern = s2.strided(
      1,
      block_size=4,
      local_blocks=2,
      vertical_stride=3,
      require_union=False,
    )
  rows = ["0", "01", "012", "023", "034", "0345", "0356", "0367"]
  mask = pattern.to_dense(32)[0]
  for i, row in enumerate(rows):
    # The last query of a block sees all of its blocks.
    seen = np.nonzero(mask[4 * i + 3].reshape(8, 4).all(axis=1))[0]
    assert list(seen) == [int(j) for j in row], f"row {i}"


def test_head_0_keeps_other_columns_in_phi3_small():
  official = s2.strided(32, local_blocks=16, vertical_stride=8)
  assert columns_of_last_row(official, 0)[:3] == [0, 8, 16]
  phi = s2.phi3_small()
  assert columns_of_last_row(phi, 0)[:3] == [7, 15, 23]
  assert columns_of_last_row(phi, 1)[:3] == [6, 14, 22]


def test_phi3_small_is_the_published_mask():
  # keep <=> i - j < 16 or (j + h + 1) mod 8 == 0, h the query head.
  phi = s2.phi3_small()
  assert (phi.num_heads, phi.num_kv_heads) == (32, 8)
  assert (phi.block_size, phi.is_causal) == (64, True)
  for head in range(32):
    for i, j in ((40, j) for j in range(45)):
      seen = j <= i and (i - j < 16 or (j + head + 1) % 8 == 0)
      assert bool(phi.rules[head].keep(i, j)) == seen, (head, i, j)
  # A KV head's query heads do not share a residue.
  assert len(set(phi.rules[:4])) == 4


def test_an_offset_moves_the_first_block_to_head_minus_offset():
  # Offset 1, V = 4: block 0 is global in heads 3 and 7, not in head 1.
  pattern = s2.strided(8, local_blocks=1, vertical_stride=4, offset=1)
  owners = [n for n in range(8) if pattern.rules[n].keep(50, 0)]
  assert owners == [3, 7]


def test_the_papers_figure_is_the_mirror_image():
  code = s2.strided(4, local_blocks=1, vertical_stride=4)
  figure = s2.strided(4, local_blocks=1, vertical_stride=4, sign=1)
  residues = [[rule.residue for rule in p.rules] for p in (code, figure)]
  assert residues == [[0, 3, 2, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize(
  ("num_heads", "num_kv_heads", "stride", "step"),
  [
    (4, None, 8, 2),
    (4, None, 9, 2),
    (3, None, 8, 2),
    (8, None, 8, 1),
    (32, None, 8, 1),
    # From the query heads, not the KV heads: 16 // 8 and not 16 // 2.
    (8, 2, 16, 2),
    (32, 8, 16, 1),
  ],
)
def test_the_default_step_comes_from_query_heads(
  num_heads, num_kv_heads, stride, step
):
  options = dict(
    local_blocks=1,
    vertical_stride=stride,
    num_kv_heads=num_kv_heads,
    require_union=False,
  )
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    given = s2.strided(num_heads, step=step, **options)
    default = s2.strided(num_heads, **options)
  assert default == given
  assert (
    default.rules[-1].residue
    == -(((num_kv_heads or num_heads) - 1) * step) % stride
  )


def test_query_heads_of_a_kv_head_share_the_pattern():
  shared = s2.strided(16, local_blocks=2, vertical_stride=4, num_kv_heads=4)
  for kv_head in range(4):
    assert len(set(shared.rules[4 * kv_head : 4 * kv_head + 4])) == 1
  assert len(set(shared.rules)) == 4


def is_dense(rule):
  return all(rule.keep(i, j) for i in range(30) for j in range(i + 1))


def test_dense_heads_are_the_last_ones():
  pattern = s2.strided(6, local_blocks=1, vertical_stride=4, dense_heads=2)
  assert [is_dense(rule) for rule in pattern.rules] == [False] * 4 + [True] * 2


def test_dense_heads_are_counted_in_kv_heads():
  options = dict(
    local_blocks=1, vertical_stride=3, num_kv_heads=4, dense_heads=1
  )
  shared = s2.strided(8, **options)
  assert [is_dense(rule) for rule in shared.rules] == [False] * 6 + [True] * 2
  alone = s2.strided(8, per_query_head=True, **options)
  assert [is_dense(rule) for rule in alone.rules] == [False] * 7 + [True]


def test_stride_one_is_dense():
  pattern = s2.strided(3, local_blocks=2, vertical_stride=1)
  assert pattern.to_dense(20).all(axis=0).sum() == 20 * 21 // 2
  assert s2.dense(3).to_dense(20).all(axis=0).sum() == 20 * 21 // 2


def test_sliding_windows():
  pattern = s2.sliding_window(2, block_size=4, local_blocks=3, sink_blocks=1)
  expected = oracles_s2.window_blocks(2, 12, 12, local=3, sinks=1)
  np.testing.assert_array_equal(block_masks(pattern, 12), expected)
  plain = s2.sliding_window(1, local_blocks=3)
  expected = oracles_s2.window_blocks(1, 12, 12, local=3)
  np.testing.assert_array_equal(block_masks(plain, 12), expected)
  assert plain.block_size == 64


def test_context_ranges():
  pattern = s2.context_range(
    6, block_size=4, near_blocks=4, near_stride=2, far_stride=3
  )
  expected = oracles_s2.context_range_blocks(
    25,
    25,
    near=4,
    near_stride=2,
    far_stride=3,
    near_residues=[head % 2 for head in range(6)],
    far_residues=[head % 3 for head in range(6)],
  )
  np.testing.assert_array_equal(block_masks(pattern, 25), expected)
  # Head 1 does not see its own first block: an empty row.
  assert not expected[1, 0].any()
  assert pattern.union_complete()
  assert not pattern.kv_efficient()


def test_context_ranges_of_near_stride_one_are_strided():
  ranged = s2.context_range(
    4, near_blocks=3, near_stride=1, far_stride=4, offset=1
  )
  strided = s2.strided(4, local_blocks=3, vertical_stride=4, offset=1, sign=1)
  np.testing.assert_array_equal(block_masks(ranged), block_masks(strided))
  assert ranged.kv_efficient()


def test_context_ranges_share_a_pattern_in_a_group():
  pattern = s2.context_range(
    4, near_blocks=2, near_stride=1, far_stride=2, num_kv_heads=2
  )
  assert pattern.rules[0] == pattern.rules[1] != pattern.rules[2]
  assert pattern.rules[2] == pattern.rules[3]


@pytest.mark.parametrize("is_causal", [True, False])
def test_block_masks_of_your_own(is_causal):
  mask = np.random.default_rng(0).random((4, 6, 6)) < 0.5
  pattern = s2.from_block_mask(mask, block_size=4, is_causal=is_causal)
  tokens = oracles_s2.token_mask(
    mask, 4, q_length=23, kv_length=23, q_offset=0, is_causal=is_causal
  )
  np.testing.assert_array_equal(pattern.to_dense(23), tokens)


def test_block_masks_for_kv_heads_and_for_all_heads():
  mask = np.random.default_rng(0).random((2, 5, 5)) < 0.5
  groups = s2.from_block_mask(mask, block_size=4, num_heads=6)
  np.testing.assert_array_equal(
    groups.to_dense(20),
    s2.from_block_mask(mask.repeat(3, axis=0), block_size=4).to_dense(20),
  )
  assert groups.num_kv_heads == 2
  same = s2.from_block_mask(mask[0], block_size=4, num_heads=3)
  assert same.num_heads == 3 and len(same.distinct_rules) == 1


@pytest.mark.parametrize(
  ("mask", "options", "named"),
  [
    (np.ones((2, 3, 3)), {}, "`mask`.*bool"),
    (np.ones((2, 3, 3), np.uint8), {}, "`mask`.*bool"),
    (np.ones(3, bool), {}, "`mask`"),
    (np.ones((1, 2, 3, 3), bool), {}, "`mask`"),
    (np.ones((0, 3, 3), bool), {}, "`mask`"),
    (np.ones((2, 0, 3), bool), {}, "`mask`"),
    (np.ones((3, 3), bool), {}, "`num_heads`"),
    (np.ones((2, 3, 3), bool), {"num_heads": 3}, "`num_heads`"),
    (np.ones((2, 3, 3), bool), {"num_heads": 1}, "`num_heads`"),
    (np.ones((2, 3, 3), bool), {"num_heads": 0}, "`num_heads`"),
    (np.ones((2, 3, 3), bool), {"block_size": 12}, "`block_size`"),
  ],
)
def test_block_masks_that_do_not_fit_are_refused(mask, options, named):
  with pytest.raises(ValueError, match=named):
    s2.from_block_mask(mask, **{"block_size": 8, **options})


@pytest.mark.parametrize(
  ("num_heads", "options", "named"),
  [
    (0, {}, "`num_heads`"),
    (8, {"local_blocks": 0}, "`local_blocks`"),
    (8, {"vertical_stride": 0}, "`vertical_stride`"),
    (8, {"num_kv_heads": 3}, "`num_kv_heads`"),
    (8, {"num_kv_heads": 0}, "`num_kv_heads`"),
    (8, {"sign": 0}, "`sign`"),
    (8, {"dense_heads": -1}, "`dense_heads`"),
    (8, {"dense_heads": 9}, "`dense_heads`.*8"),
    (8, {"dense_heads": 3, "num_kv_heads": 2}, "`dense_heads`.*2"),
    (8, {"block_size": 48}, "`block_size`"),
  ],
)
def test_arguments_out_of_range_are_refused_by_name(num_heads, options, named):
  arguments = {"local_blocks": 2, "vertical_stride": 4, **options}
  with pytest.raises(ValueError, match=named):
    s2.strided(num_heads, **arguments)


COMPLETE = [
  dict(num_heads=32, vertical_stride=8),
  dict(num_heads=8, num_kv_heads=8, vertical_stride=8),
  dict(num_heads=32, num_kv_heads=8, vertical_stride=8),
  dict(num_heads=32, num_kv_heads=8, vertical_stride=8, per_query_head=True),
  dict(num_heads=32, num_kv_heads=4, vertical_stride=8, per_query_head=True),
  dict(num_heads=4, vertical_stride=8, dense_heads=1),
  dict(num_heads=3, vertical_stride=1),
  dict(num_heads=8, vertical_stride=8, sign=1),
  dict(num_heads=5, vertical_stride=5, step=2),
]
INCOMPLETE = [
  # (arguments, shares that are owned)
  (dict(num_heads=32, num_kv_heads=4, vertical_stride=8), 4),
  (dict(num_heads=32, num_kv_heads=8, vertical_stride=16), 8),
  (dict(num_heads=3, vertical_stride=8), 3),
  (dict(num_heads=4, vertical_stride=8), 4),
  (dict(num_heads=8, vertical_stride=8, step=0), 1),
  (dict(num_heads=8, vertical_stride=8, step=2), 4),
]


@pytest.mark.parametrize("arguments", COMPLETE, ids=str)
def test_unions_that_are_complete(arguments):
  pattern = s2.strided(**arguments, local_blocks=2)
  assert pattern.union_complete()
  assert pattern.union_complete(64 * 60)
  assert oracles_s2.union_complete(block_masks(pattern))


@pytest.mark.parametrize(("arguments", "owned"), INCOMPLETE, ids=str)
def test_unions_that_are_not(arguments, owned):
  stride = arguments["vertical_stride"]
  said = f"{owned} of the {stride}.*`vertical_stride`.*{owned}"
  with pytest.raises(ValueError, match=said):
    s2.strided(**arguments, local_blocks=2)
  with pytest.warns(UserWarning, match=said):
    pattern = s2.strided(**arguments, local_blocks=2, require_union=False)
  assert not pattern.union_complete()
  mask = block_masks(pattern)
  assert not oracles_s2.union_complete(mask)
  # Short sequences are seen whole: all of them lies in the window.
  assert pattern.union_complete(64 * 2)
  assert not pattern.union_complete(64 * (2 + stride))


@hypothesis.given(drawn=strided_arguments())
@hypothesis.settings(max_examples=60)
def test_unions_of_any_arguments(drawn):
  num_heads, arguments = drawn
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pattern = build(num_heads, arguments, require_union=False)
  mask = block_masks(pattern)
  assert pattern.union_complete() == oracles_s2.union_complete(mask)
  blocks = 6
  assert pattern.union_complete(8 * blocks) == oracles_s2.union_complete(
    mask[:, :blocks, :blocks]
  )


@hypothesis.given(
  heads=st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from([0, 2, 3]), st.integers(0, 5)),
    min_size=1,
    max_size=3,
  )
)
@hypothesis.settings(max_examples=150)
def test_unions_of_windows_and_first_blocks(heads):
  # Windows, strides and sinks of several heads: gaps may show late only.
  rules = tuple(
    Strided(local=local, stride=stride, sinks=sinks)
    for local, stride, sinks in heads
  )
  pattern = s2.Pattern(8, rules)
  assert pattern.union_complete() == oracles_s2.union_complete(
    block_masks(pattern, 40)
  )


def test_a_window_with_first_blocks_leaves_a_gap():
  pattern = s2.sliding_window(1, block_size=8, local_blocks=3, sink_blocks=3)
  assert pattern.union_complete(8 * 6)
  assert not pattern.union_complete(8 * 7)
  assert not pattern.union_complete()


def test_unions_of_block_masks():
  whole = np.tril(np.ones((4, 4), bool))
  first, second = whole.copy(), whole.copy()
  first[3, 1] = second[2, 0] = False
  both = s2.from_block_mask(np.stack([first, second]), block_size=8)
  assert both.union_complete()
  first[2, 0] = False
  neither = s2.from_block_mask(np.stack([first, second]), block_size=8)
  assert not neither.union_complete()
  assert neither.union_complete(8 * 2)
  # Without causality all of the square counts.
  two_sided = s2.from_block_mask(whole[None], block_size=8, is_causal=False)
  assert not two_sided.union_complete()


def test_rules_are_tables_only_where_they_must_be():
  for pattern in (
    s2.phi3_small(),
    s2.dense(4),
    s2.sliding_window(2, local_blocks=2, sink_blocks=1),
  ):
    assert not any(isinstance(rule, Table) for rule in pattern.rules)
