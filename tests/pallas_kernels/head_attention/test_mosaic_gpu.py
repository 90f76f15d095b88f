"""The Mosaic GPU kernel without a GPU: what it fetches, what it refuses.

JAX from 0.12 on interprets it, with barriers, asynchronous copies and tensor
memory; what the hardware makes of it, `experiments/check_gpu.py` tells.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import platform
from pallas_kernels.head_attention import mosaic_gpu
from pallas_kernels.head_attention.api import head_attention
from pallas_kernels.head_attention.contexts import HeadContexts, Strided
from pallas_kernels.head_attention.mosaic_gpu import chips
from pallas_kernels.head_attention.operands import Operands, Settings
from pallas_kernels.head_attention.tiling import Tiling
from pallas_kernels.head_attention.triton import launches
from pallas_kernels.head_attention.triton.problem import describe
from pallas_kernels.head_attention.triton.walks import Shards
from tests.interpreted_gpus import CHIPS, needs_interpreter

RULE = Strided(local=2, stride=3, residue=1)


def _operands(T=256, S=256, H=64, Hv=None, dtype="bfloat16", segments=None):
  def of(length, size):
    return jax.ShapeDtypeStruct((1, length, 2, size), jnp.dtype(dtype))

  return Operands(of(T, H), of(S, H), of(S, Hv or H), segments, segments, 0)


def _settings(rule=RULE, block=64, **changes):
  values = dict(
    pattern=HeadContexts(block, (rule, rule)),
    scale=1.0,
    logits_soft_cap=None,
    q_offset=0,
    tiling=None,
  )
  return Settings(**{**values, **changes})


@pytest.fixture
def on_blackwell(monkeypatch):
  monkeypatch.setattr(launches, "capability", lambda: "10.0")


@pytest.mark.parametrize("capability", ["9.0", "10.0", "10.3"])
@pytest.mark.parametrize("H", [64, 128, 256])
@pytest.mark.parametrize("block", [16, 64, 256])
def test_covers_strided_heads(monkeypatch, capability, H, block):
  monkeypatch.setattr(launches, "capability", lambda: capability)
  operands = _operands(T=1000, S=1000, H=H)
  assert mosaic_gpu.refusal(_settings(block=block), operands) is None


@pytest.mark.parametrize(
  ("settings", "operands", "message"),
  [
    (_settings(Strided(local=2, sinks=1)), _operands(), "sinks"),
    (_settings(), _operands(dtype="float32"), "float32"),
    (_settings(), _operands(H=96), "64, 128 or 256.*96"),
    (_settings(), _operands(H=64, Hv=128), "64 and 128"),
    (_settings(q_offset=None), _operands(), "`q_offset`"),
    (_settings(block=4), _operands(), "at least 8 tokens.*got 4"),
    (
      _settings(block=16),
      _operands(segments=1),
      "segment ids of 32, got 16",
    ),
    (_settings(), _operands(T=40), "64 queries.*got 40"),
    (_settings(interpret=True), _operands(), "interpreted"),
    (
      _settings(tiling=Tiling(block_q=32, block_kv=64)),
      _operands(),
      "64 or 128 queries.*got 32 x 64",
    ),
    (
      _settings(tiling=Tiling(block_q=128, block_kv=256)),
      _operands(H=256),
      r"shared memory.*block_kv=64\)` fits",
    ),
  ],
)
def test_says_why_it_refuses(settings, operands, message):
  reason = mosaic_gpu.refusal(settings, operands)
  assert reason is not None
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(reason)


@pytest.mark.parametrize(
  ("settings", "operands", "message"),
  [
    (_settings(), _operands(T=100), "128 queries.*got 100"),
    (
      _settings(tiling=Tiling(block_q=64, block_kv=64)),
      _operands(),
      "128 or 256 queries.*got 64 x 64",
    ),
    (
      _settings(tiling=Tiling(block_q=256, block_kv=128)),
      _operands(H=128),
      r"640 columns of tensor memory, of 512.*block_kv=64\)` fits",
    ),
  ],
)
def test_says_why_it_refuses_on_blackwell(
  on_blackwell, settings, operands, message
):
  reason = mosaic_gpu.refusal(settings, operands)
  assert reason is not None
  with pytest.raises(AssertionError, match=message):
    raise AssertionError(reason)


# 12 is Blackwell by name, for desks, without tensor memory.
@pytest.mark.parametrize("capability", ["8.0", "12.0"])
def test_refuses_other_chips(monkeypatch, capability):
  monkeypatch.setattr(launches, "capability", lambda: capability)
  reason = mosaic_gpu.refusal(_settings(), _operands())
  assert reason is not None
  assert "wgmma" in reason
  assert capability in reason


CASES = {
  "strided": dict(groups=2),
  "heads of 128": dict(H=128, groups=2),
  "heads of 256": dict(H=256, T=200, S=300),
  "blocks of 16": dict(block=16, rule=Strided(local=3, stride=4)),
  "blocks of 256": dict(block=256, T=128, S=700),
  "soft cap": dict(logits_soft_cap=2.0, dtype="float16"),
  "dense": dict(rule=Strided(local=1, stride=1), H=128),
  "window": dict(rule=Strided(local=2), T=520, S=520),
  "two runs": dict(groups=2, more=(Strided(local=1, stride=2),)),
  "one warp group": dict(one_group=True),
  "segments": dict(has_segments=True, T=200, S=300),
}


# The others on request: each takes three to nine seconds.
ALWAYS = ("strided", "heads of 256", "blocks of 16", "soft cap", "segments")


@needs_interpreter
@pytest.mark.parametrize(
  "case",
  [
    pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.exhaustive)
    for name in CASES
  ],
)
@pytest.mark.parametrize("capability", CHIPS)
def test_numbers_are_the_references(monkeypatch, capability, case):
  """Also without races: asynchronous reads and writes have their barriers."""
  # Three threads wait for each other: the eight devices of conftest.py make
  # JAX's pool large enough.
  assert jax.device_count() == 8
  params = plgpu.InterpretGPUParams(detect_races=True)
  monkeypatch.setattr(launches, "capability", lambda: capability)
  monkeypatch.setattr(chips, "find", lambda: CHIPS[capability])
  _compare(params, **CASES[case])


@needs_interpreter
@pytest.mark.slow
def test_gradients_are_tritons(on_blackwell):
  """The two passes agree on the output and on the log-sum-exp."""
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
    jax.random.normal(key, (1, 128, 1, 64), jnp.float16) for key in keys
  )
  pattern = HeadContexts(64, (Strided(local=1, stride=2),))

  def loss(name, *operands):
    out, lse = head_attention(
      *operands, pattern=pattern, return_lse=True, implementation=name
    )
    return jnp.sin(out.astype(jnp.float32)).sum() + jnp.sin(lse).sum()

  grad = jax.grad(loss, argnums=(1, 2, 3))
  wanted = grad("reference", q, k, v)
  with platform.interpreting(plgpu.InterpretGPUParams()):
    actual = grad("mosaic_gpu", q, k, v)
  for one, two in zip(actual, wanted, strict=True):
    one, two = (np.asarray(x, np.float32) for x in (one, two))
    np.testing.assert_allclose(one, two, rtol=0, atol=4e-3 * np.abs(two).max())


def _compare(
  params,
  rule=RULE,
  T=256,
  S=256,
  H=64,
  groups=1,
  block=64,
  dtype="bfloat16",
  more=(),
  one_group=False,
  has_segments=False,
  **options,
):
  residues = [head % max(1, rule.stride) for head in range(1, groups + 1)]
  rules = [dataclasses.replace(rule, residue=residue) for residue in residues]
  rules += more
  keys = jax.random.split(jax.random.key(0), 3)
  q = jax.random.normal(keys[0], (1, T, len(rules), H), jnp.dtype(dtype))
  k, v = (
    jax.random.normal(key, (1, S, 1, H), jnp.dtype(dtype)) for key in keys[1:]
  )
  options |= dict(pattern=HeadContexts(block, tuple(rules)))
  if one_group:
    options |= dict(tiling=Tiling(block_q=chips.find().rows, block_kv=64))
  if has_segments:
    # Two packed sequences, the cut inside a tile.
    options |= dict(
      q_segment_ids=(jnp.arange(T) + S - T >= 140)[None].astype(jnp.int32),
      kv_segment_ids=(jnp.arange(S) >= 140)[None].astype(jnp.int32),
    )
  attend = lambda name: head_attention(
    q, k, v, return_lse=True, implementation=name, **options
  )
  wanted, wanted_lse = attend("reference")
  with platform.interpreting(params):
    out, lse = attend("mosaic_gpu")
  eps = float(jnp.finfo(dtype).eps)
  limit = 2 * eps * float(jnp.abs(wanted).max())
  np.testing.assert_allclose(
    np.asarray(out, np.float32), np.asarray(wanted, np.float32), 0, limit
  )
  np.testing.assert_allclose(lse, wanted_lse, rtol=0, atol=1e-5)


def test_is_never_the_default_and_needs_a_gpu():
  q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
  pattern = _settings().pattern
  with pytest.raises(NotImplementedError, match="GPU"):
    head_attention(q, q, q, pattern=pattern, implementation="mosaic_gpu")
  # Named ones are tried too while kernels are interpreted: this one is not.
  with (
    platform.interpreting(),
    pytest.raises(NotImplementedError, match="interpreted"),
  ):
    head_attention(q, q, q, pattern=pattern, implementation="mosaic_gpu")


@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("length", [900, 1024])
def test_boxes_hold_the_keys_of_the_visit(block, length):
  """The copies of a visit bring the positions that its mask is made for."""
  settings = _settings(block=block)
  tiling = Tiling(block_q=128, block_kv=128)
  problem = describe(settings, _operands(T=length, S=length), tiling)
  shards = Shards(problem, local=2, stride=3)
  box = min(block, 128)
  for tile in range(problem.q_tiles):
    visits = shards.visits(jnp.int32(tile), jnp.int32(1), 0)
    queries = np.arange(tile * 128, min((tile + 1) * 128, length))
    seen = np.zeros((queries.size, length), int)
    for visit in range(int(visits.full_count + visits.edge_count)):
      place = visits.place(jnp.int32(visit))
      fetched = np.concatenate(
        [
          int(shards.position(place.token + row, place.stride, place.residue))
          + np.arange(box)
          for row in range(0, 128, box)
        ]
      )
      rows = place.token + jnp.arange(128)
      keys = shards.position(rows, place.stride, place.residue)
      np.testing.assert_array_equal(fetched, keys)
      mask = np.ones((queries.size, 128), bool)
      if visit >= int(visits.full_count):
        mask = np.asarray(
          shards.mask(
            place, jnp.asarray(queries)[:, None], keys[None], jnp.int32(1)
          )
        )
      inside = fetched < length
      assert not mask[:, ~inside].any()
      np.add.at(seen, (slice(None), fetched[inside]), mask[:, inside])
    j = np.arange(length)[None]
    wanted = RULE.keep(queries[:, None] // block, j // block)
    np.testing.assert_array_equal(seen, wanted & (j <= queries[:, None]))
