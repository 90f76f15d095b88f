"""Calls of head attention, and the checks that each of them must pass.

A case holds the pattern twice: as the library's rules, and as the block mask
that `oracles_s2` makes from the paper's formula. Sizes are small, because a
case costs a compilation in every implementation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.head_attention import (
  HeadContexts,
  Ranged,
  Strided,
  Table,
  Tiling,
  head_attention,
)
from tests import oracles_s2
from tests.oracles import assert_close

FORWARD, GRADIENT = 1e-5, 2e-5
DENSE = Strided(local=1, stride=1)
BLOCKS = 24  # Of the masks, unless a case needs more.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
  """A pattern as rules and, independently, as a block mask.

  `blocks` is bool [N, reach, reach], from the oracle.
  """

  pattern: HeadContexts
  blocks: np.ndarray


def strided(
  num_heads,
  *,
  block=8,
  local=2,
  stride=4,
  num_kv_heads=None,
  offset=0,
  dense_heads=0,
  per_query_head=False,
  reach=BLOCKS,
):
  """Residues by hand: head g owns residue -(g s + o) mod V."""
  step = max(1, stride // num_heads)
  shared = num_kv_heads is not None and not per_query_head
  num_patterns = num_kv_heads if shared else num_heads
  rules = []
  for head in range(num_heads):
    g = head * num_patterns // num_heads
    rule = Strided(
      local=local, stride=stride, residue=-(g * step + offset) % stride
    )
    rules.append(DENSE if g >= num_patterns - dense_heads else rule)
  return Heads(
    pattern=HeadContexts(block, tuple(rules)),
    blocks=oracles_s2.strided_blocks(
      num_heads,
      reach,
      reach,
      local=local,
      stride=stride,
      num_kv_heads=num_kv_heads,
      offset=offset,
      dense_heads=dense_heads,
      per_query_head=per_query_head,
    ),
  )


def window(num_heads, *, block=8, local, sinks=0, reach=BLOCKS):
  rule = Strided(local=local, sinks=sinks)
  return Heads(
    pattern=HeadContexts(block, (rule,) * num_heads),
    blocks=oracles_s2.window_blocks(
      num_heads, reach, reach, local=local, sinks=sinks
    ),
  )


def with_sinks(heads, sinks):
  """The same strided heads, which also see the first blocks of keys."""
  pattern = heads.pattern
  rules = tuple(
    dataclasses.replace(rule, sinks=sinks) for rule in pattern.rules
  )
  reach = heads.blocks.shape[-1]
  causal = np.tri(reach, dtype=bool)
  return Heads(
    pattern=dataclasses.replace(pattern, rules=rules),
    blocks=heads.blocks | (causal & (np.arange(reach) < sinks)),
  )


def ranged(near_residues, far_residues, *, near, near_stride, far_stride):
  rules = tuple(
    Ranged(
      near=near,
      near_stride=near_stride,
      near_residue=near_residue,
      far_stride=far_stride,
      far_residue=far_residue,
    )
    for near_residue, far_residue in zip(
      near_residues, far_residues, strict=True
    )
  )
  return Heads(
    pattern=HeadContexts(8, rules),
    blocks=oracles_s2.context_range_blocks(
      BLOCKS,
      BLOCKS,
      near=near,
      near_stride=near_stride,
      far_stride=far_stride,
      near_residues=near_residues,
      far_residues=far_residues,
    ),
  )


def random_blocks(
  num_heads, *, seed=0, density=0.4, causal=True, block=8, reach=BLOCKS
):
  """Masks that no cache could serve; row 2 of head 0 and column 1 are empty."""
  rng = np.random.default_rng(seed)
  blocks = rng.random((num_heads, reach, reach)) < density
  blocks[0, 2] = False
  blocks[:, :, 1] = False
  rules = tuple(Table.from_mask(mask) for mask in blocks)
  return Heads(
    pattern=HeadContexts(block, rules, is_causal=causal), blocks=blocks
  )


def joined(*parts):
  """The heads of several patterns of one block size in one."""
  first = parts[0].pattern
  assert all(p.pattern.block_size == first.block_size for p in parts)
  assert all(p.pattern.is_causal == first.is_causal for p in parts)
  rules = sum((part.pattern.rules for part in parts), ())
  return Heads(
    pattern=HeadContexts(first.block_size, rules, is_causal=first.is_causal),
    blocks=np.concatenate([part.blocks for part in parts]),
  )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
  """One call; letters as in the library, K=None means N.

  Attributes:
    q_offset: None leaves it out: the queries are the last tokens.
    scale: None leaves it out.
    sinks: Logits that take weight and give nothing; -inf is none.
    segments: None, "packed" (cut anywhere, the same for queries and keys),
      "few" (two long ones) or "strangers" (some queries belong to a segment
      that has no key).
    sharp: Multiplies the queries.
    tiling: Queries and keys of a tile; None leaves the choice.
  """

  name: str
  heads: Heads
  T: int
  S: int | None = None
  K: int | None = None
  H: int = 8
  Hv: int = 8
  B: int = 1
  q_offset: int | None = None
  scale: float | None = None
  soft_cap: float | None = None
  sinks: tuple[float, ...] | None = None
  segments: str | None = None
  sharp: float = 1.0
  tiling: tuple[int, int] | None = (16, 16)

  @property
  def kv_length(self):
    return self.T if self.S is None else self.S

  @property
  def first_position(self):
    return self.kv_length - self.T if self.q_offset is None else self.q_offset

  @property
  def num_heads(self):
    return self.heads.pattern.num_heads

  @property
  def true_scale(self):
    return self.H**-0.5 if self.scale is None else self.scale

  def static(self, implementation):
    """Static arguments of the call, hashable."""
    options = {
      "pattern": self.heads.pattern,
      "implementation": implementation,
      "logits_soft_cap": self.soft_cap,
      "scale": self.scale,
      "q_offset": self.q_offset,
      "tiling": self.tiling
      and Tiling(block_q=self.tiling[0], block_kv=self.tiling[1]),
    }
    given = {name: x for name, x in options.items() if x is not None}
    return tuple(sorted(given.items()))

  def segment_ids(self):
    """Query and key segments, int32 [B, T] and [B, S], or None twice."""
    if self.segments is None:
      return None, None
    rng = np.random.default_rng(5)
    cuts = rng.random((self.B, self.kv_length)) < 0.12
    if self.segments == "few":
      cuts = np.tile(
        np.arange(self.kv_length) == self.kv_length // 4, (self.B, 1)
      )
    # Any int32 is an id: zero, negative, beyond what float32 tells apart.
    keys = np.cumsum(cuts, axis=1) - 2
    if self.segments == "few":
      keys += 2**24 + 2
    positions = np.minimum(
      self.first_position + np.arange(self.T), self.kv_length - 1
    )
    queries = keys[:, positions]
    if self.segments == "strangers":
      queries = np.where(rng.random(queries.shape) < 0.3, 2**31 - 1, queries)
    return queries.astype(np.int32), keys.astype(np.int32)

  def seen(self):
    """What every head sees, from the oracle: bool [B, N, T, S]."""
    mask = oracles_s2.token_mask(
      self.heads.blocks,
      self.heads.pattern.block_size,
      q_length=self.T,
      kv_length=self.kv_length,
      q_offset=self.first_position,
      is_causal=self.heads.pattern.is_causal,
    )
    q_segments, kv_segments = self.segment_ids()
    if q_segments is None:
      return np.broadcast_to(mask, (self.B, *mask.shape))
    return oracles_s2.with_segments(mask, q_segments, kv_segments)


@dataclasses.dataclass
class Inputs:
  """Arrays of one call, in NumPy."""

  arrays: dict
  segments: dict
  d_out: np.ndarray
  d_lse: np.ndarray
  seen: np.ndarray


def draw(case, seed=0):
  """Inputs whose hidden parts are poisoned.

  Keys that no head of their group sees hold huge keys and values, queries
  that see nothing are large, and the cotangent of a log-sum-exp of -inf is
  NaN: none of it may show.
  """
  rng = np.random.default_rng(seed)
  kv_heads = case.K or case.num_heads
  group = case.num_heads // kv_heads

  def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)

  seen = case.seen()
  arrays = {
    "q": case.sharp * normal(case.B, case.T, case.num_heads, case.H),
    "k": normal(case.B, case.kv_length, kv_heads, case.H),
    "v": normal(case.B, case.kv_length, kv_heads, case.Hv),
  }
  empty = ~seen.any(axis=3).transpose(0, 2, 1)  # [B, T, N]
  grouped = seen.reshape(case.B, kv_heads, group, case.T, case.kv_length)
  unseen = ~grouped.any(axis=(2, 3)).transpose(0, 2, 1)  # [B, S, K]
  arrays["q"][empty] *= 100
  arrays["k"][unseen] *= 1e8
  arrays["v"][unseen] = 1e30
  d_lse = normal(case.B, case.T, case.num_heads)
  if case.sinks is not None:
    arrays["sinks"] = np.asarray(case.sinks, np.float32)
  else:
    d_lse[empty] = np.nan
  q_segments, kv_segments = case.segment_ids()
  segments = {}
  if q_segments is not None:
    segments = {"q_segment_ids": q_segments, "kv_segment_ids": kv_segments}
  return Inputs(
    arrays=arrays,
    segments=segments,
    d_out=normal(case.B, case.T, case.num_heads, case.Hv),
    d_lse=d_lse,
    seen=seen,
  )


@functools.partial(jax.jit, static_argnames=("door", "static"))
def call(arrays, segments, d_out, d_lse, *, door, static):
  """Output, log-sum-exp and all gradients."""

  def forward(arrays):
    return door(**arrays, **segments, **dict(static), return_lse=True)

  (out, lse), pullback = jax.vjp(forward, arrays)
  return out, lse, pullback((d_out, d_lse))[0]


def run(case, inputs, implementation, door=head_attention):
  """`call` on a case, as NumPy arrays."""
  result = call(
    inputs.arrays,
    inputs.segments,
    inputs.d_out,
    inputs.d_lse,
    door=door,
    static=case.static(implementation),
  )
  return jax.tree.map(np.asarray, result)


def expected(case, inputs):
  """The same from the oracle: out, lse and gradients by name."""
  options = {
    "scale": case.true_scale,
    "soft_cap": case.soft_cap,
    "sinks": inputs.arrays.get("sinks"),
  }
  qkv = [inputs.arrays[name] for name in ("q", "k", "v")]
  out, lse = oracles_s2.attention(*qkv, inputs.seen, **options)
  grads = oracles_s2.attention_grads(
    *qkv, inputs.seen, inputs.d_out, inputs.d_lse, **options
  )
  return out, lse, dict(zip(("q", "k", "v", "sinks"), grads, strict=True))


def check_values(case, inputs, result):
  """Output, log-sum-exp and gradients are the oracle's; nothing leaks."""
  out, lse, grads = result
  true_out, true_lse, true_grads = expected(case, inputs)
  assert not np.isnan(lse).any(), f"{case.name}: lse is NaN"
  np.testing.assert_array_equal(
    np.isfinite(lse), np.isfinite(true_lse), f"{case.name}: rows that see keys"
  )
  finite = np.isfinite(true_lse)
  assert (lse[~finite] == -np.inf).all()
  assert_close(lse[finite], true_lse[finite], FORWARD, "lse")
  assert_close(out, true_out, FORWARD, "out")
  for name, grad in grads.items():
    # Gradients of a row are sums that may cancel exactly (a row of one key).
    assert_close(grad, true_grads[name], GRADIENT, f"d{name}", floor=1.0)

  empty = ~inputs.seen.any(axis=3).transpose(0, 2, 1)
  assert not out[empty].any(), "a query that sees nothing must give 0"
  assert not grads["q"][empty].any(), "no gradient if it sees nothing"
  group = case.num_heads // grads["k"].shape[2]
  sees = inputs.seen.reshape(case.B, -1, group, case.T, case.kv_length)
  unseen = ~sees.any(axis=(2, 3)).transpose(0, 2, 1)
  for name in ("k", "v"):
    assert not grads[name][unseen].any(), f"d{name} of a key nobody sees"


