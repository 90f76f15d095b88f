"""Dense and dispatched execution against NumPy, gradients included."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.moh import MoHConfig, RouterParams, Routing, moh_attention, route
from tests import oracles, strategies

FORWARD, GRADIENT = 1e-5, 2e-5  # float32, of the reference's magnitude
TRAINED = ("x", "k", "v", "w_q", "w_o", "b_q", "gates")
DENSE = ("dense", None)
DISPATCH = ("dispatch", "xla")
REFERENCE = ("dispatch", "reference")

each_shape = pytest.mark.parametrize(
  "shape", strategies.LAYER_SHAPES, ids=lambda shape: shape.name
)
both_paths = pytest.mark.parametrize(
  "path", [DENSE, DISPATCH], ids=["dense", "dispatch"]
)
SHORT = strategies.LAYER_SHAPES[1]


def draw_one(shape, seed=0, **changes):
  """One plain case without padding, outside of any sweep."""
  rng = np.random.default_rng(seed)
  c = shape

  def normal(*dims, scale=1.0):
    return (scale * rng.standard_normal(dims)).astype(np.float32)

  selection = np.zeros((c.B, c.T, c.N), bool)
  chosen = rng.permuted(
    np.broadcast_to(np.arange(c.N), selection.shape), axis=-1
  )[..., : c.num_active]
  np.put_along_axis(selection, chosen, True, axis=-1)
  case = {
    "x": normal(c.B, c.T, c.D),
    "k": normal(c.B, c.S, c.K, c.H),
    "v": normal(c.B, c.S, c.K, c.H),
    "w_q": normal(c.D, c.N, c.H, scale=c.D**-0.5),
    "w_o": normal(c.N, c.H, c.D, scale=(c.N * c.H) ** -0.5),
    "b_q": normal(c.N, c.H, scale=0.3),
    "gates": rng.uniform(0.1, 2.0, selection.shape).astype(np.float32)
    * selection,
    "selection": selection,
    "dout": normal(c.B, c.T, c.D),
  }
  return case | changes


def routing_of(selection, gates):
  batch, length, _ = selection.shape
  return Routing(selection, gates, jnp.zeros((batch, length, 0), jnp.float32))


@functools.cache
def layer(num_active, path, **options):
  """Output and every gradient, in one compiled function per shape."""
  execution, implementation = path

  @jax.jit
  def run(trained, selection, dout, extras):
    def forward(trained):
      parts = dict(trained)
      x, k, v = (parts.pop(name) for name in ("x", "k", "v"))
      routing = routing_of(selection, parts.pop("gates"))
      return moh_attention(
        x,
        k,
        v,
        routing=routing,
        num_active=num_active,
        execution=execution,
        implementation=implementation,
        **parts,
        **extras,
        **options,
      )

    out, pullback = jax.vjp(forward, trained)
    return out, pullback(dout)[0]

  return run


def run_layer(case, num_active, path, extras=None, names=TRAINED, **options):
  trained = {name: case[name] for name in names}
  run = layer(num_active, path, **options)
  out, grads = run(trained, case["selection"], case["dout"], extras or {})
  return np.asarray(out), {name: np.asarray(g) for name, g in grads.items()}


SCALE = 0.5  # Not H ** -0.5 of any shape but one.


def run_as_swept(case, shape, path, **extras):
  """`run_layer` with the sweep's compiled function; masks optional."""
  options = {"is_causal": shape.causal, "scale": SCALE}
  if shape.causal and not shape.self_attention:
    options["q_offset"] = shape.S - shape.T
  heads = shape.N if shape.head_masks else 1
  everything = {
    "mask": np.ones((shape.B, heads, shape.T, shape.S), bool),
    "q_segment_ids": np.zeros((shape.B, shape.T), np.int32),
    "kv_segment_ids": np.zeros((shape.B, shape.S), np.int32),
  }
  return run_layer(case, shape.num_active, path, everything | extras, **options)


def run_oracle(case, seen, scale):
  arrays = [case[name] for name in TRAINED]
  out = oracles.moh_layer(*arrays, seen, scale)
  grads = oracles.moh_layer_grads(*arrays, seen, scale, case["dout"])
  # The gate of a head that is off is not a number anybody computes from.
  grads["gates"] *= case["selection"]
  return out, grads


