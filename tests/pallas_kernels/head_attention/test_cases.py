"""Attention whose case a traced index picks, against the float64 oracle."""

import contextlib
import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import platform
from pallas_kernels.head_attention import head_attention
from pallas_kernels.head_attention.cases import Case, Part, attend_case
from tests import oracles_s2
from tests.oracles import assert_close
from tests.s2_cases import (
  FORWARD,
  GRADIENT,
  Heads,
  joined,
  random_blocks,
  strided,
  window,
)

N, K, H, Hv, B = 4, 2, 16, 8, 2
T, LENGTHS = 48, (72, 40)


@dataclasses.dataclass(frozen=True, eq=False)
class Keys:
  """A part, and what the oracle says its heads see."""

  source: int
  keys: tuple[int, int]
  heads: Heads
  q_offset: int

  @property
  def part(self):
    return Part(self.source, self.keys, self.heads.pattern, self.q_offset)


MIXED = joined(window(2, local=3), random_blocks(2, seed=4))
SHARED = strided(N, num_kv_heads=K)
# Two of its heads see nothing at all.
HALF_EMPTY = random_blocks(N, seed=5, causal=False)
HALF_EMPTY.blocks[2:] = False
HALF_EMPTY = dataclasses.replace(
  HALF_EMPTY,
  pattern=dataclasses.replace(
    HALF_EMPTY.pattern,
    rules=tuple(
      type(rule).from_mask(mask)
      for rule, mask in zip(
        HALF_EMPTY.pattern.rules, HALF_EMPTY.blocks, strict=True
      )
    ),
  ),
)
CASES = {
  "one part": (((0, T), (Keys(0, (0, 72), SHARED, 24),)),),
  "two ranges, shared softmax": (
    (
      (0, 21),
      (Keys(0, (8, 40), SHARED, 11), Keys(1, (0, 40), HALF_EMPTY, 0)),
    ),
    ((21, T), (Keys(1, (16, 40), MIXED, 3), Keys(0, (0, 72), SHARED, 40))),
  ),
  "queries without keys": (
    ((0, 16), ()),
    ((16, 16), (Keys(0, (0, 72), SHARED, 0),)),
    ((16, 32), (Keys(0, (24, 24), SHARED, 0),)),
    ((32, T), (Keys(1, (0, 24), HALF_EMPTY, 0),)),
  ),
  "one source twice": (
    (
      (0, T),
      (Keys(0, (0, 32), MIXED, 50), Keys(0, (32, 72), SHARED, 2)),
    ),
  ),
}


def case(ranges):
  return Case(
    tuple((rows, tuple(keys.part for keys in met)) for rows, met in ranges)
  )


def seen(ranges, segments):
  """Over the keys of all sources, one after the other: bool [B, N, T, S]."""
  starts = (0, *np.cumsum(LENGTHS))
  mask = np.zeros((N, T, sum(LENGTHS)), bool)
  for (first, last), met in ranges:
    for keys in met:
      columns = slice(*(starts[keys.source] + np.array(keys.keys)))
      mask[:, first:last, columns] = oracles_s2.token_mask(
        keys.heads.blocks,
        keys.heads.pattern.block_size,
        q_length=last - first,
        kv_length=keys.keys[1] - keys.keys[0],
        q_offset=keys.q_offset,
        is_causal=keys.heads.pattern.is_causal,
      )
  if segments is None:
    return mask[None]
  queries, sources = segments
  return oracles_s2.with_segments(mask, queries, np.concatenate(sources, 1))


@functools.lru_cache
def draw():
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  q = normal(B, T, N, H)
  sources = tuple((normal(B, S, K, H), normal(B, S, K, Hv)) for S in LENGTHS)
  return q, sources, normal(B, T, N, Hv)


def draw_segments():
  rng = np.random.default_rng(1)
  queries = np.sort(rng.integers(0, 3, (B, T)).astype(np.int32))
  return queries, tuple(
    np.sort(rng.integers(0, 3, (B, S)).astype(np.int32)) for S in LENGTHS
  )


@functools.partial(jax.jit, static_argnames=("cases", "implementation"))
def run(arrays, segments, d_out, which, *, cases, implementation):
  options = {}
  if segments is not None:
    options = dict(q_segment_ids=segments[0], kv_segment_ids=segments[1])

  def forward(q, sources):
    return attend_case(
      q,
      sources,
      cases=cases,
      which=which,
      implementation=implementation,
      **options,
    )

  out, pullback = jax.vjp(forward, *arrays)
  return out, pullback(d_out)


def check(result, mask):
  """Output and gradients are the oracle's over all sources together."""
  q, sources, d_out = draw()
  k, v = (np.concatenate(arrays, 1) for arrays in zip(*sources, strict=True))
  options = {"scale": H**-0.5}
  true_out, _ = oracles_s2.attention(q, k, v, mask, **options)
  no_d_lse = np.zeros((B, T, N))
  true_dq, true_dk, true_dv, _ = oracles_s2.attention_grads(
    q, k, v, mask, d_out, no_d_lse, **options
  )
  out, (dq, d_sources) = result
  assert_close(out, true_out, FORWARD, "out")
  assert_close(dq, true_dq, GRADIENT, "dq", floor=1.0)
  for name, true, found in zip(
    ("dk", "dv"), (true_dk, true_dv), zip(*d_sources, strict=True), strict=True
  ):
    assert_close(np.concatenate(found, 1), true, GRADIENT, name, floor=1.0)


COMPILED, INTERPRETED = ("reference", "xla"), ("mosaic_tpu", "triton")
# An interpreted kernel takes a while to compile.
QUICK = ("two ranges, shared softmax",)