def check(case, implementation, door=head_attention):
  """Runs a case and checks everything; returns inputs and result."""
  inputs = draw(case)
  result = run(case, inputs, implementation, door)
  check_values(case, inputs, result)
  return inputs, result


def to_dtype(arrays, dtype):
  return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


LENGTHS = (
  Case(name="one token", heads=strided(2), T=1),
  Case(name="shorter than a block", heads=strided(2), T=5),
  Case(name="a block less one", heads=strided(2), T=7),
  Case(name="a block", heads=strided(2), T=8),
  Case(name="a block and one", heads=strided(2), T=9),
  Case(name="prime length", heads=strided(4), T=67),
  Case(name="whole tiles", heads=strided(4), T=64),
)
OFFSETS = (
  Case(name="last queries, aligned", heads=strided(4), T=13, S=45),
  Case(name="last queries, off the block", heads=strided(4), T=13, S=50),
  Case(name="one query", heads=strided(4), T=1, S=83),
  Case(
    name="keys after the last query",
    heads=strided(2, stride=3),
    T=21,
    S=90,
    q_offset=11,
  ),
  Case(
    name="queries after the last key",
    heads=strided(2, stride=3, local=1),
    T=37,
    S=24,
    q_offset=29,
  ),
  Case(name="more queries than keys", heads=strided(4), T=40, S=17, q_offset=0),
)
KINDS = (
  Case(name="only its own block", heads=strided(2, local=1, stride=100), T=43),
  Case(name="stride 1 is dense", heads=strided(2, local=1, stride=1), T=43),
  Case(name="window", heads=window(2, local=3), T=61),
  Case(name="window of one block", heads=window(1, local=1), T=35),
  Case(name="window as long as all", heads=strided(2, local=9), T=67),
  Case(
    name="window with first blocks", heads=window(2, local=2, sinks=2), T=67
  ),
  Case(name="stride above the heads", heads=strided(3, stride=8), T=93),
  Case(
    name="stride does not divide", heads=strided(5, stride=5, local=1), T=93
  ),
  Case(
    name="offset 1, as Phi-3-small",
    heads=strided(
      8, stride=4, num_kv_heads=2, offset=1, per_query_head=True, local=1
    ),
    T=75,
    K=2,
  ),
  Case(
    name="dense heads among sparse ones",
    heads=strided(6, stride=4, num_kv_heads=3, dense_heads=1),
    T=53,
    K=3,
  ),
  Case(
    name="context ranges, empty rows",
    heads=ranged((0, 1), (2, 1), near=4, near_stride=2, far_stride=3),
    T=70,
  ),
  Case(
    name="any mask, empty rows and columns",
    heads=random_blocks(3, seed=1),
    T=67,
    B=2,
  ),
  Case(
    name="any mask, not causal",
    heads=random_blocks(2, seed=2, causal=False),
    T=45,
    S=61,
    q_offset=3,
  ),
  Case(
    name="a few blocks only",
    heads=random_blocks(2, seed=3, density=0.08, causal=False),
    T=61,
  ),
  Case(
    name="every kind of head",
    heads=joined(
      strided(2, stride=3),
      random_blocks(2, seed=4),
      window(1, local=2, sinks=1),
      ranged((1,), (0,), near=3, near_stride=2, far_stride=2),
      strided(2, local=1, stride=1),
    ),
    T=67,
    K=4,
    B=2,
  ),
)
GROUPS = (
  *(
    Case(
      name=f"group of {group}, head sizes {H} and {Hv}",
      heads=strided(8, stride=4, num_kv_heads=8 // group),
      T=44,
      K=8 // group,
      B=2,
      H=H,
      Hv=Hv,
    )
    for group, H, Hv in ((1, 5, 12), (2, 24, 8), (4, 24, 40), (8, 3, 40))
  ),
  Case(
    name="residues differ inside a group",
    heads=strided(8, stride=4, num_kv_heads=2, per_query_head=True),
    T=59,
    K=2,
  ),
)
OPTIONS = (
  Case(name="packed", heads=strided(4), T=67, B=2, segments="packed"),
  Case(
    name="packed, any mask",
    heads=random_blocks(2, seed=5, density=0.6),
    T=53,
    B=2,
    segments="packed",
  ),
  Case(
    name="queries without a segment",
    heads=strided(4, num_kv_heads=2),
    T=29,
    S=67,
    B=2,
    K=2,
    segments="strangers",
  ),
  Case(name="soft cap", heads=strided(4), T=53, soft_cap=1.5, sharp=3.0),
  Case(name="scale", heads=strided(4), T=53, scale=1 / 128),
  Case(name="sharp logits", heads=strided(4), T=53, sharp=8.0),
  Case(name="sinks", heads=strided(4), T=53, sinks=(0.5, -3.0, 4.0, 0.0), B=2),
  Case(
    name="sinks of rows that see nothing",
    heads=ranged((0, 1), (2, 1), near=3, near_stride=2, far_stride=3),
    T=43,
    sinks=(-2.0, 30.0),
  ),
  Case(
    name="everything at once",
    heads=joined(
      strided(4, stride=4, num_kv_heads=2, offset=1),
      random_blocks(2, seed=6),
      window(2, local=2),
    ),
    T=37,
    S=83,
    K=4,
    B=2,
    H=24,
    Hv=8,
    q_offset=41,
    scale=0.4,
    soft_cap=3.0,
    sinks=(0.1, -1.0, 2.0, 0.0, 1.0, -0.5, 0.3, 1.5),
    segments="strangers",
  ),
)
TILES = (
  Case(name="tiles below a block", heads=strided(2, block=32), T=83),
  Case(
    name="wide key tiles", heads=strided(2, stride=3), T=93, tiling=(16, 32)
  ),
  Case(
    name="tall query tiles", heads=strided(2, stride=3), T=93, tiling=(32, 16)
  ),
  Case(
    name="tall query tiles, any mask",
    heads=random_blocks(2, seed=7),
    T=93,
    tiling=(32, 16),
  ),
  Case(
    name="wide key tiles, any mask, off the block",
    heads=random_blocks(2, seed=8),
    T=37,
    S=90,
    tiling=(16, 32),
  ),
  Case(name="tiles beyond the end", heads=strided(2), T=29, tiling=(64, 64)),
  Case(name="chosen tiles", heads=strided(4), T=67, tiling=None),
)
# Long enough for loops over several default tiles on XLA: whole ones, masked
# ones, the last one.
LONG = (
  Case(
    name="long shards",
    heads=strided(2, block=16, local=3, stride=2, reach=100),
    T=300,
    S=1523,
    tiling=None,
  ),
  Case(
    name="long packed shards",
    heads=strided(
      4, block=16, local=3, stride=2, num_kv_heads=2, dense_heads=1, reach=100
    ),
    T=170,
    S=1500,
    q_offset=1301,
    K=2,
    segments="few",
    tiling=None,
  ),
  Case(
    name="long window",
    heads=window(1, block=16, local=80, reach=100),
    T=300,
    S=1523,
    tiling=None,
  ),
  Case(
    name="long random masks",
    heads=random_blocks(2, seed=10, density=0.5, block=16, reach=100),
    T=300,
    S=1500,
    q_offset=1177,
    tiling=None,
  ),
)
CASES = LENGTHS + OFFSETS + KINDS + GROUPS + OPTIONS + TILES + LONG
assert len({case.name for case in CASES}) == len(CASES)


def named(name):
  return next(case for case in CASES if case.name == name)
