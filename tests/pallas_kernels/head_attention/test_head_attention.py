"""Every implementation of head attention against the float64 oracle.

One suite for all of them. The kernels for accelerators run interpreted.
"""

import contextlib
import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.head_attention import (
  HeadContexts,
  Strided,
  Table,
  Tiling,
  head_attention,
)
from tests import oracles, oracles_s2, s2_cases
from tests.s2_cases import (
  CASES,
  LONG,
  TILES,
  Case,
  check,
  check_values,
  draw,
  named,
  random_blocks,
  ranged,
  run,
  strided,
  window,
)

COMPILED = ("reference", "xla")
INTERPRETED = ("mosaic_tpu", "triton")
IMPLEMENTATIONS = COMPILED + INTERPRETED

# What an interpreted kernel is asked in the quick run: each of them meets
# another part of the code. The rest is marked slow.
QUICK = {
  "last queries, off the block",
  "queries after the last key",
  "context ranges, empty rows",
  "residues differ inside a group",
  "everything at once",
  "tiles below a block",
}


def refused(name, case):
  """What an implementation says that it does not cover, if anything."""
  if name == "mosaic_tpu" and (case.H % 8 or case.Hv % 8):
    return "head size that is a multiple of 8"
  return None


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
  with running(request.param):
    yield request.param


@pytest.fixture(
  params=[
    *COMPILED,
    *(pytest.param(name, marks=pytest.mark.exhaustive) for name in INTERPRETED),
  ]
)
def each_in_time(request):
  """Every implementation; slow for those whose kernels are interpreted."""
  with running(request.param):
    yield request.param


@contextlib.contextmanager
def running(implementation):
  """Kernels for accelerators run interpreted, the others as they are."""
  if implementation in INTERPRETED:
    with platform.interpreting():
      yield
  else:
    yield


def each_case():
  params = []
  for name in IMPLEMENTATIONS:
    for case in CASES:
      if name == "reference" and case in TILES + LONG:
        continue  # It has no tiles.
      slow = name in INTERPRETED and case.name not in QUICK
      marks = [pytest.mark.exhaustive] if slow else []
      params.append(
        pytest.param(name, case, marks=marks, id=f"{name}-{case.name}")
      )
  return params


@pytest.mark.parametrize(("name", "case"), each_case())
def test_values_and_gradients_are_the_oracles(name, case):
  with running(name):
    if reason := refused(name, case):
      with pytest.raises(NotImplementedError, match=reason):
        check(case, name)
      return
    inputs, first = check(case, name)
    second = run(case, inputs, name)
  for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
    np.testing.assert_array_equal(a, b, "two runs must give the same bits")


@st.composite
def cases(draw_from, name):
  """Calls of any kind; a new pattern is a new compilation."""
  heads = draw_from(st.sampled_from([1, 2, 3, 4, 6, 8]))
  divisors = [g for g in (1, 2, 4, 8) if heads % g == 0]
  groups = draw_from(st.sampled_from(divisors))
  block = draw_from(st.sampled_from([8, 16]))
  seed = draw_from(st.integers(0, 1000))
  kind = draw_from(st.sampled_from(["strided", "window", "any", "ranged"]))
  if kind == "strided":
    pattern = strided(
      heads,
      block=block,
      local=draw_from(st.integers(1, 4)),
      stride=draw_from(st.integers(1, 9)),
      num_kv_heads=heads // groups,
      offset=draw_from(st.integers(0, 8)),
      dense_heads=draw_from(st.integers(0, 1)),
      per_query_head=draw_from(st.booleans()),
    )
  elif kind == "window":
    sinks = draw_from(st.integers(0, 2))
    pattern = window(heads, block=block, local=2, sinks=sinks)
  elif kind == "any":
    causal = draw_from(st.booleans())
    density = draw_from(st.sampled_from([0.1, 0.5, 0.9]))
    pattern = random_blocks(
      heads, seed=seed, density=density, causal=causal, block=block
    )
  else:
    pattern = ranged(
      [head % 2 for head in range(heads)],
      [head % 3 for head in range(heads)],
      near=draw_from(st.integers(0, 4)),
      near_stride=2,
      far_stride=3,
    )
  T = draw_from(st.sampled_from([1, 7, 31, 47, 71]))
  S = draw_from(st.sampled_from([3, 31, 64, 97]))
  q_offset = draw_from(st.sampled_from([0, 5, 16, 30]))
  sizes = [(8, 8), (8, 16), (24, 8), (3, 5)]
  H, Hv = draw_from(st.sampled_from(sizes[: 3 if name == "mosaic_tpu" else 4]))
  return Case(
    name="drawn",
    heads=pattern,
    T=T,
    S=S,
    K=heads // groups,
    H=H,
    Hv=Hv,
    q_offset=q_offset,
    sinks=(0.5,) * heads if draw_from(st.booleans()) else None,
    segments=draw_from(st.sampled_from([None, None, "packed", "strangers"])),
    soft_cap=draw_from(st.sampled_from([None, None, 2.0])),
    tiling=draw_from(st.sampled_from([(16, 16), (32, 16), (16, 32)])),
  )


