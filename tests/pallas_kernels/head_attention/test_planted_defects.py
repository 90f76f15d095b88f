"""Checks of the checks: a planted defect must make one of them fail.

Each defect is a mistake that an implementation could make and that goes
unseen on easy inputs. It is planted in a working implementation; the cases
named beside it, taken from `s2_cases`, must notice it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.head_attention import (
  HeadContexts,
  Strided,
  api,
  head_attention,
  reference,
  xla,
)
from tests.s2_cases import check, named

honest = reference.forward


def changed_rules(change):
  """Attends under other rules than it was given."""

  def attention(settings, operands):
    old = settings.pattern
    pattern = HeadContexts(
      old.block_size,
      tuple(change(n, old) for n in range(old.num_heads)),
      old.is_causal,
    )
    return honest(dataclasses.replace(settings, pattern=pattern), operands)

  return attention


def changed_strided(**change):
  """Changes fields of the strided rules: value from the old rule."""

  def rule(n, pattern):
    old = pattern.rules[n]
    if not isinstance(old, Strided) or old.stride == 1:
      return old
    return dataclasses.replace(
      old, **{name: new(old) for name, new in change.items()}
    )

  return changed_rules(rule)


def changed_settings(**change):
  def attention(settings, operands):
    new = {name: value(settings) for name, value in change.items()}
    return honest(dataclasses.replace(settings, **new), operands)

  return attention


def changed_operands(change):
  return lambda settings, operands: honest(settings, change(operands))


def changed_results(change):
  return lambda settings, operands: change(*honest(settings, operands))


def wrong_groups(settings, operands):
  """Query head n reads KV head n mod K."""
  heads, kv_heads = operands.q.shape[2], operands.k.shape[2]
  order = jnp.arange(heads) % kv_heads
  return honest(
    settings,
    operands._replace(k=operands.k[:, :, order], v=operands.v[:, :, order]),
  )


def leaks_first_tokens_of_the_block(settings, operands):
  """Keys after the query, inside its block, are not hidden."""
  pattern = dataclasses.replace(settings.pattern, is_causal=False)
  return honest(dataclasses.replace(settings, pattern=pattern), operands)


def mean_where_nothing_is_seen(out, lse):
  empty = jnp.isneginf(lse).swapaxes(1, 2)[..., None]
  return jnp.where(empty, jnp.ones_like(out), out), lse


def masks_by_adding(settings, operands):
  """Hides by adding -1e6 to the logits, as the released code does."""
  hidden = ~reference.visible(
    settings.pattern,
    jnp.arange(operands.q.shape[1]) + settings.q_offset,
    operands.k.shape[1],
  )
  groups = operands.q.shape[2] // operands.k.shape[2]
  k = jnp.repeat(operands.k, groups, axis=2)
  v = jnp.repeat(operands.v, groups, axis=2)
  logits = settings.scale * jnp.einsum("btnh,bsnh->bnts", operands.q, k)
  logits = logits + jnp.where(hidden, jnp.float32(-1e6), 0.0)[None]
  lse = jax.nn.logsumexp(logits, axis=-1)
  weights = jnp.exp(logits - lse[..., None])
  return jnp.einsum("bnts,bsnh->btnh", weights, v), lse


FORWARD = {
  # The pattern.
  "residues swapped": (
    changed_rules(lambda n, p: p.rules[(n + 1) % p.num_heads]),
    "prime length",
  ),
  "sign of the residue": (
    changed_strided(residue=lambda r: -r.residue % r.stride),
    "prime length",
  ),
  "offset forgotten": (
    changed_strided(residue=lambda r: (r.residue + 1) % r.stride),
    "offset 1, as Phi-3-small",
  ),
  "one residue for a group": (
    changed_rules(lambda n, p: p.rules[n // 4 * 4]),
    "residues differ inside a group",
  ),
  "window a block too long": (
    changed_strided(local=lambda r: r.local + 1),
    "prime length",
  ),
  "window a block too short": (
    changed_strided(local=lambda r: r.local - 1),
    "prime length",
  ),
  "no remote blocks": (
    changed_strided(stride=lambda r: 0, residue=lambda r: 0),
    "prime length",
  ),
  "first blocks forgotten": (
    changed_strided(sinks=lambda r: 0),
    "window with first blocks",
  ),
  "dense heads first": (
    changed_rules(lambda n, p: p.rules[::-1][n]),
    "dense heads among sparse ones",
  ),
  "not causal in a block": (
    leaks_first_tokens_of_the_block,
    "a block and one",
  ),
  "causal where it should not be": (
    changed_settings(
      pattern=lambda s: dataclasses.replace(s.pattern, is_causal=True)
    ),
    "any mask, not causal",
  ),
  # Positions.
  "offset of a token": (
    changed_settings(q_offset=lambda s: s.q_offset + 1),
    "last queries, off the block",
  ),
  "offset rounded to a block": (
    changed_settings(q_offset=lambda s: s.q_offset // 8 * 8),
    "last queries, off the block",
  ),
  "queries always the last": (
    changed_settings(q_offset=lambda s: 90 - 21),
    "keys after the last query",
  ),
  # Arithmetic.
  "scale left at its default": (
    changed_settings(scale=lambda s: 8**-0.5),
    "scale",
  ),
  "no soft cap": (changed_settings(logits_soft_cap=lambda s: None), "soft cap"),
  "cap before scale": (
    changed_settings(logits_soft_cap=lambda s: s.logits_soft_cap * s.scale),
    "soft cap",
  ),
  "segments forgotten": (
    changed_operands(
      lambda o: o._replace(q_segment_ids=None, kv_segment_ids=None)
    ),
    "packed",
  ),
  "group order": (wrong_groups, "group of 4, head sizes 24 and 40"),
  "hidden by adding": (masks_by_adding, "keys after the last query"),
  # Results.
  "lse of the other sign": (
    changed_results(lambda out, lse: (out, -lse)),
    "prime length",
  ),
  "lse in base 2": (
    changed_results(lambda out, lse: (out, lse / jnp.log(2.0))),
    "prime length",
  ),
  "lse finite where nothing is seen": (
    changed_results(lambda out, lse: (out, jnp.maximum(lse, -1e30))),
    "context ranges, empty rows",
  ),
  "something where nothing is seen": (
    changed_results(mean_where_nothing_is_seen),
    "context ranges, empty rows",
  ),
}


@pytest.mark.parametrize("defect", FORWARD)
def test_a_wrong_result_is_noticed(defect, monkeypatch):
  attention, name = FORWARD[defect]
  monkeypatch.setattr(reference, "forward", attention)

  # A door of its own: what was compiled without the defect is not reused.
  def door(*args, **options):
    return head_attention(*args, **options)

  with pytest.raises(AssertionError):
    check(named(name), "reference", door)


def pull(settings, operands, d_out, d_lse):
  """True gradients of q, k, v."""
  _, pullback = jax.vjp(
    lambda q, k, v: honest(settings, operands._replace(q=q, k=k, v=v)),
    *operands[:3],
  )
  return pullback((d_out, d_lse))


def true_backward(settings, operands, out, lse, d_out, d_lse):
  del out, lse
  return pull(settings, operands, d_out, d_lse)


def no_group_sum(settings, operands, out, lse, d_out, d_lse):
  """dk and dv of the first query head of each group only."""
  del out, lse
  dq, *_ = pull(settings, operands, d_out, d_lse)
  group = operands.q.shape[2] // operands.k.shape[2]
  first = jnp.arange(operands.q.shape[2]) % group == 0
  _, dk, dv = pull(
    settings,
    operands,
    jnp.where(first[:, None], d_out, 0.0),
    jnp.where(first[:, None], d_lse, 0.0),
  )
  return dq, dk, dv


def no_d_lse(settings, operands, out, lse, d_out, d_lse):
  del out, lse
  return pull(settings, operands, d_out, jnp.zeros_like(d_lse))


def d_lse_transposed(settings, operands, out, lse, d_out, d_lse):
  """[B, N, T] read as [B, T, N], as in the released code."""
  del out, lse
  B, N, T = d_lse.shape
  return pull(settings, operands, d_out, d_lse.reshape(B, T, N).swapaxes(1, 2))


def d_lse_subtracted(settings, operands, out, lse, d_out, d_lse):
  del out, lse
  return pull(settings, operands, d_out, -d_lse)


def d_lse_unguarded(settings, operands, out, lse, d_out, d_lse):
  """Rows that see nothing: 0 times what came in."""
  grads = true_backward(settings, operands, out, lse, d_out, d_lse)
  poison = 0.0 * jnp.where(jnp.isneginf(lse), d_lse, 0.0).sum()
  return tuple(grad + poison for grad in grads)


def dq_not_scaled(settings, operands, out, lse, d_out, d_lse):
  dq, dk, dv = true_backward(settings, operands, out, lse, d_out, d_lse)
  return dq / settings.scale, dk, dv


def dk_without_last_query(settings, operands, out, lse, d_out, d_lse):
  """The tail of a query tile is left out of dk and dv."""
  grads = true_backward(settings, operands, out, lse, d_out, d_lse)
  d_out, d_lse = d_out.at[:, -1].set(0.0), d_lse.at[:, :, -1].set(0.0)
  cut = true_backward(settings, operands, out, lse, d_out, d_lse)
  return grads[0], *cut[1:]


def no_slope_of_the_cap(settings, operands, out, lse, d_out, d_lse):
  """Straight through the soft cap: as if the logits were capped already."""
  grads = true_backward(settings, operands, out, lse, d_out, d_lse)
  plain = dataclasses.replace(settings, logits_soft_cap=None)
  return pull(plain, operands, d_out, d_lse)[0], *grads[1:]


def backward_of_a_superset(settings, operands, out, lse, d_out, d_lse):
  """dq without the diagonal's causal mask."""
  grads = true_backward(settings, operands, out, lse, d_out, d_lse)
  pattern = dataclasses.replace(settings.pattern, is_causal=False)
  wider = dataclasses.replace(settings, pattern=pattern)
  return pull(wider, operands, d_out, d_lse)[0], *grads[1:]


