"""Which heads each token uses, and how often each head is used."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxheads.head_order import HeadOrder, take
from jaxheads.moh import (
  MoHConfig,
  RouterParams,
  Routing,
  load_balance_loss,
  route,
  route_by_query_norm,
)


def pick_heads(
  x: Float[Array, "B T D"],
  q: Float[Array, "B T N H"] | None,
  *,
  moh: MoHConfig | None,
  params: RouterParams,
  num_heads: int,
  token_mask: Bool[Array, "B T"] | None,
  head_order: HeadOrder | None,
) -> Routing | None:
  """The routing of a layer; `None` where every head is on and ungated.

  Args:
    x: Input of the layer.
    q: Queries before RoPE; needed to route by their norm.
    moh: Which heads are shared and how many are picked.
    params: The two-stage router's.
    num_heads: Query heads N.
    token_mask: True for real tokens; the others use no head.
    head_order: Which heads the queries are of.
  """
  if moh is None:
    if token_mask is None:
      return None
    mask = jnp.broadcast_to(token_mask[..., None], (*x.shape[:2], num_heads))
    return Routing(mask, mask.astype(jnp.float32), jnp.zeros((*x.shape[:2], 0)))
  if moh.router == "query_norm":
    assert q is not None
    return route_by_query_norm(
      q, moh, token_mask=token_mask, head_order=head_order
    )
  return route(x, params, moh, token_mask=token_mask)


def stored(
  routing: Routing | None, head_order: HeadOrder | None
) -> Routing | None:
  """The routing with heads as they are stored."""
  if routing is None or head_order is None:
    return routing
  return routing._replace(
    mask=take(routing.mask, head_order, axis=-1),
    gates=take(routing.gates, head_order, axis=-1),
  )


def head_load(
  routing: Routing, token_mask: Bool[Array, "B T"] | None
) -> Float[Array, " N"]:
  """Fraction of the real tokens for which each head is active."""
  weight = (
    jnp.ones(routing.mask.shape[:2], jnp.float32)
    if token_mask is None
    else token_mask.astype(jnp.float32)
  )
  load = jnp.einsum("bt,btn->n", weight, routing.mask.astype(jnp.float32))
  return load / jnp.maximum(weight.sum(), 1.0)


def balance_loss(
  routing: Routing, moh: MoHConfig, token_mask: Bool[Array, "B T"] | None
) -> Float[Array, ""]:
  """The load-balance loss of the routed heads."""
  return load_balance_loss(
    routing.probs, routing.mask[..., moh.num_shared :], token_mask=token_mask
  )