@pytest.mark.parametrize(
  ("name", "examples"),
  [
    pytest.param("reference", 4),
    pytest.param("xla", 6),
    pytest.param("mosaic_tpu", 10, marks=pytest.mark.exhaustive),
    pytest.param("triton", 10, marks=pytest.mark.exhaustive),
  ],
)
def test_any_call_is_the_oracles(name, examples):
  profile = hypothesis.settings.default

  @hypothesis.settings(
    max_examples=max(1, examples * profile.max_examples // 30),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
  )
  @hypothesis.given(case=cases(name))
  def sweep(case):
    check(case, name)

  with running(name):
    sweep()


def dense_causal(q, k, v):
  group = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
  mask = jnp.tril(jnp.ones((q.shape[1], k.shape[1]), bool))
  logits = jnp.einsum("btnh,bsnh->bnts", q, k) * q.shape[-1] ** -0.5
  weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
  return jnp.einsum("bnts,bsnh->btnh", weights, v)


def normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def test_all_options_left_out(implementation):
  # Defaults: scale H ** -0.5, queries are the last tokens, tiles chosen.
  # Also without jit, and the output alone comes back.
  pattern = HeadContexts(16, (Strided(local=1, stride=1),) * 2)
  q = normal(0, 1, 40, 2, 8)
  k, v = normal(1, 1, 40, 1, 8), normal(2, 1, 40, 1, 8)
  out = head_attention(q, k, v, pattern=pattern, implementation=implementation)
  assert out.shape == q.shape and out.dtype == q.dtype
  oracles.assert_close(out, dense_causal(q, k, v), 1e-5)


def test_no_implementation_named():
  pattern = HeadContexts(16, (Strided(local=1, stride=1),) * 2)
  q = normal(0, 1, 40, 2, 8)
  out = head_attention(q, q, q, pattern=pattern)
  oracles.assert_close(out, dense_causal(q, q, q), 1e-5)


@pytest.mark.parametrize(
  "rule",
  [
    Strided(local=1, stride=1),
    Strided(local=7, stride=50, residue=3),
    Strided(local=7),
    Table.from_mask(np.ones((7, 7), bool)),
  ],
  ids=["stride 1", "window as long as all", "plain window", "full mask"],
)
def test_patterns_that_hide_nothing_are_dense(rule, each_in_time):
  pattern = HeadContexts(8, (rule, rule))
  q, k, v = (normal(seed, 2, 50, 2, 8) for seed in range(3))
  d_out = normal(3, 2, 50, 2, 8)
  tiling = Tiling(block_q=16, block_kv=16)

  def ours(q, k, v):
    return head_attention(
      q, k, v, pattern=pattern, tiling=tiling, implementation=each_in_time
    )

  out, pullback = jax.vjp(jax.jit(ours), q, k, v)
  true_out, true_pullback = jax.vjp(dense_causal, q, k, v)
  oracles.assert_close(out, true_out, 1e-5)
  for grad, true_grad in zip(
    pullback(d_out), true_pullback(d_out), strict=True
  ):
    oracles.assert_close(grad, true_grad, 2e-5)


def hidden_logits_case(causal):
  """Query t's logit with a key it must not see is 1e4 larger."""
  heads = random_blocks(2, seed=9, causal=causal, density=0.5)
  return Case(name="huge hidden logits", heads=heads, T=40, H=48, scale=1.0)


@pytest.mark.parametrize("causal", [True, False])
def test_huge_hidden_logits_do_not_show(causal, each_in_time):
  case = hidden_logits_case(causal)
  inputs = draw(case)
  # Coordinate t of the keys: 1e4 where query t does not see the key.
  inputs.arrays["q"][..., :40] = np.eye(40)[None, :, None]
  hidden = ~inputs.seen  # [B, N, T, S]
  inputs.arrays["k"][..., :40] = 1e4 * hidden.transpose(0, 3, 1, 2)
  clean = dataclasses.replace(
    inputs, arrays={**inputs.arrays, "k": inputs.arrays["k"].copy()}
  )
  clean.arrays["k"][..., :40] = 0.0
  spoilt = run(case, inputs, each_in_time)
  check_values(case, inputs, spoilt)
  out, lse, grads = run(case, clean, each_in_time)
  oracles.assert_close(spoilt[0], out, 1e-5)
  np.testing.assert_allclose(spoilt[1], lse, rtol=1e-5, atol=1e-5)
  oracles.assert_close(spoilt[2]["v"], grads["v"], 2e-5)


def test_equal_logits_give_the_mean_of_what_is_seen(implementation):
  case = Case(name="equal logits", heads=strided(4, stride=4, local=1), T=53)
  inputs = draw(case)
  inputs.arrays["q"][:] = 0.0
  out, lse, grads = run(case, inputs, implementation)
  seen = inputs.seen[0].astype(np.float64)  # [N, T, S]
  counts = seen.sum(axis=2)
  values = np.where(seen.any(axis=1).T[..., None], inputs.arrays["v"][0], 0.0)
  mean = np.einsum("nts,snh->tnh", seen / counts[..., None], values)
  oracles.assert_close(out[0], mean, 1e-5)
  oracles.assert_close(lse[0], np.log(counts).T, 1e-5)
  assert not grads["k"].any()


def test_later_tokens_have_exactly_zero_gradient(each_in_time):
  case = named("every kind of head")
  inputs = draw(case)
  last = 41  # Only queries up to here count.
  inputs.d_out[:, last + 1 :] = 0.0
  inputs.d_lse[:, last + 1 :] = 0.0
  _, _, grads = run(case, inputs, each_in_time)
  for name in ("q", "k", "v"):
    assert not grads[name][:, last + 1 :].any(), name
    assert grads[name][:, : last + 1].any(), name


def test_hidden_keys_have_exactly_zero_gradient(implementation):
  case = named("residues differ inside a group")
  inputs = draw(case)
  query, head = 58, 5
  inputs.d_out[:] = 0.0
  inputs.d_lse[:] = 0.0
  inputs.d_out[0, query, head] = 1.0
  _, _, grads = run(case, inputs, implementation)
  kv_head = head // 4
  seen = inputs.seen[0, head, query]
  assert 0 < seen.sum() < len(seen)
  for name in ("k", "v"):
    touched = grads[name][0].any(axis=-1)  # [S, K]
    np.testing.assert_array_equal(touched[:, kv_head], seen, name)
    assert not touched[:, 1 - kv_head].any(), name


def test_permuted_heads_permute_the_result(each_in_time):
  case = Case(name="permuted", heads=strided(6, stride=3, dense_heads=1), T=45)
  order = np.array([4, 1, 5, 0, 3, 2])
  inputs = draw(case)
  rules = tuple(case.heads.pattern.rules[n] for n in order)
  moved_case = dataclasses.replace(
    case,
    heads=s2_cases.Heads(
      pattern=dataclasses.replace(case.heads.pattern, rules=rules),
      blocks=case.heads.blocks[order],
    ),
  )
  moved = dataclasses.replace(
    inputs,
    arrays={name: x[:, :, order] for name, x in inputs.arrays.items()},
    d_out=inputs.d_out[:, :, order],
    d_lse=inputs.d_lse[:, :, order],
    seen=inputs.seen[:, order],
  )
  before = run(case, inputs, each_in_time)
  after = run(moved_case, moved, each_in_time)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    oracles.assert_close(b, a[:, :, order], 1e-5)


def test_a_batch_is_its_sequences_one_by_one(each_in_time):
  case = named("queries without a segment")
  inputs = draw(case)
  together = run(case, inputs, each_in_time)
  alone_case = dataclasses.replace(case, B=1)
  for b in range(case.B):
    alone = s2_cases.Inputs(
      arrays={name: x[b : b + 1] for name, x in inputs.arrays.items()},
      segments={name: x[b : b + 1] for name, x in inputs.segments.items()},
      d_out=inputs.d_out[b : b + 1],
      d_lse=inputs.d_lse[b : b + 1],
      seen=inputs.seen[b : b + 1],
    )
    result = run(alone_case, alone, each_in_time)
    for x, y in zip(
      jax.tree.leaves(together), jax.tree.leaves(result), strict=True
    ):
      # -inf where the row is empty.
      finite = np.isfinite(y)
      np.testing.assert_array_equal(np.isfinite(x[b : b + 1]), finite)
      oracles.assert_close(x[b : b + 1][finite], y[finite], 1e-5)


def test_chunks_of_queries_are_the_whole(each_in_time):
  # What prefill in pieces relies on, pieces cut anywhere.
  heads = strided(4, stride=4, local=2)
  whole = Case(name="whole", heads=heads, T=53)
  inputs = draw(whole)
  out, lse, _ = run(whole, inputs, each_in_time)
  for start, stop in ((0, 7), (7, 40), (40, 53)):
    piece = Case(
      name="piece", heads=heads, T=stop - start, S=53, q_offset=start
    )
    part = s2_cases.Inputs(
      arrays={**inputs.arrays, "q": inputs.arrays["q"][:, start:stop]},
      segments={},
      d_out=inputs.d_out[:, start:stop],
      d_lse=inputs.d_lse[:, start:stop],
      seen=inputs.seen[:, :, start:stop],
    )
    part_out, part_lse, _ = run(piece, part, each_in_time)
    oracles.assert_close(part_out, out[:, start:stop], 1e-5)
    oracles.assert_close(part_lse, lse[:, start:stop], 1e-5)


def test_bfloat16_errs_no_more_than_dense_attention(implementation):
  case = Case(
    name="bfloat16",
    heads=strided(4, num_kv_heads=2, stride=2, local=2),
    T=93,
    K=2,
    H=32,
    Hv=32,
    B=2,
    sharp=2.0,
  )
  inputs = draw(case)
  low = s2_cases.to_dtype(inputs.arrays, jnp.bfloat16)
  d_low = jnp.asarray(inputs.d_out, jnp.bfloat16)
  no_d_lse = np.zeros_like(inputs.d_lse)
  rounded = {name: np.asarray(x, np.float64) for name, x in low.items()}
  exact_out, exact_lse = oracles_s2.attention(
    **rounded, seen=inputs.seen, scale=case.true_scale
  )
  exact = oracles_s2.attention_grads(
    **rounded,
    seen=inputs.seen,
    d_out=np.asarray(d_low, np.float64),
    d_lse=no_d_lse,
    scale=case.true_scale,
  )
  out, lse, grads = s2_cases.call(
    low,
    {},
    d_low,
    no_d_lse,
    door=head_attention,
    static=case.static(implementation),
  )

  @jax.jit
  def dense(arrays, d_out):
    result, pullback = jax.vjp(
      lambda arrays: oracles_s2.jnp_dense(
        **arrays, seen=inputs.seen, scale=case.true_scale
      ),
      arrays,
    )
    return result, pullback(d_out)[0]

  dense_out, dense_grads = dense(low, d_low)

  def error(a, b):
    return np.abs(np.asarray(a, np.float64) - b)

  def no_worse(ours, theirs, truth, factor, what):
    assert ours.dtype == jnp.bfloat16, what
    mine, other = error(ours, truth), error(theirs, truth)
    assert mine.max() <= factor * other.max(), (what, mine.max(), other.max())
    rms = [np.sqrt(np.mean(x**2)) for x in (mine, other)]
    assert rms[0] <= factor * rms[1], (what, *rms)

  assert lse.dtype == jnp.float32
  oracles.assert_close(lse, exact_lse, 1e-5, "lse")
  no_worse(out, dense_out, exact_out, 2, "out")
  for name, truth in zip(("q", "k", "v"), exact[:3], strict=True):
    no_worse(grads[name], dense_grads[name], truth, 3, f"d{name}")


@pytest.mark.parametrize("name", COMPILED)
def test_traced_offsets_need_no_compilation(name):
  heads = strided(4, stride=4, local=2)
  traces = []

  @jax.jit
  def attend(q, k, v, offset):
    traces.append(offset)
    return head_attention(
      q, k, v, pattern=heads.pattern, q_offset=offset, implementation=name
    )

  for offset in (0, 1, 29, 40):
    case = Case(name="traced", heads=heads, T=13, S=53, q_offset=offset)
    inputs = draw(case)
    got = attend(
      *(inputs.arrays[x] for x in ("q", "k", "v")), jnp.int32(offset)
    )
    oracles.assert_close(got, s2_cases.expected(case, inputs)[0], 1e-5)
  assert len(traces) == 1


@pytest.mark.parametrize(
  "name", [*COMPILED, pytest.param("triton", marks=pytest.mark.exhaustive)]
)
def test_gradients_under_traced_offsets(name):
  heads = strided(4, stride=4, local=2)
  case = Case(name="traced", heads=heads, T=13, S=53, q_offset=29)
  inputs = draw(case)

  def door(*args, q_offset, **kwargs):
    return head_attention(*args, q_offset=jnp.int32(q_offset), **kwargs)

  with running(name):
    check_values(case, inputs, run(case, inputs, name, door))


def test_static_visits_need_a_static_offset():
  q = jnp.ones((1, 16, 2, 8))
  with (
    running("mosaic_tpu"),
    pytest.raises(NotImplementedError, match="`q_offset`.*`implementation="),
  ):
    head_attention(
      q,
      q,
      q,
      pattern=strided(2).pattern,
      q_offset=jnp.int32(0),
      implementation="mosaic_tpu",
    )


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize(("T", "S"), [(0, 5), (5, 0), (0, 0)])
def test_empty_inputs(name, T, S):
  pattern = strided(2).pattern
  q, k = jnp.ones((2, T, 2, 8)), jnp.ones((2, S, 2, 8))

  def attend(q, k):
    return head_attention(
      q, k, k, pattern=pattern, q_offset=0, return_lse=True, implementation=name
    )

  (out, lse), pullback = jax.vjp(attend, q, k)
  assert out.shape == q.shape and not np.asarray(out).any()
  assert lse.shape == (2, T, 2) and (np.asarray(lse) == -np.inf).all()
  for grad in pullback((out, lse)):
    assert not np.asarray(grad).any()


def test_sinks_of_minus_infinity_are_none(implementation):
  heads = ranged((0, 1), (2, 1), near=3, near_stride=2, far_stride=3)
  case = Case(name="no sinks", heads=heads, T=43, sinks=(-np.inf, -np.inf), B=1)
  inputs = draw(case)
  assert not inputs.seen.any(axis=3).all()
  # The log-sum-exp is -inf again where nothing is seen.
  inputs.d_lse[~inputs.seen.any(axis=3).transpose(0, 2, 1)] = 0.0
  check_values(case, inputs, run(case, inputs, implementation))
