"""Rules: closed forms against the paper's formula; hashing; lengths."""

import itertools

import hypothesis
import hypothesis.strategies as st
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
from tests import oracles_s2


def mask_of(rule, rows, columns):
  """What a rule keeps, asked one pair of blocks at a time."""
  return np.array(
    [[bool(rule.keep(i, j)) for j in range(columns)] for i in range(rows)]
  )


def test_the_papers_rows():
  # 8 blocks, window 2, stride 3, one residue for all heads.
  rule = Strided(local=2, stride=3, residue=0)
  rows = ["0", "01", "012", "023", "034", "0345", "0356", "0367"]
  for i, row in enumerate(rows):
    kept = [j for j in range(8) if rule.keep(i, j)]
    assert kept == [int(j) for j in row], f"row {i}"


@hypothesis.given(
  local=st.integers(1, 6), stride=st.integers(1, 9), offset=st.integers(0, 9)
)
def test_strided_is_the_papers_formula(local, stride, offset):
  rule = Strided(local=local, stride=stride, residue=-offset % stride)
  expected = oracles_s2.strided_blocks(
    1, 20, 23, local=local, stride=stride, offset=offset
  )
  np.testing.assert_array_equal(mask_of(rule, 20, 23), expected[0])


@hypothesis.given(local=st.integers(1, 6), sinks=st.integers(0, 6))
def test_window_with_sinks(local, sinks):
  rule = Strided(local=local, sinks=sinks)
  expected = oracles_s2.window_blocks(1, 15, 18, local=local, sinks=sinks)
  np.testing.assert_array_equal(mask_of(rule, 15, 18), expected[0])


def test_sinks_join_a_stride():
  rule = Strided(local=2, stride=4, residue=3, sinks=2)
  expected = oracles_s2.strided_blocks(1, 16, 16, local=2, stride=4, offset=1)
  expected |= oracles_s2.window_blocks(1, 16, 16, local=2, sinks=2)
  np.testing.assert_array_equal(mask_of(rule, 16, 16), expected[0])


@hypothesis.given(
  near=st.integers(0, 6),
  strides=st.tuples(st.integers(1, 5), st.integers(1, 5)),
  head=st.integers(0, 4),
)
def test_ranged_is_two_strides(near, strides, head):
  near_stride, far_stride = strides
  rule = Ranged(
    near=near,
    near_stride=near_stride,
    near_residue=head % near_stride,
    far_stride=far_stride,
    far_residue=head % far_stride,
  )
  expected = oracles_s2.context_range_blocks(
    17,
    19,
    near=near,
    near_stride=near_stride,
    far_stride=far_stride,
    near_residues=(head % near_stride,),
    far_residues=(head % far_stride,),
  )
  np.testing.assert_array_equal(mask_of(rule, 17, 19), expected[0])


def test_near_stride_one_is_strided():
  ranged = Ranged(
    near=3, near_stride=1, near_residue=0, far_stride=4, far_residue=2
  )
  strided = Strided(local=3, stride=4, residue=2)
  np.testing.assert_array_equal(
    mask_of(ranged, 20, 20), mask_of(strided, 20, 20)
  )


@hypothesis.given(
  rows=st.integers(1, 11), columns=st.integers(1, 11), seed=st.integers(0, 99)
)
def test_tables_give_their_mask_back(rows, columns, seed):
  mask = np.random.default_rng(seed).random((rows, columns)) < 0.5
  rule = Table.from_mask(mask)
  np.testing.assert_array_equal(rule.mask(), mask)
  np.testing.assert_array_equal(mask_of(rule, rows, columns), mask)


def test_tables_take_one_bit_an_entry():
  rule = Table.from_mask(np.ones((256, 256), bool))
  assert len(rule.bits) == 256 * 256 // 8


RULES = (
  Strided(local=2, stride=3, residue=1),
  Strided(local=3, sinks=2),
  Ranged(near=2, near_stride=2, near_residue=1, far_stride=3, far_residue=0),
  Table.from_mask(np.random.default_rng(0).random((20, 24)) < 0.5),
)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_block_masks_are_windows_into_the_rule(rule):
  pattern = HeadContexts(4, (rule,))
  whole = mask_of(rule, 20, 24)
  for rows, columns in (
    (range(20), range(24)),
    (range(3, 9), range(2, 17)),
    (range(7, 8), range(1)),
  ):
    mask = pattern.block_mask(rule, rows, columns)
    assert mask.dtype == bool
    np.testing.assert_array_equal(
      mask, whole[rows.start : rows.stop, columns.start : columns.stop]
    )


