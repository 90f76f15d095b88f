"""Hypothesis strategies that draw the awkward inputs of an MoH layer.

Array shapes come from short fixed tables, because each costs a compilation;
what varies freely is the data: who is selected, who is padding, who sees whom.
"""

import dataclasses
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np

HUGE = 1e4  # Fills padding: a leak of it cannot hide in the tolerance.


def sweep(examples):
  """Settings for a sweep of about `examples` in the everyday profile.

  A longer profile multiplies it; see `conftest.py`. No shrinking: the data
  come from a drawn seed, of which a smaller one is no simpler.
  """
  profile = hypothesis.settings.default
  return hypothesis.settings(
    max_examples=max(1, examples * profile.max_examples // 30),
    phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
    suppress_health_check=list(hypothesis.HealthCheck),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerShape:
  """One compiled shape of the layer; letters as in the library."""

  name: str
  B: int
  T: int
  S: int
  N: int
  K: int
  H: int
  D: int
  num_active: int
  causal: bool
  head_masks: bool = False  # `mask` is [B, N, T, S] instead of [B, 1, T, S].

  @property
  def self_attention(self):
    return self.T == self.S


LAYER_SHAPES = (
  LayerShape(
    name="one token, G=1",
    B=3, T=1, S=1, N=5, K=5, H=8, D=12, num_active=3, causal=True,
  ),
  LayerShape(
    name="a page, G=2, N=6, mask per head",
    B=2, T=7, S=7, N=6, K=3, H=4, D=10, num_active=4, causal=True,
    head_masks=True,
  ),
  LayerShape(
    name="one active head, cross attention, G=8",
    B=2, T=13, S=29, N=8, K=1, H=8, D=16, num_active=1, causal=False,
  ),
  LayerShape(
    name="every head active, G=4, off the tile",
    B=1, T=67, S=67, N=12, K=3, H=6, D=8, num_active=12, causal=True,
  ),
  LayerShape(
    name="last queries of a longer context, G=2",
    B=2, T=5, S=21, N=4, K=2, H=8, D=16, num_active=2, causal=True,
  ),
  LayerShape(
    name="several tiles, G=1",
    B=2, T=300, S=300, N=3, K=3, H=8, D=8, num_active=2, causal=True,
  ),
)  # fmt: skip


def _padding(draw, rng, batch, length):
  """Valid tokens, bool [batch, length]."""
  kind = draw(
    st.sampled_from(
      [
        "none",
        "right",
        "left",
        "holes",
        "one sequence empty",
        "all",
        "one left",
      ]
    )
  )
  valid = np.ones((batch, length), bool)
  lengths = rng.integers(0, length + 1, size=batch)
  for b in range(batch):
    if kind == "right":
      valid[b, lengths[b] :] = False
    elif kind == "left":
      valid[b, : length - lengths[b]] = False
    elif kind == "holes":
      valid[b] = rng.random(length) < 0.6
  if kind == "one sequence empty":
    valid[rng.integers(batch)] = False
  elif kind == "all":
    valid[:] = False
  elif kind == "one left":
    valid[:] = False
    valid[rng.integers(batch), rng.integers(length)] = True
  return valid


def _selection(draw, rng, valid, num_heads, num_active):
  """Exactly `num_active` heads per valid token, none on padding."""
  kind = draw(
    st.sampled_from(
      [
        "random",
        "one head takes all",
        "a head with none",
        "all alike",
        "skewed",
      ]
    )
  )
  weights = np.zeros(num_heads)
  if kind == "one head takes all":
    weights[rng.integers(num_heads)] = 100.0
  elif kind == "a head with none":
    weights[rng.integers(num_heads)] = -100.0
  elif kind == "all alike":
    weights = 100.0 * rng.permutation(num_heads)
  elif kind == "skewed":
    weights = np.linspace(0.0, 3.0, num_heads)
  scores = weights + rng.gumbel(size=(*valid.shape, num_heads))
  chosen = np.argsort(-scores, axis=-1)[..., :num_active]
  mask = np.zeros(scores.shape, bool)
  np.put_along_axis(mask, chosen, True, axis=-1)
  return mask & valid[..., None]


def _segments(draw, rng, batch, length):
  kind = draw(st.sampled_from(["one", "two", "packed", "single tokens"]))
  if kind == "one":
    return np.zeros((batch, length), np.int32)
  if kind == "single tokens":
    return np.tile(np.arange(length, dtype=np.int32), (batch, 1))
  starts = rng.random((batch, length)) < (2 / length if kind == "two" else 0.2)
  return np.cumsum(starts, axis=1).astype(np.int32)


@st.composite
def layer_cases(draw, shape):
  """Arrays for one call of the layer; padding is filled with huge values."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  c = shape
  valid = _padding(draw, rng, c.B, c.T)
  kv_valid = valid if c.self_attention else _padding(draw, rng, c.B, c.S)
  selection = _selection(draw, rng, valid, c.N, c.num_active)

  q_segments = _segments(draw, rng, c.B, c.T)
  kv_segments = q_segments
  if not c.self_attention:
    kv_segments = _segments(draw, rng, c.B, c.S)

  density = draw(st.sampled_from([1.0, 0.7, 0.1]))
  heads = c.N if c.head_masks else 1
  mask = rng.random((c.B, heads, c.T, c.S)) < density
  mask &= kv_valid[:, None, None, :]

  def normal(*dims, scale=1.0):
    return (scale * rng.standard_normal(dims)).astype(np.float32)

  fill = HUGE * draw(st.sampled_from([-1.0, 1.0]))
  x = np.where(valid[..., None], normal(c.B, c.T, c.D), fill)
  k, v = (
    np.where(kv_valid[..., None, None], normal(c.B, c.S, c.K, c.H), fill)
    for _ in range(2)
  )
  gates = rng.uniform(0.1, 2.0, selection.shape) * selection
  offset = c.S - c.T if c.causal else 0
  return types.SimpleNamespace(
    valid=valid,
    kv_valid=kv_valid,
    selection=selection,
    gates=gates.astype(np.float32),
    probs=np.zeros((c.B, c.T, 0), np.float32),
    x=x.astype(np.float32),
    k=k.astype(np.float32),
    v=v.astype(np.float32),
    w_q=normal(c.D, c.N, c.H, scale=c.D**-0.5),
    w_o=normal(c.N, c.H, c.D, scale=(c.N * c.H) ** -0.5),
    b_q=normal(c.N, c.H, scale=0.3),
    dout=normal(c.B, c.T, c.D),
    mask=mask,
    q_segments=q_segments,
    kv_segments=kv_segments,
    q_positions=np.tile(np.arange(c.T, dtype=np.int32) + offset, (c.B, 1)),
    kv_positions=np.tile(np.arange(c.S, dtype=np.int32), (c.B, 1)),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPlan:
  """Head counts of one layer: shared, routed, and picks per token."""

  num_heads: int
  num_shared: int
  top_k: int

  @property
  def num_routed(self):
    return self.num_heads - self.num_shared


HEAD_PLANS = (
  HeadPlan(num_heads=8, num_shared=2, top_k=4),
  HeadPlan(num_heads=6, num_shared=0, top_k=3),
  HeadPlan(num_heads=7, num_shared=1, top_k=2),
  HeadPlan(num_heads=5, num_shared=2, top_k=3),  # top_k = routed
  HeadPlan(num_heads=4, num_shared=0, top_k=4),  # no shared, top_k = routed
  HeadPlan(num_heads=3, num_shared=2, top_k=1),  # one routed head
)
ALL_SHARED = HeadPlan(num_heads=5, num_shared=5, top_k=0)


@st.composite
def integer_tokens(draw, batch, length, width):
  """Small integers: sums of them are exact in float32, so ties are real."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  span = draw(st.sampled_from([1, 2, 5]))
  x = rng.integers(-span, span + 1, (batch, length, width)).astype(np.float32)
  valid = _padding(draw, rng, batch, length)
  return x, valid, rng