BACKWARD = {
  "group sum dropped": (no_group_sum, "group of 2, head sizes 24 and 8"),
  "gradient of lse dropped": (no_d_lse, "prime length"),
  "gradient of lse transposed": (d_lse_transposed, "prime length"),
  "sign of the gradient of lse": (d_lse_subtracted, "prime length"),
  "NaN from rows that see nothing": (
    d_lse_unguarded,
    "context ranges, empty rows",
  ),
  "dq not scaled": (dq_not_scaled, "prime length"),
  "last query dropped": (dk_without_last_query, "a block and one"),
  "slope of the soft cap": (no_slope_of_the_cap, "soft cap"),
  "backward of a superset": (backward_of_a_superset, "a block and one"),
}


def plant(monkeypatch, forward, backward):
  """`xla` becomes these two; a door that compiles anew."""
  monkeypatch.setattr(xla, "forward", forward)
  monkeypatch.setattr(xla, "backward", backward)
  return lambda *args, **options: head_attention(*args, **options)


@pytest.mark.parametrize("defect", BACKWARD)
def test_a_wrong_gradient_is_noticed(defect, monkeypatch):
  backward, name = BACKWARD[defect]
  door = plant(monkeypatch, honest, backward)
  with pytest.raises(AssertionError):
    check(named(name), "xla", door)


@pytest.mark.parametrize("name", ["soft cap", "context ranges, empty rows"])
def test_without_a_defect_nothing_is_noticed(name, monkeypatch):
  door = plant(monkeypatch, honest, true_backward)
  check(named(name), "xla", door)


def test_wrong_sinks_are_noticed(monkeypatch):
  with_sinks = api._with_sinks
  case = named("sinks of rows that see nothing")
  for defect in (
    lambda out, lse, sinks: (out, with_sinks(out, lse, sinks)[1]),
    lambda out, lse, sinks: (with_sinks(out, lse, sinks)[0], lse),
    lambda out, lse, sinks: with_sinks(out, lse, sinks[::-1]),
    lambda out, lse, sinks: with_sinks(out, lse, jax.lax.stop_gradient(sinks)),
  ):
    monkeypatch.setattr(api, "_with_sinks", defect)
    with pytest.raises(AssertionError):
      check(
        case, "reference", lambda *a, **options: head_attention(*a, **options)
      )