def check(actual, expected, selection, what):
  out, grads = actual
  oracles.assert_close(out, expected[0], FORWARD, f"{what}: out")
  # A query with one visible key has no gradient: numbers of ordinary size
  # should cancel, and float32 leaves their rounding.
  floor = 0.05 * max(
    np.abs(gradient).max() for gradient in expected[1].values()
  )
  for name, gradient in grads.items():
    if name == "gates":
      assert np.isfinite(gradient).all(), what
      gradient = gradient * selection
    oracles.assert_close(
      gradient,
      expected[1][name],
      GRADIENT,
      f"{what}: d{name}",
      floor=max(floor, 1e-6),
    )


# ------------------------------------------------------- the oracle's oracle


def test_the_oracles_gradients_equal_its_own_finite_differences():
  shape = SHORT
  case = draw_one(shape)
  rng = np.random.default_rng(1)
  at = np.tile(np.arange(shape.T), (shape.B, 1))
  seen = oracles.visible(
    num_heads=shape.N,
    q_positions=at,
    kv_positions=at,
    causal=True,
    mask=rng.random((shape.B, 1, shape.T, shape.S)) < 0.6,
  )
  arrays = [case[name] for name in TRAINED]
  grads = oracles.moh_layer_grads(*arrays, seen, 0.7, case["dout"])
  for i, name in enumerate(TRAINED):

    def total(value, i=i):
      inputs = [*arrays[:i], value, *arrays[i + 1 :]]
      return (oracles.moh_layer(*inputs, seen, 0.7) * case["dout"]).sum()

    direction = rng.standard_normal(arrays[i].shape)
    expected = oracles.directional_derivative(total, arrays[i], direction)
    actual = (grads[name] * direction).sum()
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-7), name


# ----------------------------------------------------------------- the sweep


@each_shape
@both_paths
@strategies.sweep(10)
@hypothesis.given(data=st.data())
def test_outputs_and_every_gradient_equal_the_oracle(shape, path, data):
  drawn = data.draw(strategies.layer_cases(shape))
  case = vars(drawn)
  seen = oracles.visible(
    num_heads=shape.N,
    q_positions=drawn.q_positions,
    kv_positions=drawn.kv_positions,
    causal=shape.causal,
    mask=drawn.mask,
    q_segments=drawn.q_segments,
    kv_segments=drawn.kv_segments,
  )
  actual = run_as_swept(
    case,
    shape,
    path,
    mask=drawn.mask,
    q_segment_ids=drawn.q_segments,
    kv_segment_ids=drawn.kv_segments,
  )
  check(actual, run_oracle(case, seen, SCALE), drawn.selection, shape.name)
  # Padding is exactly nothing, whatever stands in it.
  out, grads = actual
  np.testing.assert_array_equal(out[~drawn.valid], 0.0)
  np.testing.assert_array_equal(grads["x"][~drawn.valid], 0.0)
  np.testing.assert_array_equal(grads["k"][~drawn.kv_valid], 0.0)
  np.testing.assert_array_equal(grads["v"][~drawn.kv_valid], 0.0)
  # A head that nobody picked leaves zeros in its weights' gradients.
  idle = ~drawn.selection.any(axis=(0, 1))
  np.testing.assert_array_equal(grads["w_o"][idle], 0.0)
  np.testing.assert_array_equal(grads["w_q"][:, idle], 0.0)


@each_shape
def test_dispatch_gives_the_same_bits_twice(shape):
  case = draw_one(shape)
  first = run_as_swept(case, shape, DISPATCH)
  again = run_as_swept(case, shape, DISPATCH)
  assert first[0].tobytes() == again[0].tobytes()
  for name in TRAINED:
    assert first[1][name].tobytes() == again[1][name].tobytes(), name


