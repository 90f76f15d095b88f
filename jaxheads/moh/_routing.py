"""Routers: which heads answer each token, and with what weight.

All arithmetic is float32 whatever the activations are, and ties go to the
lowest head, so that the same model picks the same heads on every backend.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxheads.head_order import HeadOrder, inverse, take
from jaxheads.moh._config import MoHConfig
from jaxheads.sharding import constrain
from pallas_kernels.packing import check_active
from pallas_kernels.shapes import check_shape
from pallas_kernels.value_checks import check_values


class Routing(NamedTuple):
  """Choice of heads for every token.

  Attributes:
    mask: True where (token, head) is active. Padding tokens have no head.
    gates: Weight of each head's output, float32; exactly 0 where `mask` is
      False, unless a straight-through gradient is dense.
    probs: Softmax over the routed heads before selection, float32; what the
      load-balance loss needs. The last axis is empty when nothing is routed.
  """

  mask: Bool[Array, "B T N"]
  gates: Float[Array, "B T N"]
  probs: Float[Array, "B T routed"]


def check_routing(routing: Routing, num_active: int) -> None:
  """Refuses routings that are not as a router makes them.

  Args:
    routing: Its `mask` and `gates`, of one shape.
    num_active: Most active heads of any token.
  Raises:
    TypeError: `mask` is not bool.
    ValueError: A token has more active heads, or a gate is not finite, is
      negative or belongs to a head that is off; see `jaxheads.checks`.
  """
  mask, gates = routing.mask, routing.gates
  if mask.dtype != jnp.bool_:
    raise TypeError(f"`routing.mask` must be bool, got {mask.dtype}.")
  check_active("routing.mask", mask, num_active)
  check_values(
    "routing.gates",
    (gates,),
    # A comparison with NaN is False.
    lambda gates: ((gates >= 0) & (gates < math.inf), gates),
    "be finite and not negative",
  )
  check_values(
    "routing.gates",
    (gates, mask),
    lambda gates, mask: (mask | (gates == 0), gates),
    "be 0 where `routing.mask` is False",
  )


class RouterParams(NamedTuple):
  """Bias-free maps of the two-stage router; absent ones are `None`.

  Attributes:
    routed: Scores of the routed heads (W_r), when some are routed.
    kind: Balance between shared and routed heads (W_h), when there are both.
    shared: Scores of the shared heads (W_s), when there are at least two.
  """

  routed: Float[Array, "D routed"] | None
  kind: Float[Array, "D 2"] | None
  shared: Float[Array, "D shared"] | None


def router_shapes(
  config: MoHConfig, embed_dim: int
) -> dict[str, tuple[int, int] | None]:
  """Shape of every member of `RouterParams`, `None` for those absent."""
  two_stage = config.router == "two_stage"
  both = config.routes and config.num_shared > 0
  return {
    "routed": (embed_dim, config.num_routed)
    if two_stage and config.routes
    else None,
    "kind": (embed_dim, 2) if two_stage and both else None,
    "shared": (embed_dim, config.num_shared)
    if two_stage and config.num_shared > 1
    else None,
  }


def router_size(config: MoHConfig, embed_dim: int) -> int:
  """Parameters of one layer's router."""
  shapes = router_shapes(config, embed_dim).values()
  return sum(math.prod(shape) for shape in shapes if shape is not None)


