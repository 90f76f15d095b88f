import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads.models import _loss, token_nats
from jaxheads.sharding import MeshShape, make_mesh

B, T, D, V = 4, 12, 6, 10


@pytest.fixture
def problem():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  table = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
  return x, table, targets


def scan_lengths(jaxpr):
  """Of the loops of a program, also inside of other operations."""
  found = set()
  for equation in jaxpr.eqns:
    if equation.primitive.name == "scan":
      found.add(equation.params["length"])
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        found |= scan_lengths(inner)
  return found


def score(x, table):
  return x @ table


def test_nats_are_those_of_numpy(problem):
  x, table, targets = problem
  logits = np.asarray(x, np.float64) @ np.asarray(table, np.float64)
  right = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
  expected = np.log(np.exp(logits).sum(-1)) - right
  np.testing.assert_allclose(
    token_nats(x @ table, targets), expected, rtol=1e-5
  )


@pytest.mark.parametrize("axes", [{}, dict(fsdp=2, context=2, heads=2)])
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_parts_change_nothing(problem, monkeypatch, parts, axes):
  x, table, targets = problem

  def whole(x, table):
    nats = token_nats(score(x, table), targets)
    return jnp.sum(nats * jnp.cos(jnp.arange(T))), nats

  def in_parts(x, table):
    nats = _loss.nats_in_parts(x, table, targets)
    return jnp.sum(nats * jnp.cos(jnp.arange(T))), nats

  shape = MeshShape(**axes)
  # So many bytes have the logits of one part on one device.
  rows = B * T * V * 4 // (shape.size * parts)
  monkeypatch.setattr(_loss, "_MOST_LOGITS_BYTES", rows)
  expected = jax.grad(whole, (0, 1), has_aux=True)(x, table)
  with jax.set_mesh(make_mesh(shape, jax.devices()[: shape.size])):
    run = jax.jit(jax.grad(in_parts, (0, 1), has_aux=True))
    assert scan_lengths(jax.make_jaxpr(in_parts)(x, table).jaxpr) == {parts}
    found = run(x, table)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    found,
    expected,
  )