@pytest.mark.parametrize(
  "shape", strategies.LAYER_SHAPES[1:3], ids=lambda s: s.name
)
def test_reference_dispatch_equals_the_oracle(shape):
  case = draw_one(shape, seed=4)
  out = run_layer(case, shape.num_active, REFERENCE, is_causal=shape.causal)
  at_q, at_k = (np.tile(np.arange(n), (shape.B, 1)) for n in (shape.T, shape.S))
  seen = oracles.visible(
    num_heads=shape.N, q_positions=at_q, kv_positions=at_k, causal=shape.causal
  )
  expected = run_oracle(case, seen, shape.H**-0.5)
  check(out, expected, case["selection"], "reference")


def test_long_sequences_with_one_crowded_head_cross_many_tiles():
  shape = strategies.LayerShape(
    name="long", B=1, T=1100, S=1100, N=4, K=2, H=8, D=8, num_active=2,
    causal=True,
  )  # fmt: skip
  case = draw_one(shape)
  case["selection"][:, 100:, 0] = True  # Nearly all tokens, and a third head.
  case["selection"][:, 500:600] = False  # A run of padding inside.
  case["selection"] &= np.cumsum(case["selection"], axis=-1) <= 2
  case["gates"] = case["selection"] * np.float32(0.7)
  out = run_layer(case, 2, DISPATCH, is_causal=True)
  at = np.arange(shape.T)[None]
  seen = oracles.visible(
    num_heads=shape.N, q_positions=at, kv_positions=at, causal=True
  )
  expected = run_oracle(case, seen, shape.H**-0.5)
  check(out, expected, case["selection"], "long")


# ------------------------------------------------------------------ defaults


@pytest.mark.parametrize("path", [DENSE, DISPATCH, (None, None)], ids=str)
def test_defaults_see_every_key_scale_by_root_h_and_have_no_bias(path):
  shape = SHORT
  case = draw_one(shape)
  names = tuple(name for name in TRAINED if name != "b_q")
  actual = run_layer(case, shape.num_active, path, names=names)
  case["b_q"] = np.zeros_like(case["b_q"])
  seen = np.ones((shape.B, shape.N, shape.T, shape.S), bool)
  expected = run_oracle(case, seen, shape.H**-0.5)
  check(actual, expected, case["selection"], "defaults")


@both_paths
def test_tokens_may_pick_fewer_heads_than_num_active(path):
  shape = SHORT
  case = draw_one(shape)
  rng = np.random.default_rng(5)
  keep = rng.random(case["selection"].shape) < 0.5
  case["selection"] = case["selection"] & keep
  case["gates"] = case["gates"] * keep
  actual = run_as_swept(case, shape, path)
  at = np.tile(np.arange(shape.T), (shape.B, 1))
  seen = oracles.visible(
    num_heads=shape.N, q_positions=at, kv_positions=at, causal=True
  )
  expected = run_oracle(case, seen, SCALE)
  check(actual, expected, case["selection"], "fewer")


@both_paths
def test_queries_may_come_finished_instead_of_projected(path):
  shape = SHORT
  case = draw_one(shape)
  case["q"] = oracles.project(case["x"], case["w_q"], case["b_q"]).astype(
    np.float32
  )
  names = ("x", "q", "k", "v", "w_o", "gates")
  out, grads = run_layer(case, shape.num_active, path, names=names)
  seen = np.ones((shape.B, shape.N, shape.T, shape.S), bool)
  arrays = [case[name] for name in ("q", "k", "v", "w_o", "gates")]
  scale = shape.H**-0.5
  oracles.assert_close(out, oracles.moh_heads(*arrays, seen, scale), FORWARD)
  expected = oracles.moh_heads_grads(*arrays, seen, scale, case["dout"])
  for name, gradient in zip(("q", "k", "v", "w_o"), expected[:4], strict=True):
    oracles.assert_close(grads[name], gradient, GRADIENT, name)
  np.testing.assert_array_equal(grads["x"], 0.0)


