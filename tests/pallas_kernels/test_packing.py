"""Packed layout: every active pair has exactly one row, in order."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import gather_rows, pack, scatter_rows

SHAPES = [(1, 1, 1), (2, 5, 3), (3, 9, 4)]


@st.composite
def masks(draw):
  shape = draw(st.sampled_from(SHAPES))
  density = draw(st.sampled_from([0.0, 0.3, 1.0]))
  noise = draw(hnp.arrays(np.float64, shape, elements=st.floats(0, 1)))
  return noise < density


@hypothesis.given(masks(), st.sampled_from([1, 4, 16]))
def test_rows_are_the_active_pairs_in_order(mask, block_rows):
  batch, length, heads = mask.shape
  packing = pack(jnp.asarray(mask), num_active=heads, block_rows=block_rows)
  row_token = np.asarray(packing.row_token)
  row_head = np.asarray(packing.row_head)
  used = row_token < batch * length
  assert packing.num_rows % block_rows == 0
  np.testing.assert_array_equal(np.asarray(packing.row_valid), used)

  # By head, then sequence, then position: the order of a transposed mask.
  n, b, t = np.nonzero(mask.transpose(2, 0, 1))
  np.testing.assert_array_equal(row_head[used], n)
  np.testing.assert_array_equal(row_token[used], b * length + t)
  np.testing.assert_array_equal(np.asarray(packing.row_batch)[used], b)
  np.testing.assert_array_equal(np.asarray(packing.row_position)[used], t)
  assert (np.asarray(packing.row_position)[~used] == -1).all()

  # A block in use holds rows; blocks after the last one in use do not.
  blocks = used.reshape(-1, block_rows).any(axis=1)
  assert blocks[: int(packing.num_blocks)].all()
  assert not blocks[int(packing.num_blocks) :].any()

  row_of = np.asarray(packing.row_of)
  assert (row_of[~mask] == packing.num_rows).all()
  tokens = np.arange(batch * length).reshape(batch, length, 1)
  expected = np.broadcast_to(tokens, mask.shape)[mask]
  np.testing.assert_array_equal(row_token[row_of[mask]], expected)


def test_the_static_bound_holds_for_the_worst_distribution():
  # One row more than a block in every segment, from two heads a token.
  batch, length, heads, block_rows = 2, 10, 4, 4
  mask = np.zeros((batch, length, heads), bool)
  mask[:, :5, :2] = True
  mask[:, 5:, 2:] = True
  packing = pack(jnp.asarray(mask), num_active=2, block_rows=block_rows)
  assert int(packing.num_blocks) == 16
  assert packing.block_head.shape[0] >= 16
  assert int(packing.row_valid.sum()) == mask.sum()


def test_unused_rows_come_first_in_their_segment():
  packing = pack(jnp.ones((1, 5, 1), bool), num_active=1, block_rows=4)
  assert packing.row_position.tolist()[:8] == [-1, -1, -1, 0, 1, 2, 3, 4]


def test_gather_and_scatter_are_inverse_on_active_pairs():
  mask = np.random.default_rng(0).random((2, 7, 3)) < 0.5
  packing = pack(jnp.asarray(mask), num_active=3, block_rows=4)
  values = jax.random.normal(jax.random.key(0), (2, 7, 3, 2))
  rows = gather_rows(values, packing)
  assert rows.shape == (packing.num_rows, 2)
  assert not np.asarray(rows)[~np.asarray(packing.row_valid)].any()
  kept = np.where(mask[..., None], values, 0)
  np.testing.assert_array_equal(scatter_rows(rows, packing), kept)
  # Its gradient is the scatter, whatever unused rows carry.
  d_rows = jax.random.normal(jax.random.key(1), rows.shape)
  _, pullback = jax.vjp(lambda v: gather_rows(v, packing), values)
  np.testing.assert_array_equal(
    pullback(d_rows)[0], scatter_rows(d_rows, packing)
  )


def test_the_gradient_of_scatter_is_what_jax_derives():
  mask = np.random.default_rng(0).random((2, 7, 3)) < 0.5
  packing = pack(jnp.asarray(mask), num_active=3, block_rows=4)
  rows = jax.random.normal(jax.random.key(0), (packing.num_rows, 2))
  d_values = jax.random.normal(jax.random.key(1), (2, 7, 3, 2))

  def derived(rows):
    return rows.at[packing.row_of].get(mode="fill", fill_value=0)

  gradients = [
    jax.vjp(scatter, rows)[1](d_values)[0]
    for scatter in (lambda rows: scatter_rows(rows, packing), derived)
  ]
  np.testing.assert_array_equal(*gradients)


@pytest.mark.parametrize(
  ("settings", "named"),
  [
    ({"num_active": 4, "block_rows": 4}, "num_active"),
    ({"num_active": -1, "block_rows": 4}, "num_active"),
    ({"num_active": 1, "block_rows": 0}, "block_rows"),
  ],
)
def test_settings_out_of_range_are_refused_by_name(settings, named):
  with pytest.raises(ValueError, match=f"`{named}`"):
    pack(jnp.ones((1, 5, 3), bool), **settings)
