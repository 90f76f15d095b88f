"""Garbage under jit, where nothing looks at values: no read out of bounds.

XLA's own gathers clip their indices, so what is left to show is that garbage
does not spread. The TPU kernel's reads are checked by the interpreter.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import platform
from pallas_kernels.packing import gather_rows, pack, scatter_rows
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import Tiling
from pallas_kernels.routed_projection import project_in, project_out
from pallas_kernels.value_checks import value_checks
from tests import oracles, s2_cases
from tests.routed_cases import FORWARD, draw, picks

N, ROWS = 4, 8
HUGE = np.iinfo(np.int32).max
TILING = Tiling(block_q=ROWS, block_kv=8, block_edge=8)
PATTERN = s2_cases.strided(N, block=4, local=2, stride=2).pattern
STRICT = pltpu.InterpretParams(
  out_of_bounds_reads="raise", uninitialized_memory="nan"
)


def problem():
  """Queries, keys and a packing of two sequences; both have unused rows."""
  arrays = draw(0, T=21, S=26)
  active = picks(0, arrays["q"].shape[:3], 0.6)
  return arrays, pack(active, num_active=N, block_rows=ROWS)


@functools.partial(jax.jit, static_argnames="implementation")
def run(arrays, packing, options, *, implementation):
  """Rows of the output, and the gradients of rows, keys and values."""
  strict = STRICT if implementation == "mosaic_tpu" else False
  rows = gather_rows(arrays["q"], packing)

  def forward(rows, k, v):
    return routed_attention(
      rows,
      k,
      v,
      packing,
      pattern=PATTERN,
      tiling=TILING,
      implementation=implementation,
      **options,
    )

  with platform.interpreting(strict):
    out, pullback = jax.vjp(forward, rows, arrays["k"], arrays["v"])
    return out, *pullback(gather_rows(arrays["d_out"], packing))


def garbage(packing):
  """Packings that `pack` never makes, by what is wrong with them.

  All is well in the first block but where all blocks are wrong.
  """
  rng = np.random.default_rng(0)
  rows, blocks = packing.num_rows, packing.block_head.shape[0]

  def noise(shape):
    return jnp.asarray(rng.integers(-HUGE, HUGE, shape), jnp.int32)

  def late(name):
    old = getattr(packing, name)
    first = old.shape[0] // blocks
    return {name: old.at[first:].set(noise(old.shape[0] - first))}

  for name, changes in {
    "tokens": late("row_token"),
    "heads": late("block_head"),
    "sequences": late("block_batch"),
    "many blocks": {"num_blocks": jnp.int32(HUGE)},
    "negative blocks": {"num_blocks": jnp.int32(-HUGE)},
    "order": {
      "row_token": packing.row_token.at[ROWS:].set(
        jnp.asarray(rng.permutation(np.arange(ROWS, rows)), jnp.int32) % 42
      )
    },
  }.items():
    yield name, dataclasses.replace(packing, **changes)


@pytest.mark.parametrize(
  "implementation",
  [
    "xla",
    pytest.param("reference", marks=pytest.mark.exhaustive),
    pytest.param("mosaic_tpu", marks=pytest.mark.exhaustive),
  ],
)
def test_a_garbage_packing_gives_finite_numbers_and_spares_good_rows(
  implementation,
):
  arrays, packing = problem()
  good = run(arrays, packing, {}, implementation=implementation)
  for name, bad in garbage(packing):
    got = run(arrays, bad, {}, implementation=implementation)
    for array in got:
      assert np.isfinite(array).all(), name
    if implementation == "xla" and name in ("heads", "negative blocks"):
      continue  # Which blocks are whose follows from their order.
    # Rows of the first block, and their gradients.
    for array, expected in zip(got[:2], good[:2], strict=True):
      np.testing.assert_array_equal(array[:ROWS], expected[:ROWS], name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("implementation", ["reference", "xla", "mosaic_tpu"])
def test_queries_far_from_the_keys_read_none_that_are_not_there(
  implementation,
):
  # A strided head's queries after all keys see its share of them still.
  arrays, packing = problem()
  for offset in (40, 10**6, 2**29, HUGE, -HUGE):
    options = {"q_offset": jnp.int32(offset)}
    got = run(arrays, packing, options, implementation=implementation)
    for array in got:
      assert np.isfinite(array).all(), offset


def test_the_tpu_kernel_reads_no_tile_that_is_not_there():
  # Few tiles and forward only: interpreting takes long. Their far tiles are
  # visited while the near part begins after the keys.
  arrays = draw(0, B=1, T=9, S=26)
  active = jnp.ones((1, 9, N), bool).at[:, :, 2:].set(False)
  packing = pack(active, num_active=2, block_rows=ROWS)
  rows = gather_rows(arrays["q"], packing)
  tiling = Tiling(block_q=ROWS, block_kv=16, block_edge=16)

  @functools.partial(jax.jit, static_argnums=1)
  def attend(offset, implementation):
    with platform.interpreting(STRICT):
      return routed_attention(
        rows,
        arrays["k"],
        arrays["v"],
        packing,
        pattern=PATTERN,
        q_offset=offset,
        tiling=tiling,
        implementation=implementation,
      )

  got, expected = (
    attend(jnp.int32(10**6), name) for name in ("mosaic_tpu", "reference")
  )
  assert np.abs(expected).max() > 0.1
  oracles.assert_close(got, expected, FORWARD)


def test_too_many_heads_lose_pairs_and_corrupt_none():
  # Room for one head a token, and all of them active.
  arrays, _ = problem()
  mask = jnp.ones(arrays["q"].shape[:3], bool)

  @jax.jit
  def layer(mask):
    packing = pack(mask, num_active=1, block_rows=ROWS)
    rows = gather_rows(arrays["q"], packing)
    # Each head's rows end up in columns of their own.
    apart = np.zeros((N, 8, N * 8), np.float32)
    for n in range(N):
      apart[n, :, n * 8 : (n + 1) * 8] = np.eye(8)
    out = project_out(rows, jnp.asarray(apart), packing)
    again = project_in(out, jnp.asarray(apart.transpose(2, 0, 1)), packing)
    return packing, out, scatter_rows(again, packing)

  packing, out, again = layer(mask)
  kept = np.asarray(packing.row_of) < packing.num_rows
  assert 0.2 < kept.mean() < 0.8
  assert int(packing.num_blocks) == packing.block_head.shape[0]
  expected = np.where(kept[..., None], arrays["q"], 0)
  np.testing.assert_array_equal(out.reshape(arrays["q"].shape), expected)
  np.testing.assert_array_equal(again, expected)


def test_packings_that_pack_did_not_make_are_told():
  arrays, packing = problem()
  rows = gather_rows(arrays["q"], packing)

  def attend(packing):
    return routed_attention(rows, arrays["k"], arrays["v"], packing)

  checked = checkify.checkify(jax.jit(attend), errors=checkify.user_checks)
  for name, index, value in (
    ("row_token", (5,), 99),
    ("row_token", (7,), -1),
    ("row_of", (1, 2, 3), -4),
    ("block_head", (2,), N),
    ("block_batch", (0,), -1),
    ("num_blocks", (), 3),
  ):
    wrong = getattr(packing, name).at[index].set(value)
    bad = dataclasses.replace(packing, **{name: wrong})
    with pytest.raises(ValueError, match="`packing.") as told:
      attend(bad)
    message = str(told.value)
    assert message.startswith(f"`packing.{name}` must be what `pack` makes")
    assert f"got {value}" in message
    with value_checks():
      error, _ = checked(bad)
    assert error.get().startswith(message)
  with value_checks():
    error, _ = checked(packing)
  assert error.get() is None


def test_pack_tells_the_token_with_too_many_heads():
  mask = jnp.zeros((2, 5, N), bool).at[1, 3].set(True)
  with pytest.raises(ValueError, match=r"`mask` must .* got 4 at \[1, 3\]\."):
    pack(mask, num_active=3, block_rows=4)
  with pytest.raises(TypeError, match="`mask` must be bool, got int32"):
    pack(mask.astype(jnp.int32), num_active=4, block_rows=4)