@pytest.mark.parametrize(
  ("path", "given"), [(DENSE, False), (DISPATCH, False), (DISPATCH, True)]
)
def test_rope_turns_queries_by_their_positions(path, given):
  shape = SHORT
  case = draw_one(shape)
  at, extras = np.tile(np.arange(shape.T), (shape.B, 1)), {}
  if given:
    rng = np.random.default_rng(6)
    at = rng.integers(0, 50, (shape.B, shape.T)).astype(np.int32)
    extras = {"q_positions": at}
  out, grads = run_layer(case, shape.num_active, path, extras, rope_theta=100.0)
  q = oracles.rope(
    oracles.project(case["x"], case["w_q"], case["b_q"]), at, 100.0
  )
  arrays = (q, *(case[name] for name in ("k", "v", "w_o", "gates")))
  seen = np.ones((shape.B, shape.N, shape.T, shape.S), bool)
  scale = shape.H**-0.5
  oracles.assert_close(out, oracles.moh_heads(*arrays, seen, scale), FORWARD)
  dq = oracles.moh_heads_grads(*arrays, seen, scale, case["dout"])[0]
  dplain = oracles.rope(dq, -at, 100.0)  # the rotation's transpose
  oracles.assert_close(grads["b_q"], dplain.sum(axis=(0, 1)), GRADIENT)
  expected = np.einsum("btd,btnh->dnh", case["x"], dplain)
  oracles.assert_close(grads["w_q"], expected, GRADIENT)


def test_no_routing_means_every_head_on_and_ungated():
  shape = SHORT
  case = draw_one(shape)
  x, k, v = case["x"], case["k"], case["v"]
  weights = {"w_q": case["w_q"], "w_o": case["w_o"]}
  out = jax.jit(
    lambda: moh_attention(
      x, k, v, routing=None, num_active=shape.N, is_causal=True, **weights
    )
  )()
  ones = np.ones((shape.B, shape.T, shape.N))
  at = np.tile(np.arange(shape.T), (shape.B, 1))
  seen = oracles.visible(
    num_heads=shape.N, q_positions=at, kv_positions=at, causal=True
  )
  expected = oracles.moh_layer(
    x, k, v, *weights.values(), None, ones, seen, shape.H**-0.5
  )
  oracles.assert_close(out, expected, FORWARD)


@both_paths
def test_numpy_arrays_are_accepted_outside_of_jit(path):
  shape = SHORT
  case = draw_one(shape)
  arrays = {name: case[name] for name in ("x", "k", "v", "w_q", "w_o")}
  routing = routing_of(case["selection"], case["gates"])

  def run(arrays, routing):
    given = dict(arrays)
    x, k, v = (given.pop(name) for name in ("x", "k", "v"))
    return moh_attention(
      x,
      k,
      v,
      routing=routing,
      num_active=shape.num_active,
      execution=path[0],
      implementation=path[1],
      **given,
    )

  expected = jax.jit(run)(arrays, routing)
  oracles.assert_close(run(arrays, routing), expected, FORWARD)


# ---------------------------------------------------------------- identities


@both_paths
def test_later_tokens_have_zero_gradient_and_earlier_ones_do_not(path):
  shape = SHORT
  case = draw_one(shape)
  at = 3
  case["dout"] = np.where(
    np.arange(shape.T)[:, None] == at, case["dout"], 0.0
  ).astype(np.float32)
  _, grads = run_as_swept(case, shape, path)
  for name in ("k", "v"):
    np.testing.assert_array_equal(grads[name][:, at + 1 :], 0.0)
    assert (np.abs(grads[name][:, : at + 1]).max(axis=(0, 2, 3)) > 0).all()


@both_paths
def test_an_active_query_sees_keys_of_tokens_that_did_not_pick_its_head(path):
  # Queries are sparse, keys dense. Only the last token picks head 0.
  shape = SHORT
  case = draw_one(shape)
  case["selection"][:, :, 0] = False
  case["selection"][:, -1, :] = False
  case["selection"][:, -1, 0] = True
  case["gates"] = case["selection"].astype(np.float32)
  case["dout"][:, :-1] = 0.0
  _, grads = run_as_swept(case, shape, path)
  assert (np.abs(grads["v"][:, :, 0]).max(axis=-1) > 1e-6).all()
  np.testing.assert_array_equal(grads["v"][:, :, 1:], 0.0)


