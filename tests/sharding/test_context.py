"""Attention whose tokens are split over devices, against the float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import UserError
from jaxheads.sharding import axis_size, chunks, context, exchange
from jaxheads.sharding.mesh import MeshShape, make_mesh
from pallas_kernels.head_attention import HeadContexts, Strided, Table
from tests import oracles_s2
from tests.oracles import assert_close
from tests.s2_cases import (
  FORWARD,
  GRADIENT,
  joined,
  random_blocks,
  strided,
  window,
)

H, Hv = 8, 8


def mesh(**axes):
  shape = MeshShape(**axes)
  return make_mesh(shape, jax.devices()[: shape.size])


@functools.lru_cache
def draw(length, heads, kv_heads, batch=1):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  return (
    normal(batch, length, heads, H),
    normal(batch, length, kv_heads, H),
    normal(batch, length, kv_heads, Hv),
    normal(batch, length, heads, Hv),
  )


def attend(arrays, segments=None, *, balanced=True, **options):
  """Output and gradients, all in the tokens' own order."""
  length = arrays[0].shape[1]
  order = np.arange(length)
  if balanced:
    order = chunks.balanced_order(length, axis_size("context"))
  q, k, v, d_out = (jnp.asarray(x[:, order]) for x in arrays)
  ids = {}
  if segments is not None:
    stored = jnp.asarray(segments[:, order])
    ids = {"q_segment_ids": stored, "kv_segment_ids": stored}

  @jax.jit
  def run(q, k, v, d_out):
    out, pullback = jax.vjp(
      lambda *qkv: context.attend(
        *qkv, balanced=balanced, implementation="xla", **ids, **options
      ),
      q,
      k,
      v,
    )
    return out, *pullback(d_out)

  return [np.asarray(x)[:, np.argsort(order)] for x in run(q, k, v, d_out)]


def check(heads, arrays, found, segments=None):
  length = arrays[0].shape[1]
  mask = oracles_s2.token_mask(
    heads.blocks,
    heads.pattern.block_size,
    q_length=length,
    kv_length=length,
    q_offset=0,
    is_causal=heads.pattern.is_causal,
  )[None]
  if segments is not None:
    mask = oracles_s2.with_segments(mask[0], segments, segments)
  q, k, v, d_out = arrays
  options = {"scale": H**-0.5}
  true_out, _ = oracles_s2.attention(q, k, v, mask, **options)
  true = oracles_s2.attention_grads(
    q, k, v, mask, d_out, np.zeros(q.shape[:3]), **options
  )
  assert_close(found[0], true_out, FORWARD, "out")
  for name, actual, expected in zip(
    ("dq", "dk", "dv"), found[1:], true[:3], strict=True
  ):
    assert_close(actual, expected, GRADIENT, name, floor=1.0)


def test_balanced_order_is_a_permutation_of_whole_chunks():
  assert chunks.balanced_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
  assert chunks.balanced_order(6, 1).tolist() == list(range(6))
  order = chunks.balanced_order(64, 8)
  assert sorted(order.tolist()) == list(range(64))
  # Pairs that a causal mask shows, by device: the same everywhere.
  assert len(set((order.reshape(8, 8) + 1).sum(1).tolist())) == 1


REACH = 32  # Blocks of the masks and of the sequences, 8 tokens each.
SHARED = strided(4, num_kv_heads=2, stride=4, local=3, reach=REACH)
OWN = strided(4, stride=4, local=2, reach=REACH)
MIXED = joined(
  window(2, local=5, reach=REACH),
  strided(2, num_kv_heads=1, stride=4, reach=REACH),
)
DENSE = strided(4, local=1, stride=1, reach=REACH)
ANY = random_blocks(4, seed=3, reach=REACH)

long = pytest.mark.exhaustive


@pytest.mark.parametrize(
  ("axes", "heads", "kv_heads", "balanced"),
  [
    pytest.param({"context": 1}, SHARED, 2, True, id="1 device", marks=long),
    pytest.param({"context": 2}, SHARED, 2, True, id="2 devices", marks=long),
    pytest.param({"context": 4}, SHARED, 2, True, id="4 devices", marks=long),
    pytest.param({"context": 4}, SHARED, 2, False, id="4 chunks", marks=long),
    # A chunk is two blocks: the window takes three hops, and heads have
    # chunks in which they keep nothing.
    pytest.param(
      {"context": 8},
      strided(2, stride=2, local=6, reach=REACH),
      2,
      True,
      id="chunk shorter than the window",
    ),
    pytest.param(
      {"context": 8},
      window(2, local=30, reach=REACH),
      2,
      True,
      id="window as long as all",
      marks=long,
    ),
    pytest.param(
      {"context": 2, "heads": 2}, OWN, 4, True, id="own residues on each device"
    ),
    pytest.param(
      {"context": 4, "heads": 2},
      window(4, local=3, reach=REACH),
      2,
      True,
      id="window only",
      marks=long,
    ),
    pytest.param(
      {"fsdp": 2, "context": 2, "heads": 2},
      MIXED,
      2,
      True,
      id="windows and shards on other devices",
      marks=long,
    ),
  ],
)
def test_exchange_is_the_oracles(axes, heads, kv_heads, balanced):
  assert exchange.is_exchangeable(heads.pattern, kv_heads)
  arrays = draw(REACH * 8, heads.pattern.num_heads, kv_heads, 2)
  with jax.set_mesh(mesh(**axes)):
    found = attend(arrays, pattern=heads.pattern, balanced=balanced)
  check(heads, arrays, found)