@pytest.mark.parametrize("rule", RULES[:3], ids=repr)
def test_closed_forms_take_traced_positions(rule):
  i, j = np.arange(20)[:, None], np.arange(24)[None]
  traced = jax.jit(rule.keep)(jnp.asarray(i), jnp.asarray(j))
  np.testing.assert_array_equal(traced, mask_of(rule, 20, 24))


def make_all():
  """Fresh values, equal to those of another call."""
  table = np.random.default_rng(0).random((5, 5)) < 0.5
  rules = (
    Strided(local=2, stride=4, residue=1),
    Strided(local=2, stride=4, residue=2),
    Strided(local=2, stride=4, residue=1, sinks=1),
    Ranged(near=2, near_stride=2, near_residue=1, far_stride=4, far_residue=1),
    Table.from_mask(table),
    Table.from_mask(table.T),
  )
  return [
    *rules,
    *(HeadContexts(8, (rule,)) for rule in rules),
    HeadContexts(8, rules),
    HeadContexts(16, rules),
    HeadContexts(8, rules[::-1]),
    HeadContexts(8, rules, is_causal=False),
  ]


def test_equal_values_hash_alike_and_different_ones_differ():
  first, second = make_all(), make_all()
  for a, b in zip(first, second, strict=True):
    assert a == b and hash(a) == hash(b) and a is not b
  for a, b in itertools.combinations(first, 2):
    assert a != b


def test_tables_of_other_shapes_with_the_same_bits_differ():
  wide = Table.from_mask(np.ones((2, 4), bool))
  tall = Table.from_mask(np.ones((4, 2), bool))
  assert wide.bits == tall.bits and wide != tall


def test_an_equal_pattern_does_not_compile_again():
  traces = []

  def attend(q, pattern):
    traces.append(pattern)
    return head_attention(q, q, q, pattern=pattern, implementation="reference")

  compiled = jax.jit(attend, static_argnames="pattern")
  q = jnp.ones((1, 5, 1, 4))
  for _ in range(2):
    compiled(q, pattern=HeadContexts(8, (Strided(local=1, stride=2),)))
  assert len(traces) == 1


def test_distinct_rules_in_the_order_of_the_heads():
  a, b = Strided(local=1, stride=2, residue=1), Strided(local=1, stride=2)
  pattern = HeadContexts(8, (a, b, a, a, b))
  assert pattern.distinct_rules == (a, b) and pattern.num_heads == 5


def test_lengths_beyond_a_table_are_refused():
  table = Table.from_mask(np.ones((3, 5), bool))
  pattern = HeadContexts(8, (Strided(local=1), table))
  pattern.check_lengths(24, 40)
  with pytest.raises(ValueError, match="`pattern` covers 24 query.*head 1.*25"):
    pattern.check_lengths(25, 40)
  with pytest.raises(ValueError, match="`pattern` covers 40 key.*head 1.*41"):
    pattern.check_lengths(24, 41)


def test_closed_forms_reach_any_length():
  HeadContexts(64, RULES[:3]).check_lengths(1 << 40, 1 << 40)


@pytest.mark.parametrize("offset", [None, 17])
def test_the_door_refuses_lengths_beyond_a_table(offset):
  table = Table.from_mask(np.ones((3, 3), bool))
  pattern = HeadContexts(8, (table,))
  length = 25 if offset is None else 8
  q, k = jnp.ones((1, length, 1, 4)), jnp.ones((1, 24, 1, 4))
  k = k if offset else jnp.ones((1, 25, 1, 4))
  with pytest.raises(ValueError, match="`pattern` covers 24"):
    head_attention(q, k, k, pattern=pattern, q_offset=offset)


def test_the_door_refuses_keys_beyond_a_table_under_traced_offsets():
  # The offset is not known, the number of keys is.
  table = Table.from_mask(np.ones((3, 3), bool))
  pattern = HeadContexts(8, (table,))
  k = jnp.ones((1, 25, 1, 4))
  with pytest.raises(ValueError, match="`pattern` covers 24 key"):
    head_attention(k[:, :1], k, k, pattern=pattern, q_offset=jnp.int32(0))


def q_and_k(heads=2, kv_heads=2):
  return jnp.ones((1, 6, heads, 4)), jnp.ones((1, 6, kv_heads, 4))