@both_paths
def test_permuted_heads_permute_nothing_in_the_output(path):
  shape = strategies.LAYER_SHAPES[0]  # G = 1
  case = draw_one(shape)
  out, _ = run_as_swept(case, shape, path)
  order = np.random.default_rng(0).permutation(shape.N)
  moved = case | {
    "k": case["k"][:, :, order],
    "v": case["v"][:, :, order],
    "w_q": case["w_q"][:, order],
    "w_o": case["w_o"][order],
    "b_q": case["b_q"][order],
    "gates": case["gates"][..., order],
    "selection": case["selection"][..., order],
  }
  oracles.assert_close(run_as_swept(moved, shape, path)[0], out, FORWARD)


@both_paths
def test_a_segment_equals_a_call_of_its_own(path):
  shape = SHORT
  case = draw_one(shape)
  cut = 3
  ids = np.tile((np.arange(shape.T) >= cut).astype(np.int32), (shape.B, 1))
  packed, _ = run_as_swept(
    case, shape, path, q_segment_ids=ids, kv_segment_ids=ids
  )
  single = case | {
    name: case[name][:, cut:]
    for name in ("x", "k", "v", "gates", "selection", "dout")
  }
  out, _ = run_layer(
    single, shape.num_active, path, is_causal=True, scale=SCALE
  )
  oracles.assert_close(packed[:, cut:], out, FORWARD)


@both_paths
def test_left_and_right_padding_agree(path):
  shape = SHORT
  case = draw_one(shape)
  pad, length = 3, shape.T - 3
  outs = []
  for side in ("left", "right"):
    shift = pad if side == "left" else 0
    moved = {
      name: np.roll(case[name], shift, axis=1) for name in ("x", "k", "v")
    }
    valid = np.roll(np.arange(shape.T) < length, shift)
    selection = np.roll(case["selection"], shift, axis=1) & valid[:, None]
    moved |= {
      "selection": selection,
      "gates": np.roll(case["gates"], shift, axis=1) * selection,
    }
    for name in ("x", "k", "v"):
      moved[name][:, ~valid] = strategies.HUGE
    mask = np.broadcast_to(valid, (shape.B, shape.N, shape.T, shape.S))
    out, _ = run_as_swept(case | moved, shape, path, mask=mask)
    outs.append(out[:, valid])
  oracles.assert_close(outs[0], outs[1], FORWARD)


@pytest.mark.slow
def test_layers_compose_with_vmap_and_remat():
  shape = SHORT
  case = draw_one(shape)
  names = ("x", "k", "v", "w_q", "w_o", "gates", "selection")
  arrays = [case[name] for name in names]

  def loss(x, k, v, w_q, w_o, gates, selection):
    out = moh_attention(
      x, k, v, w_q=w_q, w_o=w_o, routing=routing_of(selection, gates),
      num_active=shape.num_active, is_causal=True, execution="dispatch",
    )  # fmt: skip
    return jnp.sum(jnp.square(out))

  plain = jax.jit(jax.grad(loss, argnums=(0, 3)))(*arrays)
  remat = jax.jit(jax.grad(jax.checkpoint(loss), argnums=(0, 3)))(*arrays)
  axes = (None, None, None, 0, 0, None, None)
  stacked = [
    np.stack([a, a]) if axis == 0 else a
    for a, axis in zip(arrays, axes, strict=True)
  ]
  mapped = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 3)), in_axes=axes))(
    *stacked
  )
  for a, b, c in zip(plain, remat, mapped, strict=True):
    oracles.assert_close(b, a, GRADIENT)
    oracles.assert_close(c[1], a, GRADIENT)


# ----------------------------------------------- through the router, end to end