def init_router(
  key: Array,
  config: MoHConfig,
  embed_dim: int,
  *,
  stddev: float = 0.02,
  dtype: jnp.dtype | type = jnp.float32,
) -> RouterParams:
  """Random parameters of the two-stage router; all `None` for "query_norm".

  Args:
    key: PRNG key.
    config: Heads of the layer.
    embed_dim: Size of the layer's input.
    stddev: Standard deviation of the truncated normal.
    dtype: Of the parameters.

  Raises:
    ValueError: `embed_dim` is below 1.
  """
  if embed_dim < 1:
    raise ValueError(f"`embed_dim` must be at least 1, got {embed_dim}.")
  init = jax.nn.initializers.truncated_normal(stddev)
  shapes = router_shapes(config, embed_dim)
  keys = jax.random.split(key, len(shapes))
  return RouterParams(
    **{
      name: None if shape is None else init(k, shape, dtype)
      for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
  )


def route(
  x: Float[Array, "B T D"],
  params: RouterParams,
  config: MoHConfig,
  *,
  token_mask: Bool[Array, "B T"] | None = None,
) -> Routing:
  """Heads and gates by the two-stage router.

  With p = softmax(x W_r), (a1, a2) = softmax(x W_h), s = softmax(x W_s) and
  P the selected heads, the gates are

    paper:   shared a1 s_i,        routed a2 p_i
    scaled:  shared 2 a1 S s_i,    routed 2 a2 top_k p_i / sum_{j in P} p_j

  so that neutral scaled gates are exactly 1. Without shared heads the factor
  of a2 is dropped, without routed heads that of a1.

  Args:
    x: The layer's input, the same that is projected to queries.
    params: See `init_router`.
    config: Heads of the layer, `router="two_stage"`.
    token_mask: True for real tokens; padding activates no head.

  Raises:
    ValueError: `config` asks for another router, a needed map is missing or of
      the wrong shape, or `x` is not finite at a real token (outside of jit;
      under it see `jaxheads.checks`).

  Source:
    MoH Eq. 5-6; the scaled form is that of the released code.
  """
  if config.router != "two_stage":
    raise ValueError(
      f"`config.router` must be 'two_stage', got {config.router!r}; "
      "use `route_by_query_norm`."
    )
  sizes: dict[str, int] = {}
  check_shape("x", x, "B T D", sizes)
  check_shape("token_mask", token_mask, "B T", sizes)
  _check_params(params, config, sizes["D"])
  _check_finite("x", x, token_mask)
  x = x.astype(jnp.float32)
  scaled = config.gates == "scaled"
  shared_total: Array | float = 1.0
  routed_total: Array | float = 1.0
  if params.kind is not None:
    kind = jax.nn.softmax(_project(x, params.kind)) * (2.0 if scaled else 1.0)
    shared_total, routed_total = kind[..., :1], kind[..., 1:]

  shape = (*x.shape[:-1], config.num_shared)
  if params.shared is None:  # Zero or one shared head: nothing to weigh.
    shared = jnp.ones(shape, jnp.float32)
  else:
    shared = jax.nn.softmax(_project(x, params.shared))
    shared *= config.num_shared if scaled else 1.0
  shared *= shared_total

  if params.routed is None:
    routed_mask = jnp.zeros((*x.shape[:-1], 0), bool)
    routed = probs = jnp.zeros((*x.shape[:-1], 0), jnp.float32)
  else:
    logits = _project(x, params.routed)
    probs = jax.nn.softmax(logits)
    routed_mask = _select(logits, config)
    if scaled:
      # Renormalising over the selected heads is a softmax over their logits,
      # which cannot underflow.
      routed = config.top_k * jax.nn.softmax(logits, axis=-1, where=routed_mask)
    else:
      routed = jnp.where(routed_mask, probs, 0.0)
    routed *= routed_total
  return _join(routed_mask, shared, routed, probs, token_mask)


def route_by_query_norm(
  q: Float[Array, "B T N H"],
  config: MoHConfig,
  *,
  token_mask: Bool[Array, "B T"] | None = None,
  head_order: HeadOrder | None = None,
) -> Routing:
  """Heads by the largest query norms; gates are 1, with a surrogate gradient.

  Forward the gates are the binary mask. Backward they act as the softmax of
  the norms divided by their standard deviation over the routed heads of the
  token: for the selected heads, or for all if `config.straight_through` is
  "dense".

  Args:
    q: Queries of all heads, before or after RoPE (which keeps norms).
    config: Heads of the layer, `router="query_norm"`.
    token_mask: True for real tokens; padding activates no head.
    head_order: Which head each of the queries is of; `None` is head 0, 1, ...
      The routing is in the heads' own order.

  Raises:
    ValueError: `config` asks for another router or another head count, or `q`
      is not finite at a real token (outside of jit; under it see
      `jaxheads.checks`).

  Source:
    MoH section 4.4, Eq. 9-10, and the released LLaMA3 model. Differs: ranks
    by the norms themselves in float32, so equal norms give no NaN. The paper
    leaves the surrogate open; "selected" is the one that sparse execution can
    compute.
  """
  if config.router != "query_norm":
    raise ValueError(
      f"`config.router` must be 'query_norm', got {config.router!r}; "
      "use `route`."
    )
  sizes = {"N": config.num_heads}
  check_shape("q", q, "B T N H", sizes)
  check_shape("token_mask", token_mask, "B T", sizes)
  _check_finite("q", q, token_mask)
  wide = q.astype(jnp.float32)
  square = constrain(jnp.sum(wide * wide, axis=-1), "batch", "length", None)
  if head_order is not None:
    square = take(square, inverse(head_order), axis=-1)
  square = square[..., config.num_shared :]
  # The square root has an infinite slope at 0.
  norms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
  probs = jax.nn.softmax(norms / _std(norms)) if config.routes else norms
  routed_mask = _select(norms, config)
  surrogate = probs - jax.lax.stop_gradient(probs)  # 0 with a gradient
  if config.straight_through == "selected":
    surrogate = jnp.where(routed_mask, surrogate, 0.0)
  routed = routed_mask.astype(jnp.float32) + surrogate
  shared = jnp.ones((*q.shape[:2], config.num_shared), jnp.float32)
  return _join(routed_mask, shared, routed, probs, token_mask)


def _std(norms: Float[Array, "B T routed"]) -> Float[Array, "B T 1"]:
  """Unbiased standard deviation over heads, 1 where it is 0 or undefined."""
  if norms.shape[-1] < 2:
    return jnp.ones((*norms.shape[:-1], 1), jnp.float32)
  variance = jnp.var(norms, axis=-1, keepdims=True, ddof=1)
  positive = variance > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 1.0)


