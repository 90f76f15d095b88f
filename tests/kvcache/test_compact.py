"""Rows hold the kept tokens, in order, and nothing else."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np

from jaxheads.kvcache import compact

K, S, H = 4, 12, 3
SEEDS = st.integers(0, 10_000)


def draw(seed):
  rng = np.random.default_rng(seed)
  keep = rng.random((K, S)) < rng.random((K, 1))
  keep[rng.integers(K)] = keep[rng.integers(K)]  # Often a tie.
  k, v = rng.normal(size=(2, S, K, H)).astype(np.float32)
  # What is not kept may hold anything.
  k, v = (np.where(keep.T[..., None], x, np.nan) for x in (k, v))
  return keep, k, v


def check(packed, keep, k, v, size):
  packed = jax.tree.map(np.asarray, packed)
  lengths = [int(row.sum()) for row in keep]
  order = sorted(range(K), key=lambda head: (-lengths[head], head))
  for slot, head in enumerate(order):
    at = np.flatnonzero(keep[head])[:size]
    n = len(at)
    assert packed.lengths[slot] == lengths[head]
    assert packed.head_of_slot[slot] == head
    assert packed.slot_of_head[head] == slot
    np.testing.assert_array_equal(packed.positions[slot, :n], at)
    np.testing.assert_array_equal(packed.positions[slot, n:], S)
    for got, x in ((packed.k, k), (packed.v, v)):
      np.testing.assert_array_equal(got[slot, :n], x[at, head])
      np.testing.assert_array_equal(got[slot, n:], 0)


pack = jax.jit(compact, static_argnames="size")


@hypothesis.given(seed=SEEDS, size=st.sampled_from([None, 1, 7, 16]))
def test_rows(seed, size):
  keep, k, v = draw(seed)
  packed = pack(keep, k, v, size=size)
  assert packed.k.shape == packed.v.shape == (K, size or S, H)
  check(packed, keep, k, v, size or S)


@hypothesis.given(seed=SEEDS)
@hypothesis.settings(max_examples=5)
def test_slots_are_a_permutation_that_gives_outputs_back(seed):
  keep, k, v = draw(seed)
  packed = pack(keep, k, v)
  q = np.random.default_rng(seed).normal(size=(K, 2, H))
  packed = jax.tree.map(np.asarray, packed)
  by_slot = q[packed.head_of_slot]
  np.testing.assert_array_equal(by_slot[packed.slot_of_head], q)


def test_nothing_and_everything():
  _, k, v = draw(0)
  k, v = np.nan_to_num(k), np.nan_to_num(v)
  for keep in (np.zeros((K, S), bool), np.ones((K, S), bool)):
    check(pack(keep, k, v), keep, k, v, S)


def test_works_in_scan_and_vmap():
  layers = [draw(seed) for seed in range(3)]
  stacked = tuple(np.stack(x) for x in zip(*layers, strict=True))
  _, scanned = jax.lax.scan(lambda _, x: (None, compact(*x)), None, stacked)
  mapped = jax.jit(jax.vmap(compact))(*stacked)
  for r, layer in enumerate(layers):
    for got in (scanned, mapped):
      check(jax.tree.map(lambda x, r=r: x[r], got), *layer, S)