@pytest.mark.parametrize(
  ("plan", "form", "path"),
  [
    (strategies.HEAD_PLANS[0], "scaled", DISPATCH),
    (strategies.HEAD_PLANS[0], "paper", DISPATCH),
    (strategies.HEAD_PLANS[1], "scaled", DISPATCH),
    (strategies.HEAD_PLANS[2], "paper", DISPATCH),
    (strategies.HEAD_PLANS[3], "scaled", DISPATCH),
    (strategies.HEAD_PLANS[0], "scaled", DENSE),
    (strategies.HEAD_PLANS[2], "paper", DENSE),
  ],
)
def test_router_gradients_through_the_layer_equal_finite_differences(
  plan, form, path
):
  batch, length, width, size = 2, 7, 6, 4
  rng = np.random.default_rng(11)

  def normal(*dims):
    return rng.standard_normal(dims).astype(np.float32)

  config = MoHConfig(
    num_heads=plan.num_heads,
    num_shared=plan.num_shared,
    top_k=plan.top_k,
    gates=form,
  )
  params = RouterParams(
    routed=normal(width, plan.num_routed),
    kind=normal(width, 2) if plan.num_shared else None,
    shared=normal(width, plan.num_shared) if plan.num_shared > 1 else None,
  )
  x = normal(batch, length, width)
  k, v = (normal(batch, length, plan.num_heads, size) for _ in range(2))
  w_q = normal(width, plan.num_heads, size)
  w_o = normal(plan.num_heads, size, width)
  dout = normal(batch, length, width)
  at = np.tile(np.arange(length), (batch, 1))
  seen = oracles.visible(
    num_heads=plan.num_heads, q_positions=at, kv_positions=at, causal=True
  )

  @jax.jit
  def run(x, params):
    def loss(x, params):
      routing = route(x, params, config)
      out = moh_attention(
        x, k, v, w_q=w_q, w_o=w_o, routing=routing,
        num_active=config.num_active, is_causal=True, execution=path[0],
        implementation=path[1],
      )  # fmt: skip
      return jnp.sum(out * dout), routing.mask

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, params)

  (value, mask), (dx, dparams) = run(x, params)

  def oracle(x, params):
    gates, _ = oracles.two_stage_gates(
      x,
      *params,
      num_shared=plan.num_shared,
      top_k=plan.top_k,
      form=form,
      routed_mask=np.asarray(mask)[..., plan.num_shared :],
    )
    out = oracles.moh_layer(x, k, v, w_q, w_o, None, gates, seen, size**-0.5)
    return float((out * dout).sum())

  assert float(value) == pytest.approx(oracle(x, params), rel=1e-4, abs=1e-4)
  points = [("x", x, dx)] + [
    (name, getattr(params, name), getattr(dparams, name))
    for name in RouterParams._fields
    if getattr(params, name) is not None
  ]
  for name, point, gradient in points:
    gradient = np.asarray(gradient, np.float64)
    for _ in range(2):
      direction = rng.standard_normal(point.shape)
      direction /= np.linalg.norm(direction)

      def along(value, name=name):
        if name == "x":
          return oracle(value, params)
        return oracle(x, params._replace(**{name: value}))

      expected = oracles.directional_derivative(along, point, direction)
      actual = float((gradient * direction).sum())
      scale = float(np.linalg.norm(gradient))
      assert abs(actual - expected) <= 2e-5 * scale + 1e-6, (
        name,
        actual,
        expected,
      )


# ------------------------------------------------------------- low precision


def test_bfloat16_errs_at_most_twice_as_much_as_the_textbook_layer():
  shape = strategies.LAYER_SHAPES[3]
  shape = type(shape)(**(vars(shape) | {"num_active": 6}))
  case = draw_one(shape, seed=2)
  rounded = {
    name: np.asarray(jnp.asarray(case[name], jnp.bfloat16).astype(jnp.float32))
    for name in TRAINED
    if name != "gates"
  }
  rounded["gates"] = case["gates"]
  rounded["dout"] = np.asarray(
    jnp.asarray(case["dout"], jnp.bfloat16).astype(jnp.float32)
  )
  rounded["selection"] = case["selection"]
  at = np.tile(np.arange(shape.T), (shape.B, 1))
  seen = oracles.visible(
    num_heads=shape.N, q_positions=at, kv_positions=at, causal=True
  )
  scale = shape.H**-0.5
  exact_out, exact_grads = run_oracle(rounded, seen, scale)

  half = {
    name: value
    if name in ("gates", "selection")
    else jnp.asarray(value, jnp.bfloat16)
    for name, value in rounded.items()
  }

  @jax.jit
  def textbook(trained, dout):
    out, pullback = jax.vjp(
      lambda t: oracles.jnp_layer(*(t[n] for n in TRAINED), seen, scale),
      trained,
    )
    return out, pullback(dout)[0]

  base_out, base_grads = textbook({n: half[n] for n in TRAINED}, half["dout"])

  def error(value, exact):
    value = np.asarray(jnp.asarray(value).astype(jnp.float32), np.float64)
    return float(np.sqrt(np.mean((value - exact) ** 2)))

  for path in (DENSE, DISPATCH):
    out, grads = run_layer(half, shape.num_active, path, is_causal=True)
    assert out.dtype == jnp.bfloat16
    assert error(out, exact_out) <= 2 * error(base_out, exact_out), path
    for name in TRAINED:
      ours, theirs = grads[name], base_grads[name]
      assert ours.dtype == half[name].dtype, name
      if name == "gates":
        ours = ours * case["selection"]
        theirs = np.asarray(theirs) * case["selection"]
      limit = 3 * error(theirs, exact_grads[name])
      assert error(ours, exact_grads[name]) <= limit, (path, name)