PAIR = HeadContexts(8, (Strided(local=1),) * 2)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (
      {"pattern": HeadContexts(8, (Strided(local=1),))},
      "`pattern` is for 1 .*2",
    ),
    ({"logits_soft_cap": 0.0}, "`logits_soft_cap` must be positive, got 0"),
    ({"logits_soft_cap": -1.0}, "`logits_soft_cap` must be positive, got -1"),
    ({"q_offset": -1}, "`q_offset` must not be negative, got -1"),
    ({"q_segment_ids": jnp.zeros((1, 6), jnp.int32)}, "`kv_segment_ids`"),
    ({"kv_segment_ids": jnp.zeros((1, 6), jnp.int32)}, "`q_segment_ids`"),
    ({"sinks": jnp.zeros(3)}, "`sinks`"),
    ({"implementation": "cuda"}, "`implementation`.*'cuda'"),
  ],
)
def test_the_door_refuses_by_name(options, message):
  q, k = q_and_k()
  with pytest.raises(ValueError, match=message):
    head_attention(q, k, k, **{"pattern": PAIR, **options})


def test_the_door_refuses_shapes_by_name():
  q, k = q_and_k()
  three = HeadContexts(8, (Strided(local=1),) * 3)
  for arrays, pattern, message in (
    ((q, k[:, :5], k), PAIR, "`v`"),
    ((q, k[..., :3], k), PAIR, "`k`"),
    ((q[0], k, k), PAIR, "`q`"),
    ((q, k, k[:, :, :1]), PAIR, "`v`"),
    ((jnp.ones((1, 6, 3, 4)), k, k), three, "`k`.*divides.*3.*2"),
    ((jnp.ones((1, 7, 2, 4)), k, k), PAIR, "`q_offset`.*-1"),
  ):
    with pytest.raises(ValueError, match=message):
      head_attention(*arrays, pattern=pattern)


def test_the_door_refuses_mixed_and_integer_types():
  q, k = q_and_k()
  for arrays in (
    (q, k.astype(jnp.bfloat16), k),
    (q, k, k.astype(jnp.bfloat16)),
    (q.astype(jnp.int32), k.astype(jnp.int32), k.astype(jnp.int32)),
  ):
    with pytest.raises(TypeError, match="one floating dtype"):
      head_attention(*arrays, pattern=PAIR)


@pytest.mark.parametrize("size", [0, -8, 3, 48])
def test_sizes_that_are_no_power_of_two_are_refused(size):
  with pytest.raises(ValueError, match=f"`block_size`.*{size}"):
    HeadContexts(size, (Strided(local=1),))
  with pytest.raises(ValueError, match=f"`block_q`.*{size}"):
    Tiling(block_q=size, block_kv=8)
  with pytest.raises(ValueError, match=f"`block_kv`.*{size}"):
    Tiling(block_q=8, block_kv=size)


def test_rules_refuse_what_is_out_of_range():
  with pytest.raises(ValueError, match="`rules`"):
    HeadContexts(8, ())
  good = dict(
    near=1, near_stride=2, near_residue=0, far_stride=3, far_residue=0
  )
  for cls, fields, name in (
    (Strided, dict(local=0), "local"),
    (Strided, dict(local=1, stride=-1), "stride"),
    (Strided, dict(local=1, sinks=-1), "sinks"),
    (Strided, dict(local=1, stride=3, residue=3), "residue"),
    (Strided, dict(local=1, stride=3, residue=-1), "residue"),
    (Strided, dict(local=1, residue=1), "residue"),
    (Ranged, {**good, "near": -1}, "near"),
    (Ranged, {**good, "near_stride": 0}, "near_stride"),
    (Ranged, {**good, "far_stride": 0}, "far_stride"),
    (Ranged, {**good, "near_residue": 2}, "near_residue"),
    (Ranged, {**good, "far_residue": -1}, "far_residue"),
    (Table, dict(rows=0, columns=3, bits=b""), "bits"),
    (Table, dict(rows=3, columns=3, bits=b"1"), "bits"),
  ):
    with pytest.raises(ValueError, match=f"`{name}`"):
      cls(**fields)
  for mask in (np.ones((2, 2)), np.ones(3, bool), np.ones((2, 2, 2), bool)):
    with pytest.raises(ValueError, match="`mask` must be bool"):
      Table.from_mask(mask)