def _select(
  scores: Float[Array, "B T routed"], config: MoHConfig
) -> Bool[Array, "B T routed"]:
  """Mask of the best `top_k` heads, in whole groups; lowest index wins ties."""
  *batch, routed = scores.shape
  if config.top_k == routed:
    return jnp.ones(scores.shape, bool)
  groups = routed // config.group_size
  scores = scores.reshape(*batch, groups, config.group_size).mean(axis=-1)
  # By comparing all with all: of a `top_k` devices would exchange the operand.
  scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)
  other, own = scores[..., None, :], scores[..., :, None]
  index = jnp.arange(groups)
  ahead = (other > own) | ((other == own) & (index < index[:, None]))
  chosen = jnp.sum(ahead, axis=-1) < config.top_k // config.group_size
  return jnp.repeat(chosen, config.group_size, axis=-1)


def _join(
  routed_mask: Bool[Array, "B T routed"],
  shared: Float[Array, "B T shared"],
  routed: Float[Array, "B T routed"],
  probs: Float[Array, "B T routed"],
  token_mask: Bool[Array, "B T"] | None,
) -> Routing:
  mask = jnp.concatenate([jnp.ones(shared.shape, bool), routed_mask], axis=-1)
  gates = jnp.concatenate([shared, routed], axis=-1)
  mask, gates = (constrain(x, "batch", "length", None) for x in (mask, gates))
  if token_mask is not None:
    mask &= token_mask[..., None]
    gates = jnp.where(token_mask[..., None], gates, 0.0)
  return Routing(mask, gates, probs)


def _project(
  x: Float[Array, "B T D"], w: Float[Array, "D heads"]
) -> Float[Array, "B T heads"]:
  # Full precision also where the hardware multiplies in bfloat16 by default:
  # the choice of heads must not depend on the chip.
  logits = jnp.einsum(
    "btd,dn->btn",
    x,
    w.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  return constrain(logits, "batch", "length", None)


def _check_finite(
  name: str,
  array: Float[Array, "B T *rest"],
  token_mask: Bool[Array, "B T"] | None,
) -> None:
  """Refuses NaN and infinity, but in padding, which may hold anything."""
  padding = () if token_mask is None else (~token_mask,)

  def allowed(array: Any, *padding: Any) -> tuple[Any, Any]:
    fine = abs(array) < math.inf  # A comparison with NaN is False.
    for tokens in padding:
      fine |= tokens.reshape(*tokens.shape, *(1,) * (array.ndim - 2))
    return fine, array

  check_values(name, (array, *padding), allowed, "be finite")


def _check_params(
  params: RouterParams, config: MoHConfig, embed_dim: int
) -> None:
  for name, shape in router_shapes(config, embed_dim).items():
    value = getattr(params, name)
    got = None if value is None else value.shape
    if got != shape:
      raise ValueError(f"`params.{name}` must be {shape}, got {got}.")