# ----------------------------------------------------------------- bad input


def arguments(**changes):
  shape = SHORT
  case = draw_one(shape)
  given = {
    name: jnp.asarray(case[name]) for name in ("x", "k", "v", "w_q", "w_o")
  }
  given["routing"] = routing_of(case["selection"], case["gates"])
  given["num_active"] = shape.num_active
  return given | changes


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"x": jnp.ones((2, 7, 11))}, "`x`|`w_q`"),
    ({"x": jnp.ones((7, 10))}, "`x`"),
    ({"k": jnp.ones((2, 8, 3, 4))}, "`k`|`v`"),
    ({"v": jnp.ones((2, 7, 3, 5))}, "`v`"),
    ({"k": jnp.ones((2, 7, 4, 4)), "v": jnp.ones((2, 7, 4, 4))}, "`k`|heads"),
    ({"k": jnp.ones((1, 7, 3, 4)), "v": jnp.ones((1, 7, 3, 4))}, "`k`"),
    ({"w_q": jnp.ones((10, 6, 5))}, "`w_q`"),
    ({"w_o": jnp.ones((5, 4, 10))}, "`w_o`"),
    ({"w_q": None}, "`w_q`"),
    ({"q": jnp.ones((2, 7, 6, 4))}, "`q`"),
    ({"b_q": jnp.ones((6, 5))}, "`b_q`"),
    ({"mask": jnp.ones((2, 1, 7, 8), bool)}, "`mask`"),
    ({"mask": jnp.ones((2, 4, 7, 7), bool)}, "`mask`"),
    ({"q_segment_ids": jnp.zeros((2, 7), jnp.int32)}, "`kv_segment_ids`"),
    ({"kv_segment_ids": jnp.zeros((2, 7), jnp.int32)}, "`q_segment_ids`"),
    ({"num_active": 7}, "`num_active`"),
    ({"num_active": -1}, "`num_active`"),
    ({"execution": "sparse"}, "`execution`"),
    ({"implementation": "cuda"}, "`implementation`"),
  ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes, named):
  given = arguments(**changes)
  x, k, v = (given.pop(name) for name in ("x", "k", "v"))
  with pytest.raises(ValueError, match=named):
    moh_attention(x, k, v, **given)


def test_a_routing_of_other_heads_is_refused():
  given = arguments(
    routing=routing_of(jnp.ones((2, 7, 5), bool), jnp.ones((2, 7, 5)))
  )
  x, k, v = (given.pop(name) for name in ("x", "k", "v"))
  with pytest.raises(ValueError, match="`routing"):
    moh_attention(x, k, v, **given)


@pytest.mark.parametrize("execution", ["dense", "dispatch"])
@pytest.mark.parametrize(("batch", "length"), [(0, 7), (2, 0)])
def test_nothing_in_gives_nothing_out(execution, batch, length):
  out = moh_attention(
    jnp.ones((batch, length, 10)),
    jnp.ones((batch, length, 3, 4)),
    jnp.ones((batch, length, 3, 4)),
    w_q=jnp.ones((10, 6, 4)),
    w_o=jnp.ones((6, 4, 10)),
    routing=None,
    num_active=6,
    execution=execution,
  )
  assert out.shape == (batch, length, 10)