@pytest.mark.parametrize(
  ("axes", "heads", "kv_heads", "length", "balanced"),
  [
    pytest.param({"context": 4}, DENSE, 4, 40, True, id="dense"),
    pytest.param(
      {"context": 4}, DENSE, 4, 36, False, id="dense, contiguous", marks=long
    ),
    pytest.param({"context": 4}, DENSE, 2, 40, True, id="repeated keys"),
    pytest.param(
      {"context": 2, "heads": 2}, ANY, 4, 100, True, id="a mask each"
    ),
    pytest.param(
      {"data": 2, "context": 2, "heads": 2},
      DENSE,
      2,
      40,
      True,
      id="three axes",
      marks=long,
    ),
  ],
)
def test_all_to_all_is_the_oracles(axes, heads, kv_heads, length, balanced):
  assert not exchange.is_exchangeable(heads.pattern, kv_heads)
  arrays = draw(length, 4, kv_heads, 2)
  with jax.set_mesh(mesh(**axes)):
    found = attend(arrays, pattern=heads.pattern, balanced=balanced)
  check(heads, arrays, found)


@pytest.mark.parametrize("balanced", [True, False])
def test_packed_sequences_stay_apart(balanced):
  """On the road of all patterns, whatever the pattern."""
  arrays = draw(64, 4, 2, 2)
  segments = np.sort(np.random.default_rng(2).integers(0, 3, (2, 64)))
  segments = segments.astype(np.int32)
  with jax.set_mesh(mesh(context=2)):
    found = attend(arrays, segments, pattern=SHARED.pattern, balanced=balanced)
  check(SHARED, arrays, found, segments)


def test_what_is_exchanged():
  def exchanged(*rules, kv_heads=2):
    return exchange.is_exchangeable(HeadContexts(8, rules), kv_heads)

  near, far = Strided(local=2), Strided(local=2, stride=4, residue=1)
  assert exchanged(near, far)
  assert exchanged(far, far, kv_heads=1)
  assert not exchanged(near, far, kv_heads=1)  # One key-value head, two rules.
  assert not exchanged(near, Strided(local=1, stride=1))
  assert not exchanged(near, Strided(local=2, sinks=1))
  assert not exchanged(far, Strided(local=2, stride=8, residue=1))
  assert not exchanged(near, Table.from_mask(np.ones((4, 4), bool)))


@pytest.mark.parametrize(
  ("axes", "heads", "kv_heads", "length", "message"),
  [
    (
      {"context": 2},
      SHARED,
      2,
      200,
      "context=2 needs sequences whose length is a multiple of 128, got 200 "
      "tokens; the nearest is 256",
    ),
    (
      {"context": 4},
      DENSE,
      4,
      44,
      "multiple of 8, got 44 tokens; the nearest is 48",
    ),
    (
      {"context": 8},
      DENSE,
      4,
      64,
      r"context=8 with heads=1 does not divide the 4 query heads \(4 key-value "
      r"heads\).*the nearest that does is context=4",
    ),
    (
      {"context": 2, "heads": 4},
      DENSE,
      2,
      64,
      "heads=4 does not divide the model's 2 key-value heads",
    ),
  ],
)
def test_refuses_what_does_not_split(axes, heads, kv_heads, length, message):
  q, k, v, _ = draw(length, 4, kv_heads)
  with jax.set_mesh(mesh(**axes)), pytest.raises(UserError, match=message):
    context.attend(q, k, v, pattern=heads.pattern, balanced=True)


def test_order_of_a_length_that_does_not_split():
  with pytest.raises(UserError, match="context=4.*of 8, got 20.*nearest is 16"):
    chunks.balanced_order(20, 4)


@pytest.mark.parametrize(
  "heads",
  [
    pytest.param(DENSE, id="dense"),
    pytest.param(OWN, id="a residue each", marks=long),
  ],
)
def test_heads_that_are_off_are_not_computed(heads):
  """The others are as if all were, whatever the road of those would be."""
  arrays = draw(64, 4, 4, 2)
  active = np.random.default_rng(5).random((2, 64, 4)) < 0.5
  active[..., 0] = True
  active[..., 3] &= ~active[..., 1:3].all(-1)  # Three of four at the most.
  order = chunks.balanced_order(64, 2)
  arrays = (*arrays[:3], np.where(active[..., None], arrays[3], 0))
  with jax.set_mesh(mesh(context=2, heads=2)):
    found = attend(
      arrays,
      pattern=heads.pattern,
      active=jnp.asarray(active[:, order]),
      num_active=3,
    )
  assert not found[0][~active].any()
  with jax.set_mesh(mesh(context=1)):
    every = attend(arrays, pattern=heads.pattern)
  check(heads, arrays, every)
  found[0] = np.where(active[..., None], found[0], every[0])
  check(heads, arrays, found)
