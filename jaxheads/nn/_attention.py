"""Attention as an NNX module: routed heads, sharded contexts, or neither."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_kernel_init
from jaxtyping import Array, Bool, Float, Int

from jaxheads import head_order as head_order_lib
from jaxheads import s2
from jaxheads.decoding import decode_attention
from jaxheads.head_order import HeadOrder, take
from jaxheads.moh import (
  MoHConfig,
  RouterParams,
  Routing,
  moh_attention,
  router_shapes,
)
from jaxheads.moh._execution import (
  Execution,
  choose_execution,
  combine_heads,
)
from jaxheads.nn import _cache, _checks, _dropout, _routing
from jaxheads.nn._patterned import (
  dense_mask,
  patterned_attention,
)
from jaxheads.nn._variables import AuxLoss, RoutingStats
from jaxheads.rope import apply_rope
from jaxheads.sharding import axis_size, chunks, constrain, context
from pallas_kernels import platform
from pallas_kernels.head_attention import HeadContexts

# New tokens that read a cache in place; more are a prompt.
_MOST_NEW_TOKENS = 16
# Attention weights of a layer from which a CPU does not keep them: a quarter
# of a gibibyte in float32.
_MANY_WEIGHTS = 2**26


class HeadAttention(nnx.Module):
  """Multi-head attention whose heads may be routed, sharded, both or neither.

  Drops in for `nnx.MultiHeadAttention`: the same arguments, call and
  parameter names (`query`, `key`, `value`, `out`), so its state can be loaded
  into this module. With `moh=None` and `pattern=None` it computes the same.

  `moh` lets each token pick its heads (see `MoHAttention`), `pattern` lets
  each head see its own part of the context (see `S2Attention`). With both,
  every head is computed over what it sees and then gated.

  After a call, `aux_loss` (an `AuxLoss`; only if heads are routed) holds the
  load-balance loss and `head_load` (a `RoutingStats`) the fraction of tokens
  for which each head was active. See `jaxheads.nn.auxiliary_loss`. A call
  writes them, as `nnx.BatchNorm` writes its statistics: pass the module
  through `nnx.jit` and `nnx.grad`, or split and merge it, rather than closing
  over it in `jax.jit`.

  Source:
    MoH, https://arxiv.org/abs/2410.11842.
    S2-Attention, https://arxiv.org/abs/2407.17678.
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    in_kv_features: int | None = None,
    *,
    moh: MoHConfig | None = None,
    pattern: HeadContexts | None = None,
    head_order: Sequence[int] | None = None,
    rope_theta: float | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    broadcast_dropout: bool = True,
    dropout_rate: float = 0.0,
    deterministic: bool | None = None,
    precision: Any = None,
    kernel_init: nnx.Initializer = default_kernel_init,
    out_kernel_init: nnx.Initializer | None = None,
    bias_init: nnx.Initializer = nnx.initializers.zeros_init(),
    out_bias_init: nnx.Initializer | None = None,
    router_init: nnx.Initializer = nnx.initializers.truncated_normal(0.02),
    use_bias: bool = True,
    decode: bool = False,
    normalize_qk: bool = False,
    execution: Execution | None = None,
    implementation: str | None = None,
    keep_rngs: bool = True,
    rngs: nnx.Rngs,
  ):
    """Creates the parameters.

    Args:
      num_heads: Query heads N.
      in_features: Features of `inputs_q`.
      qkv_features: Features of all query heads together; `in_features` if
        None. The head size is `qkv_features // num_heads`.
      out_features: Features of the output; `in_features` if None.
      num_kv_heads: Key and value heads; `num_heads` if None.
      in_kv_features: Features of `inputs_k` and `inputs_v`; `in_features` if
        None.
      moh: Which heads are shared and how many are picked; None for plain
        multi-head attention.
      pattern: What each head sees, counted from the first key, padding
        included; None for everything. See `jaxheads.s2`.
      head_order: The head at each place where heads are stored, so that
        devices that hold consecutive places have equal work; query heads of
        one KV head stay together. None is their own order. The parameters,
        the cache and what `project_q`, `project_kv` and `attend_with` hand
        over are in the stored order; masks, the pattern, routers, statistics
        and what is sown are in the heads' own. Outputs do not depend on it.
      rope_theta: Base of rotary position embeddings; None for none.
      dtype: Of the computation; inferred from inputs and parameters if None.
      param_dtype: Of the parameters.
      broadcast_dropout: Whether one dropout mask serves the whole batch.
      dropout_rate: Of attention weights; while it acts, all heads are
        computed, with a `pattern` through all the weights.
      deterministic: Default of the call's argument: True switches dropout and
        the load-balance loss off. None is False here, unless there is dropout.
      precision: Of the projections.
      kernel_init: Of query, key and value projections.
      out_kernel_init: Of the output projection; `kernel_init` if None.
      bias_init: Of query, key and value biases.
      out_bias_init: Of the output bias; `bias_init` if None.
      router_init: Of the two-stage router's maps.
      use_bias: Whether the projections have biases. The router never has.
      decode: Default of the call's argument: use the cache.
      normalize_qk: Layer-normalise queries and keys per head.
      execution: See `jaxheads.moh.moh_attention`; with a `pattern` and no
        `moh`, "dense" or None. What needs every head (`sow_weights`, dropout,
        `straight_through="dense"`) takes "dense" and logs it.
      implementation: See `jaxheads.moh.moh_attention`, or with a `pattern`
        `jaxheads.attention`.
      keep_rngs: Keep a fork of `rngs` for dropout.
      rngs: Random streams `params` and `dropout`.

    Raises:
      ValueError: Head counts do not add up; the message names the argument.
    """
    self.num_heads = num_heads
    self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    self.in_features = in_features
    self.qkv_features = in_features if qkv_features is None else qkv_features
    self.out_features = in_features if out_features is None else out_features
    self.in_kv_features = (
      in_features if in_kv_features is None else in_kv_features
    )
    _checks.check_sizes(
      num_heads=num_heads,
      num_kv_heads=self.num_kv_heads,
      qkv_features=self.qkv_features,
      moh=moh,
      pattern=pattern,
      rope_theta=rope_theta,
      dropout_rate=dropout_rate,
      execution=execution,
    )
    self.head_dim = self.qkv_features // num_heads
    self.moh = moh
    self.pattern = pattern
    self.head_order = head_order_lib.checked(
      head_order, num_heads, self.num_kv_heads, name="head_order"
    )
    self.rope_theta = rope_theta
    self.dtype = dtype
    self.broadcast_dropout = broadcast_dropout
    self.dropout_rate = dropout_rate
    self.deterministic = deterministic
    self.decode = decode
    self.execution: Execution | None = execution
    self.implementation = implementation

    def linear(features_in: int, heads: int) -> nnx.LinearGeneral:
      return nnx.LinearGeneral(
        features_in,
        (heads, self.head_dim),
        kernel_init=kernel_init,
        bias_init=bias_init,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision,
        rngs=rngs,
      )

    def layer_norm() -> nnx.LayerNorm:
      return nnx.LayerNorm(
        self.head_dim,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
      )

    self.query = linear(in_features, num_heads)
    self.key = linear(self.in_kv_features, self.num_kv_heads)
    self.value = linear(self.in_kv_features, self.num_kv_heads)
    self.query_ln = nnx.data(layer_norm() if normalize_qk else None)
    self.key_ln = nnx.data(layer_norm() if normalize_qk else None)
    self.out = nnx.LinearGeneral(
      (num_heads, self.head_dim),
      self.out_features,
      axis=(-2, -1),
      kernel_init=out_kernel_init or kernel_init,
      bias_init=out_bias_init or bias_init,
      use_bias=use_bias,
      dtype=dtype,
      param_dtype=param_dtype,
      precision=precision,
      rngs=rngs,
    )
    self._store_in_order()
    shapes = {} if moh is None else router_shapes(moh, in_features)

    def router_map(name: str) -> nnx.Param[Array] | None:
      shape = shapes.get(name)
      if shape is None:
        return None
      return nnx.Param(router_init(rngs.params(), shape, param_dtype))

    self.router_routed = nnx.data(router_map("routed"))
    self.router_kind = nnx.data(router_map("kind"))
    self.router_shared = nnx.data(router_map("shared"))
    self.aux_loss = nnx.data(
      AuxLoss(jnp.zeros((), jnp.float32)) if moh and moh.routes else None
    )
    self.head_load = nnx.data(
      RoutingStats(jnp.zeros((num_heads,), jnp.float32)) if moh else None
    )
    self.rngs = nnx.data(
      rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else None
    )
    self.cached_key: nnx.Cache | None = nnx.data(None)
    self.cached_value: nnx.Cache | None = nnx.data(None)
    self.cache_index: nnx.Cache | None = nnx.data(None)

  def __call__(
    self,
    inputs_q: Float[Array, "*batch T D"],
    inputs_k: Float[Array, "*batch S Dkv"] | None = None,
    inputs_v: Float[Array, "*batch S Dkv"] | None = None,
    *,
    mask: Bool[Array, "#*batch #N #T S"] | None = None,
    deterministic: bool | None = None,
    rngs: nnx.Rngs | nnx.RngStream | None = None,
    sow_weights: bool = False,
    decode: bool | None = None,
    is_causal: bool = False,
    positions: Int[Array, "*batch T"] | None = None,
    token_mask: Bool[Array, "*batch T"] | None = None,
    segment_ids: Int[Array, "*batch T"] | None = None,
    balanced: bool = False,
  ) -> Float[Array, "*batch T Dout"]:
    """Attends, each token through the heads it picked.

    Args:
      inputs_q: Input of queries and router.
      inputs_k: Input of keys; `inputs_q` if None.
      inputs_v: Input of values; `inputs_k` if None.
      mask: True where a query may attend. Prefer `is_causal` and
        `segment_ids` where they say the same: no mask is then stored, and
        with a `pattern` no attention weights.
      deterministic: See the constructor.
      rngs: Random stream of dropout; the module's own if None.
      sow_weights: Store the attention weights [B, N, T, S] of all heads and
        the gates [B, T, N] as `nnx.Intermediate`.
      decode: Append keys and values of these tokens (one or more) to the
        cache and attend causally to all cached tokens.
      is_causal: Queries see keys at their own index and before; a causal
        `pattern` says so by itself.
      positions: For RoPE; by default the index in the sequence, in decoding
        counted from the start of the cache.
      token_mask: True for real tokens. Padding tokens use no head, count in
        no statistics, and their keys are hidden in self-attention.
      segment_ids: Tokens of packed sequences see their own segment only;
        self-attention without cache.
      balanced: The tokens, and what there is for each of them, are in
        `jaxheads.sharding.chunks.balanced_order` of the mesh; causal
        self-attention only.

    Returns:
      Output in the computation's dtype.

    Raises:
      ValueError: Arguments or shapes do not fit; the message names them.
      UserError: Tokens or heads do not split over the mesh.
    """
    if inputs_k is None:
      if inputs_v is not None:
        raise ValueError(
          "`inputs_k` must be given if `inputs_v` is; to use one tensor for "
          "both, pass it as `inputs_k` alone."
        )
      inputs_k = inputs_q
    self_attention = inputs_k is inputs_q
    inputs_v = inputs_k if inputs_v is None else inputs_v
    _checks.check_inputs(
      inputs_q,
      inputs_k,
      inputs_v,
      in_features=self.in_features,
      in_kv_features=self.in_kv_features,
      token_mask=token_mask,
      segment_ids=segment_ids,
      positions=positions,
    )
    if segment_ids is not None and not self_attention:
      raise ValueError("`segment_ids` needs self-attention; use `mask`.")
    decode = self.decode if decode is None else decode
    if decode and segment_ids is not None:
      raise ValueError("`segment_ids` cannot be used while decoding.")
    if positions is not None and self.rope_theta is None:
      raise ValueError("`positions` has no use without `rope_theta`.")
    deterministic = _dropout.resolve_deterministic(
      deterministic, self.deterministic, self.dropout_rate
    )

    # One batch axis inside, any number outside.
    batch_shape = inputs_q.shape[:-2]
    batch = math.prod(batch_shape)
    length = inputs_q.shape[-2]

    def flat(array: Array | None, trailing: int) -> Array | None:
      if array is None:
        return None
      # Not -1, which an empty array leaves open.
      return array.reshape(batch, *array.shape[array.ndim - trailing :])

    x = flat(inputs_q, 2)
    assert x is not None
    if mask is not None:
      mask = jnp.broadcast_to(mask, (*batch_shape, *mask.shape[-3:])).reshape(
        batch, *mask.shape[-3:]
      )
      if mask.shape[1] == self.num_heads:
        mask = take(mask, self.head_order, axis=1)
    token_mask = flat(token_mask, 1)
    segment_ids = flat(segment_ids, 1)
    k = flat(self._keys(inputs_k), 3)
    v = flat(self.value(inputs_v), 3)
    assert k is not None and v is not None
    k = constrain(k, "batch", "length", "kv_heads", None)
    v = constrain(v, "batch", "length", "kv_heads", None)

    q_offset: Array | int = 0
    if decode:
      q_offset = _cache.tokens_so_far(self._decode_cache, k)
    q_positions = flat(positions, 1)
    if q_positions is None:
      own = jnp.arange(length, dtype=jnp.int32) + q_offset
      if balanced:
        order = chunks.balanced_order(length, axis_size("context"))
        own = jnp.asarray(order, jnp.int32)
      q_positions = jnp.broadcast_to(own, x.shape[:2])
    if self.rope_theta is not None:
      k_positions = q_positions
      if not self_attention:
        k_positions = jnp.broadcast_to(
          jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2]
        )
      k = apply_rope(k, k_positions, theta=self.rope_theta)
    if decode:
      _cache.append(self._decode_cache, k, v)
      is_causal = True
    kv_segment_ids = segment_ids
    if token_mask is not None and self_attention and not decode:
      # Real tokens never see padding: it is a segment of its own.
      own = jnp.ones(x.shape[:2], jnp.int32)
      own = own if segment_ids is None else segment_ids
      segment_ids = own
      kv_segment_ids = jnp.where(token_mask, own, jnp.iinfo(jnp.int32).min)

    out = self._attend(
      x,
      k,
      v,
      cache=self._decode_cache if decode else None,
      mask=mask,
      is_causal=is_causal,
      q_offset=q_offset,
      q_positions=q_positions,
      token_mask=token_mask,
      q_segment_ids=segment_ids,
      kv_segment_ids=kv_segment_ids,
      deterministic=deterministic,
      rngs=rngs,
      sow_weights=sow_weights,
      balanced=balanced,
    )
    out = self._add_bias(out)
    return out.reshape(*batch_shape, length, self.out_features)

  def init_cache(
    self, input_shape: tuple[int, ...], dtype: Any = jnp.float32
  ) -> None:
    """Creates an empty cache, as `nnx.MultiHeadAttention.init_cache`.

    Keys and values are [batch, KV heads, slots, head size], in whole pages,
    so that a step reads nothing but the heads and blocks that it uses.

    Args:
      input_shape: Shape of the inputs of the longest sequence,
        (*batch, max length, features).
      dtype: Of the cached keys and values.
    """
    if self.pattern is not None:
      self.pattern.check_lengths(input_shape[-2], input_shape[-2])
    self.cached_key, self.cached_value, self.cache_index = _cache.empty(
      input_shape, self.num_kv_heads, self.head_dim, dtype, self.pattern
    )

  def active_heads(
    self, x: Float[Array, "B T D"]
  ) -> Bool[Array, "B T N"] | None:
    """True where (token, head) is active, given the input; `None`: all are."""
    by_norm = self.moh is not None and self.moh.router == "query_norm"
    routing = self._route(x, self._queries(x) if by_norm else None, None)
    return None if routing is None else routing.mask

  # For caches that are kept outside of the module: what a call does, in parts.

  def project_kv(
    self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
  ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Keys, after RoPE, and values, as caches hold them."""
    k = self._keys(x)
    if self.rope_theta is not None:
      k = apply_rope(k, positions, theta=self.rope_theta)
    return k, self.value(x)

  def project_q(
    self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
  ) -> Float[Array, "B T N H"]:
    """Queries after RoPE."""
    q = self._queries(x)
    if self.rope_theta is not None:
      q = apply_rope(q, positions, theta=self.rope_theta)
    return q

  def attend(
    self,
    x: Float[Array, "B T D"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    q_offset: Int[Array, ""] | int = 0,
    num_hidden: Int[Array, ""] | None = None,
  ) -> Float[Array, "B T Dout"]:
    """Causal attention to finished keys and values, those of x among them.

    Args:
      x: Input of the layer.
      k, v: As `project_kv` gives them, in the order of positions.
      q_offset: Where among them those of the first token of x are.
      num_hidden: How many of the first keys are none; the next one has
        position 0.
    """
    positions = jnp.arange(x.shape[1], dtype=jnp.int32) + q_offset
    q_segments = kv_segments = None
    if num_hidden is not None:
      positions -= num_hidden
      q_segments = jnp.zeros(x.shape[:2], jnp.int32)
      is_hidden = jnp.arange(k.shape[1]) < num_hidden
      kv_segments = jnp.broadcast_to(
        jnp.where(is_hidden, -1, 0).astype(jnp.int32), k.shape[:2]
      )
    positions = jnp.broadcast_to(positions, x.shape[:2])
    out = self._attend(
      x,
      k,
      v,
      cache=None,
      mask=None,
      is_causal=True,
      q_offset=q_offset,
      q_positions=positions,
      token_mask=None,
      q_segment_ids=q_segments,
      kv_segment_ids=kv_segments,
      deterministic=True,
      rngs=None,
      sow_weights=False,
    )
    return self._add_bias(out)

  def attend_with(
    self,
    x: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    read: Callable[[Array, Array | None], Array],
  ) -> Float[Array, "B T Dout"]:
    """Attention whose keys and values `read` knows.

    Args:
      x: Input of the layer.
      positions: Of the tokens.
      read: From queries [B, T, N, H] after RoPE and the heads that are active
        [B, T, N] (`None`: all) to the output of each head [B, T, N, H].
    """
    q = self._queries(x)
    routing = _routing.stored(self._route(x, q, None), self.head_order)
    if self.rope_theta is not None:
      q = apply_rope(q, positions, theta=self.rope_theta)
    out = read(q, None if routing is None else routing.mask)
    out, w_o = nnx.nn.dtypes.promote_dtype(
      (out, self.out.kernel[...]), dtype=self.dtype
    )
    gates = None if routing is None else routing.gates
    return self._add_bias(combine_heads(out, gates, w_o))

  def _keys(
    self, inputs_k: Float[Array, "*batch S Dkv"]
  ) -> Float[Array, "*batch S K H"]:
    """Keys before RoPE."""
    k = self.key(inputs_k)
    return k if self.key_ln is None else self.key_ln(k)

  def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T N H"]:
    """Queries before RoPE."""
    q = self.query(x)
    return q if self.query_ln is None else self.query_ln(q)

  def _add_bias(self, out: Float[Array, "B T Dout"]) -> Array:
    if self.out.bias is None:
      return out
    return out + self.out.bias[...].astype(out.dtype)

  @property
  def _places(self) -> HeadOrder | None:
    """Where each head is stored."""
    return self.head_order and head_order_lib.inverse(self.head_order)

  def _store_in_order(self) -> None:
    """Moves the heads of fresh parameters to the places they are stored at."""
    if self.head_order is None:
      return
    kv_order = head_order_lib.of_kv_heads(self.head_order, self.num_kv_heads)
    for linear, order in (
      (self.query, self.head_order),
      (self.key, kv_order),
      (self.value, kv_order),
    ):
      linear.kernel[...] = take(linear.kernel[...], order, axis=1)
      if linear.bias is not None:
        linear.bias[...] = take(linear.bias[...], order, axis=0)
    kernel = self.out.kernel
    kernel[...] = take(kernel[...], self.head_order, axis=0)

  @property
  def _decode_cache(self) -> _cache.Cache:
    variables: Any = (self.cached_key, self.cached_value, self.cache_index)
    return _cache.Cache(*variables)

  def _attend(
    self,
    x: Float[Array, "B T D"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    cache: _cache.Cache | None,
    q_positions: Int[Array, "B T"],
    token_mask: Bool[Array, "B T"] | None,
    deterministic: bool,
    rngs: nnx.Rngs | nnx.RngStream | None,
    sow_weights: bool,
    balanced: bool = False,
    **visibility: Any,
  ) -> Float[Array, "B T Dout"]:
    """Routes, then attends; without the output bias.

    Keys and values are the inputs' own, those of a `cache` are in it too.
    """
    dropout = self.dropout_rate > 0 and not deterministic
    weights_fn = weights_for = None
    if dropout or sow_weights:
      weights_for = (
        "`dropout_rate` above 0 while training" if dropout else "`sow_weights`"
      )
      key = _dropout.next_key(rngs, self.rngs) if dropout else None

      def weights_fn(weights: Array) -> Array:
        weights = take(weights, self._places, axis=1)
        if sow_weights:
          self.sow(nnx.Intermediate, "attention_weights", weights)
        if key is not None:
          weights = _dropout.drop(
            weights,
            key,
            rate=self.dropout_rate,
            broadcast=self.broadcast_dropout,
          )
        return take(weights, self.head_order, axis=1)

    # Devices that hold tokens of a sequence exchange what heads ask for.
    is_split = (
      cache is None
      and weights_fn is None
      and visibility["mask"] is None
      and (self.pattern is not None or visibility["is_causal"])
      and isinstance(visibility["q_offset"], int)
      and visibility["q_offset"] == 0
      and x.shape[1] == k.shape[1]
      and context.is_split(x.shape[1], balanced)
    )
    if balanced and not is_split and axis_size("context") > 1:
      raise ValueError(
        "`balanced` goes with causal self-attention to all tokens, and not "
        "with `mask`, `decode`, `sow_weights` or dropout."
      )

    # A few new tokens read the cache where it lies; all heads have queries.
    in_place = (
      cache is not None
      and x.shape[1] <= _MOST_NEW_TOKENS
      and weights_fn is None
      and visibility["mask"] is None
      and self.execution != "dense"
    )
    execution: Execution = "dense"
    if not in_place:
      keys = k.shape[1] if cache is None else cache.cached_key.shape[2]
      sizes = (x.shape[0], x.shape[1], keys)
      execution = self._execution(sizes, weights_for)
    by_norm = self.moh is not None and self.moh.router == "query_norm"
    kernels: dict[str, Any]
    if (
      execution == "dispatch"
      and not by_norm
      and not is_split
      and self.query_ln is None
    ):
      kernels = {
        "w_q": self.query.kernel[...],
        "b_q": None if self.query.bias is None else self.query.bias[...],
        "w_o": self.out.kernel[...],
      }
      x_in, *kernels_in = nnx.nn.dtypes.promote_dtype(
        (x, *kernels.values()), dtype=self.dtype
      )
      kernels = dict(zip(kernels, kernels_in, strict=True))
      kernels["rope_theta"] = self.rope_theta
      q = None
    else:
      q = constrain(self._queries(x), "batch", "length", "heads", None)
      x_in, w_o = nnx.nn.dtypes.promote_dtype(
        (x, self.out.kernel[...]), dtype=self.dtype
      )
      kernels = {"w_o": w_o}
    routing = self._route(x, q, token_mask)
    if q is not None:
      if self.rope_theta is not None:
        q = apply_rope(q, q_positions, theta=self.rope_theta)
      kernels["q"] = q
    self._report(routing, token_mask, deterministic)
    if sow_weights and routing is not None:
      self.sow(nnx.Intermediate, "gates", routing.gates)
    routing = _routing.stored(routing, self.head_order)
    implementation = self.implementation
    pattern = self.pattern and self.pattern.reordered(self.head_order)
    if in_place:
      assert cache is not None
      out = decode_attention(
        kernels["q"],
        cache.cached_key[...],
        cache.cached_value[...],
        q_offset=visibility["q_offset"],
        active=None if routing is None else routing.mask,
        pattern=pattern,
        # Not every kernel that reads prompts has a brother that decodes.
        implementation="reference" if implementation == "reference" else None,
      )
      gates = None if routing is None else routing.gates
      return combine_heads(out, gates, kernels["w_o"])
    if is_split:
      del visibility["mask"]
      dispatched = routing is not None and execution == "dispatch"
      return patterned_attention(
        k=k,
        v=v,
        gates=None if routing is None else routing.gates,
        pattern=s2.dense(self.num_heads) if pattern is None else pattern,
        implementation=implementation,
        balanced=balanced,
        active=routing.mask if routing is not None and dispatched else None,
        num_active=None if self.moh is None else self.moh.num_active,
        **kernels,
        **visibility,
      )
    if cache is not None:
      k, v = _cache.slots(cache, k.dtype)
    fits_kernels = weights_fn is None and visibility["mask"] is None
    if (
      execution == "dense"
      and pattern is None
      and fits_kernels
      and visibility["is_causal"]
      and (platform.current() != "cpu" or _are_many(sizes, self.num_heads))
    ):
      # The kernels keep no attention weights.
      pattern = s2.dense(self.num_heads)
    if pattern is not None and execution == "dense":
      if fits_kernels:
        del visibility["mask"]
        return patterned_attention(
          k=k,
          v=v,
          gates=None if routing is None else routing.gates,
          pattern=pattern,
          implementation=implementation,
          **kernels,
          **visibility,
        )
      visibility["mask"] = dense_mask(
        pattern.with_causality(visibility["is_causal"]),
        visibility["mask"],
        shape=sizes,
        q_offset=visibility["q_offset"],
        why=weights_for or "`mask`",
      )
      pattern = implementation = None
    return moh_attention(
      x_in,
      k,
      v,
      routing=routing,
      num_active=self.num_heads if self.moh is None else self.moh.num_active,
      q_positions=q_positions,
      pattern=pattern,
      weights_fn=weights_fn,
      execution=execution,
      implementation=implementation,  # type: ignore[arg-type]
      **kernels,
      **visibility,
    )

  def _execution(
    self, sizes: tuple[int, int, int], weights_for: str | None
  ) -> Execution:
    """The execution for B, T, S; `weights_for` needs every head's weights."""
    moh = self.moh
    if moh is None and self.pattern is not None:
      return "dense"
    if moh is not None and moh.learns_from_all_heads:
      weights_for = weights_for or "`straight_through='dense'`"
    return choose_execution(
      type(self).__name__,
      sizes,
      execution=self.execution,
      has_pattern=self.pattern is not None,
      all_heads_for=weights_for,
    )

  def _route(
    self,
    x: Float[Array, "B T D"],
    q: Float[Array, "B T N H"] | None,
    token_mask: Bool[Array, "B T"] | None,
  ) -> Routing | None:
    """The routing, in the heads' own order, of queries as they are stored."""
    params = RouterParams(
      *(
        None if param is None else param[...]
        for param in (self.router_routed, self.router_kind, self.router_shared)
      )
    )
    return _routing.pick_heads(
      x,
      q,
      moh=self.moh,
      params=params,
      num_heads=self.num_heads,
      token_mask=token_mask,
      head_order=self.head_order,
    )

  def _report(
    self,
    routing: Routing | None,
    token_mask: Bool[Array, "B T"] | None,
    deterministic: bool,
  ) -> None:
    """Writes the load-balance loss and the head load."""
    if self.moh is None or routing is None:
      return
    assert self.head_load is not None
    self.head_load[...] = _routing.head_load(routing, token_mask)
    if self.aux_loss is not None:
      self.aux_loss[...] = (
        jnp.zeros((), jnp.float32)
        if deterministic
        else _routing.balance_loss(routing, self.moh, token_mask)
      )


def _are_many(sizes: tuple[int, int, int], num_heads: int) -> bool:
  return num_heads * math.prod(sizes) >= _MANY_WEIGHTS