def each_run():
  yield pytest.param("reference", tuple(CASES), False)
  yield pytest.param("xla", tuple(CASES), True)
  yield pytest.param("mosaic_tpu", QUICK, False)
  for name in COMPILED + INTERPRETED:
    for packed in (False, True):
      yield pytest.param(
        name, tuple(CASES), packed, marks=pytest.mark.exhaustive
      )


@pytest.mark.parametrize(("implementation", "names", "packed"), [*each_run()])
def test_every_case_is_the_oracles(implementation, names, packed):
  interpreted = implementation in INTERPRETED
  with platform.interpreting() if interpreted else contextlib.nullcontext():
    check_cases(implementation, names, packed)


def check_cases(implementation, names, packed):
  segments = draw_segments() if packed else None
  q, sources, d_out = draw()
  for which, name in enumerate(names):
    result = run(
      (q, sources),
      segments,
      d_out,
      jnp.int32(which),
      cases=tuple(case(CASES[name]) for name in names),
      implementation=implementation,
    )
    check(result, seen(CASES[name], segments))


def branches(jaxpr):
  """Branches of every choice inside of a program."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "cond":
      found.append(len(equation.params["branches"]))
    if equation.primitive.name != "pallas_call":
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        found += branches(inner)
  return found


def traced(names):
  q, sources, _ = draw()

  def forward(q, sources, which):
    return attend_case(
      q,
      sources,
      cases=tuple(case(CASES[name]) for name in names),
      which=which,
      implementation="mosaic_tpu",
    )

  with platform.interpreting():
    return jax.make_jaxpr(forward)(q, sources, jnp.int32(0))


def test_equal_cases_are_compiled_once():
  one, two = "one part", "one source twice"
  assert branches(traced([one]).jaxpr) == []
  assert branches(traced([one, one, one]).jaxpr) == []
  assert branches(traced([one, two, one, two]).jaxpr)[:1] == [2]


def test_what_is_kept_does_not_grow_with_the_cases():
  """Only the arguments, the output and the log-sum-exp."""
  q, sources, _ = draw()

  def kept(names):
    def forward(q, sources, which):
      cases = tuple(case(CASES[name]) for name in names)
      return jax.vjp(
        lambda q, sources: attend_case(
          q, sources, cases=cases, which=which, implementation="xla"
        ),
        q,
        sources,
      )

    out, pullback = jax.eval_shape(forward, q, sources, jnp.int32(0))
    leaves = jax.tree.leaves((out, pullback))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  arguments = q.nbytes + sum(k.nbytes + v.nbytes for k, v in sources)
  out = B * T * N * Hv * 4
  for names in (["one part"], list(CASES)):
    # The index and the constants of the derivative's own are a few bytes.
    assert kept(names) <= arguments + 2 * out + B * T * N * 4 + 64


def test_one_part_is_head_attention():
  q, sources, d_out = draw()
  (k, v), pattern = sources[0], SHARED.pattern
  found = run(
    (q, ((k, v),)),
    None,
    d_out,
    jnp.int32(0),
    cases=(case(CASES["one part"]),),
    implementation="xla",
  )

  @jax.jit
  def plain(q, k, v):
    out, pullback = jax.vjp(
      lambda *qkv: head_attention(*qkv, pattern=pattern, implementation="xla"),
      q,
      k,
      v,
    )
    return out, pullback(d_out)

  out, (dq, dk, dv) = plain(q, k, v)
  jax.tree.map(np.testing.assert_array_equal, found, (out, (dq, ((dk, dv),))))


def test_low_precision_sums_are_float32():
  """A source that two parts read: its gradient is rounded once."""
  q, sources, d_out = jax.tree.map(
    lambda x: jnp.asarray(x, jnp.bfloat16), draw()
  )
  ranges = CASES["one source twice"]
  out, (dq, d_sources) = run(
    (q, sources),
    None,
    d_out,
    jnp.int32(0),
    cases=(case(ranges),),
    implementation="xla",
  )
  assert {x.dtype for x in jax.tree.leaves((out, dq, d_sources))} == {
    jnp.dtype(jnp.bfloat16)
  }
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (q, sources))
  true_out, _ = oracles_s2.attention(
    wide[0], *wide[1][0], seen(ranges, None)[..., : LENGTHS[0]], scale=H**-0.5
  )
  assert_close(np.asarray(out, np.float32), true_out, 1e-2)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(cases=()), "`cases` must hold at least one case"),
    (dict(sources=()), "`sources` must hold at least one pair"),
    (
      dict(cases=(Case((((0, 8), ()), ((9, T), ()))),)),
      r"consecutive ranges of queries, got \(9, 48\) after 8",
    ),
    (dict(cases=(Case((((0, 8), ()),)),)), "must cover all 48 queries, got 8"),
    (
      dict(cases=(case((((0, T), (Keys(2, (0, 8), SHARED, 0),)),)),)),
      r"`source` must be in \[0, 2\), got 2",
    ),
    (
      dict(cases=(case((((0, T), (Keys(1, (0, 48), SHARED, 0),)),)),)),
      r"`keys` must be a range in \[0, 40\], got \(0, 48\)",
    ),
    (
      dict(
        cases=(case((((0, T), (Keys(1, (0, 8), window(2, local=1), 0),)),)),)
      ),
      "`pattern` is for 2 query heads, `q` has 4",
    ),
    (
      dict(q_segment_ids=np.zeros((B, T), np.int32)),
      "must be given together",
    ),
  ],
)
def test_refuses(change, message):
  q, sources, _ = draw()
  options = dict(cases=(case(CASES["one part"]),), sources=sources)
  with pytest.raises(ValueError, match=message):
    attend_case(q, which=jnp.int32(0), **(options | change))
