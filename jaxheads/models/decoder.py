"""A decoder language model whose every layer takes its own plan and context.

The shape is LLaMA's: RMSNorm before attention and feed-forward, RoPE, SwiGLU,
grouped queries, no biases. Layers of equal plan and context that follow each
other are stored with a leading axis and run by one `jax.lax.scan`, so the time
to compile depends on the number of different ones and not on the depth.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxheads.head_order import HeadOrder
from jaxheads.models._loss import nats_in_parts
from jaxheads.models.config import ModelConfig, Run
from jaxheads.moh import MoHConfig
from jaxheads.nn import HeadAttention
from jaxheads.s2 import Pattern
from jaxheads.sharding import axis_size, constrain
from jaxheads.sharding.chunks import balanced_order


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + epsilon) * scale, with float32 statistics.

  Flax's own does not run under strict dtype promotion in bfloat16.

  Source:
    Root mean square layer normalization, https://arxiv.org/abs/1910.07467.
  """

  def __init__(self, config: ModelConfig) -> None:
    self.epsilon = config.norm_eps
    self.scale = nnx.Param(
      jnp.ones(config.embed_dim, jnp.dtype(config.param_dtype))
    )

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    wide = x.astype(jnp.float32)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(square + self.epsilon)
    scale = self.scale[...].astype(jnp.float32)
    return (wide * scale[None, None]).astype(x.dtype)


class SwiGLU(nnx.Module):
  """Gated feed-forward layer: (silu(x W_gate) * x W_up) W_down.

  Source:
    GLU variants improve transformer, https://arxiv.org/abs/2002.05202.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    linear = functools.partial(
      nnx.Linear,
      use_bias=False,
      dtype=jnp.dtype(config.dtype),
      param_dtype=jnp.dtype(config.param_dtype),
      rngs=rngs,
    )
    D, F = config.embed_dim, config.mlp_dim
    self.gate = linear(D, F, kernel_init=_init(config))
    self.up = linear(D, F, kernel_init=_init(config))
    self.down = linear(F, D, kernel_init=_residual_init(config))

  def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    inner = nnx.silu(self.gate(x)) * self.up(x)
    return self.down(constrain(inner, "batch", "length", "mlp"))


class DecoderBlock(nnx.Module):
  """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)).

  Args:
    config: Sizes and numerics; its `head_plans`, `contexts` and `head_orders`
      are not read.
    plan: This layer's heads; `None` keeps every head on and ungated.
    context: What each of them sees; `None` means all earlier tokens.
    head_order: How they are stored; `None` means in their own order.
    rngs: Source of the initial parameters.
  """

  def __init__(
    self,
    config: ModelConfig,
    plan: MoHConfig | None,
    context: Pattern | None = None,
    head_order: HeadOrder | None = None,
    *,
    rngs: nnx.Rngs,
  ) -> None:
    self.attention_norm = RMSNorm(config)
    self.attention = HeadAttention(
      config.num_heads,
      in_features=config.embed_dim,
      qkv_features=config.num_heads * config.head_dim,
      num_kv_heads=config.num_kv_heads,
      moh=plan,
      pattern=context,
      head_order=head_order,
      rope_theta=config.rope_theta,
      dtype=jnp.dtype(config.dtype),
      param_dtype=jnp.dtype(config.param_dtype),
      kernel_init=_init(config),
      out_kernel_init=_residual_init(config),
      use_bias=False,
      decode=False,
      execution=None if plan is None and context else config.execution,
      implementation=config.implementation,
      rngs=rngs,
    )
    self.mlp_norm = RMSNorm(config)
    self.mlp = SwiGLU(config, rngs=rngs)

  def __call__(
    self,
    x: Float[Array, "B T D"],
    *,
    positions: Int[Array, "B T"] | None = None,
    token_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    deterministic: bool = True,
    decode: bool = False,
    balanced: bool = False,
  ) -> Float[Array, "B T D"]:
    x = constrain(x, "batch", "length", None)
    with jax.named_scope("attention"):
      x += self.attention(
        self.attention_norm(x),
        is_causal=True,
        positions=positions,
        token_mask=token_mask,
        segment_ids=segment_ids,
        deterministic=deterministic,
        decode=decode,
        balanced=balanced,
      )
    x = constrain(x, "batch", "length", None)
    with jax.named_scope("mlp"):
      x += self.mlp(self.mlp_norm(x))
    return constrain(x, "batch", "length", None)

  def active_heads(self, x: Float[Array, "B T D"]) -> Bool[Array, "B T N"]:
    """True where (token, head) is active, given the layer's input."""
    active = self.attention.active_heads(self.attention_norm(x))
    if active is None:
      return jnp.ones((*x.shape[:2], self.attention.num_heads), bool)
    return active


class DecoderLM(nnx.Module):
  """Decoder language model over `config.vocab_size` tokens.

  `stacks[i]` is the `DecoderBlock` of `config.runs[i]`: every variable in it
  has a leading axis, one entry for each layer of the run.

  Args:
    config: Sizes, numerics, head plans and contexts.
    rngs: Source of the initial parameters: truncated normals of standard
      deviation 1 / sqrt(embed_dim), divided by sqrt(2 * num_layers) where a
      layer adds to the residual stream.
  """

  def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
    self.config = config
    self.embedding = nnx.Embed(
      config.vocab_size,
      config.embed_dim,
      dtype=jnp.dtype(config.dtype),
      param_dtype=jnp.dtype(config.param_dtype),
      embedding_init=_init(config),
      rngs=rngs,
    )
    self.stacks = nnx.List(
      [_stack(config, run, rngs.params()) for run in config.runs]
    )
    self.norm = RMSNorm(config)
    self.unembedding: nnx.Param[Array] | None
    if config.tie_embeddings:
      self.unembedding = nnx.data(None)
    else:
      shape = (config.embed_dim, config.vocab_size)
      self.unembedding = nnx.Param(
        _init(config)(rngs.params(), shape, jnp.dtype(config.param_dtype))
      )

  def __call__(
    self,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    token_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    deterministic: bool = True,
    decode: bool = False,
  ) -> Float[Array, "B T V"]:
    """Logits of the token that follows each token.

    Args:
      tokens: Token ids, int32.
      positions: Absolute positions, int32; `None` counts from 0, and when
        decoding from the first free slot of the cache.
      token_mask: True for real tokens. Padding, wherever it stands, is seen
        by no real token and activates no head; its logits mean nothing.
      segment_ids: Tokens see tokens of their own segment only, for packed
        documents.
      deterministic: False while training: the layers then set their
        `AuxLoss`.
      decode: Read and extend the cache of `init_cache` by these tokens.
    Returns:
      Float32 whatever the compute dtype is.
    Raises:
      ValueError: Wrong shapes, a sequence longer than `config.max_seq_len`,
        or `decode` with padding or segments.
      TypeError: `tokens` are no integers.
      UserError: Tokens or heads do not split over the mesh that is set.
    """
    x, order = self._hidden(
      tokens,
      positions=positions,
      token_mask=token_mask,
      segment_ids=segment_ids,
      deterministic=deterministic,
      decode=decode,
    )
    x = _restored(x, order)
    with jax.named_scope("unembed"):
      return constrain(self.logits(x), "batch", "length", "vocab")

  def token_nats(
    self,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    *,
    deterministic: bool = True,
  ) -> Float[Array, "B T"]:
    """Cross-entropy of the token that follows each token, in nats, float32.

    The logits of a whole batch never exist at once: they would take more
    memory than all the rest.

    Args:
      tokens: Token ids, int32.
      targets: The tokens that did follow.
      deterministic: See the model's call.
    """
    x, order = self._hidden(tokens, deterministic=deterministic)
    with jax.named_scope("unembed"):
      nats = nats_in_parts(
        self.norm(x), self._table(), _ordered(targets, order)
      )
    return _restored(nats, order)

  def _hidden(
    self,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    token_mask: Bool[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    deterministic: bool = True,
    decode: bool = False,
  ) -> tuple[Float[Array, "B T D"], np.ndarray | None]:
    """Output of the last layer, and the order its tokens are in."""
    self._check(tokens, positions, token_mask, segment_ids)
    if decode and not (token_mask is None and segment_ids is None):
      raise ValueError(
        "`token_mask` and `segment_ids` must be None when `decode` is True: "
        "the cache keeps one sequence per row, without padding. Decode "
        "prompts of different lengths in separate batches."
      )
    order = None
    if not decode and axis_size("context") > 1:
      # Devices hold parts of sequences: the order that gives them equal work.
      length = tokens.shape[1]
      order = balanced_order(length, axis_size("context"))
      if positions is None:
        count = jnp.arange(length, dtype=jnp.int32)
        positions = jnp.broadcast_to(count, tokens.shape)
      tokens, positions, token_mask, segment_ids = (
        _ordered(x, order) for x in (tokens, positions, token_mask, segment_ids)
      )
    with jax.named_scope("embed"):
      x = self._embed(tokens)
    for index, stack in enumerate(self.stacks):
      with jax.named_scope(f"stack_{index}"):
        x = self._run(
          stack,
          x,
          positions=positions,
          token_mask=token_mask,
          segment_ids=segment_ids,
          deterministic=deterministic,
          decode=decode,
          balanced=order is not None,
        )
    return x, order

  def init_cache(self, batch_size: int, max_len: int) -> None:
    """Empties the cache, with room for `max_len` tokens a sequence.

    Args:
      batch_size: Sequences decoded together.
      max_len: Tokens, prompt included; at most `config.max_seq_len`.
    Raises:
      ValueError: `max_len` is longer than the model allows.
    """
    self._check_length("max_len", max_len)
    shape = (batch_size, max_len, self.config.embed_dim)
    for stack, run in zip(self.stacks, self.config.runs, strict=True):
      stack.attention.init_cache(shape, jnp.dtype(self.config.dtype))
      one_layer = nnx.state(stack, nnx.Cache)
      nnx.update(
        stack,
        jax.tree.map(
          lambda x, n=run.num_layers: jnp.zeros((n, *x.shape), x.dtype),
          one_layer,
        ),
      )

  def head_activity(
    self, tokens: Int[Array, "B T"]
  ) -> Bool[Array, "layers B T N"]:
    """Which heads each token uses, layer by layer.

    Args:
      tokens: Token ids, int32, without padding.
    Raises:
      ValueError, TypeError: As the model's call.
    """
    self._check(tokens, None, None, None)

    def layer(block: DecoderBlock, x: Array, _: None) -> tuple[Array, Array]:
      return block(x), block.active_heads(x)

    return self.scan_layers(layer, self.embedding(tokens), None)[1]

  def scan_layers(
    self,
    layer: Callable[[DecoderBlock, Any, Any], tuple[Any, Any]],
    carry: Any,
    inputs: Any,
  ) -> tuple[Any, Any]:
    """Runs something in every layer, compiled once for layers that are alike.

    Args:
      layer: From a block, the carry and the layer's inputs to the next carry
        and the layer's outputs.
      carry: Arrays that go from layer to layer.
      inputs: Arrays with a leading axis of layers.
    Returns:
      The last carry, and outputs with a leading axis of layers.
    """
    outputs = []
    first = 0
    for stack, run in zip(self.stacks, self.config.runs, strict=True):
      graphdef, state = nnx.split(stack)
      last = first + run.num_layers
      mine = jax.tree.map(lambda x, a=first, b=last: x[a:b], inputs)

      def step(
        carry: Any, xs: Any, graphdef: nnx.GraphDef[DecoderBlock] = graphdef
      ) -> tuple[Any, Any]:
        return layer(nnx.merge(graphdef, xs[0]), carry, xs[1])

      carry, output = jax.lax.scan(step, carry, (state, mine))
      outputs.append(output)
      first = last
    return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *outputs)

  def _embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    # Devices look up their own features, of all sequences that share them, and
    # exchange what they found: far less than the table.
    tokens = constrain(tokens, "replica", "length")
    x = constrain(self.embedding(tokens), "replica", "length", "embed")
    return constrain(x, "batch", "length", None)

  def _run(
    self, stack: DecoderBlock, x: Float[Array, "B T D"], **inputs: Any
  ) -> Float[Array, "B T D"]:
    """The layers of one stack, one after the other."""
    graphdef, state = nnx.split(stack)

    def layer(x: Array, state: nnx.State) -> tuple[Array, nnx.State]:
      block = nnx.merge(graphdef, state)
      x = block(x, **inputs)
      return x, nnx.state(block, nnx.Not(nnx.Param))

    if self.config.remat:
      # Inside a scan the loop itself keeps XLA from merging the recomputation
      # with the forward pass, so the barriers of `prevent_cse` only cost.
      layer = jax.checkpoint(layer, prevent_cse=False)
    x, changed = jax.lax.scan(layer, x, state)
    nnx.update(stack, changed)
    return x

  def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
    """From the last layer's output to logits, summed in float32."""
    return jnp.einsum(
      "btd,dv->btv",
      self.norm(x),
      self._table().astype(x.dtype),
      preferred_element_type=jnp.float32,
    )

  def _table(self) -> Float[Array, "D V"]:
    if self.unembedding is None:
      return self.embedding.embedding[...].T
    return self.unembedding[...]

  def _check(
    self,
    tokens: Array,
    positions: Array | None,
    token_mask: Array | None,
    segment_ids: Array | None,
  ) -> None:
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
      raise TypeError(f"`tokens` must be integers, got {tokens.dtype}.")
    if tokens.ndim != 2:
      raise ValueError(
        f"`tokens` must have shape [B, T], got {tokens.shape}; "
        "one sequence is `tokens[None]`."
      )
    for name, array in (
      ("positions", positions),
      ("token_mask", token_mask),
      ("segment_ids", segment_ids),
    ):
      if array is not None and array.shape != tokens.shape:
        raise ValueError(
          f"`{name}` must have the shape of `tokens`, {tokens.shape}; "
          f"got {array.shape}."
        )
    if token_mask is not None and token_mask.dtype != jnp.bool_:
      raise TypeError(f"`token_mask` must be bool, got {token_mask.dtype}.")
    self._check_length("tokens", tokens.shape[1])

  def _check_length(self, name: str, length: int) -> None:
    limit = self.config.max_seq_len
    if not 1 <= length <= limit:
      raise ValueError(
        f"`{name}` must be 1 to {limit} tokens long (`max_seq_len`), got "
        f"{length}. Shorten the sequence, or build the model with a larger "
        "`max_seq_len`."
      )


def _ordered(x: Any, order: np.ndarray | None) -> Any:
  """`x` [B, T, ...] with its tokens in that order, where they go."""
  if x is None or order is None:
    return x
  return constrain(x[:, order], "batch", "length", *(None,) * (x.ndim - 2))


def _restored(x: Any, order: np.ndarray | None) -> Any:
  """The inverse of `_ordered`."""
  return _ordered(x, None if order is None else np.argsort(order))


def _stack(config: ModelConfig, run: Run, key: Array) -> DecoderBlock:
  """Layers of one run as one block with a leading axis everywhere."""
  alike = run[:-1]
  graphdef = nnx.graphdef(
    nnx.eval_shape(
      lambda: DecoderBlock(config, *alike, rngs=nnx.Rngs(params=0))
    )
  )
  keys = jax.random.split(key, run.num_layers)
  return nnx.merge(graphdef, _stack_state(keys, config=config, alike=alike))


# Compiled as one program: op by op, the random numbers of a block take
# seconds to compile.
@functools.partial(jax.jit, static_argnames=("config", "alike"))
def _stack_state(
  keys: Array,
  *,
  config: ModelConfig,
  alike: tuple[MoHConfig | None, Pattern | None, HeadOrder | None],
) -> nnx.State:
  """State of one block for each key, along a leading axis."""

  def block_state(key: Array) -> nnx.State:
    return nnx.state(DecoderBlock(config, *alike, rngs=nnx.Rngs(params=key)))

  return jax.vmap(block_state)(keys)


def _init(config: ModelConfig) -> jax.nn.initializers.Initializer:
  """Logits of attention are about 1 at any width, so that small models learn.

  Source:
    Efficient BackProp (LeCun et al., 1998), section 4.6.
  """
  return jax.nn.initializers.truncated_normal(config.embed_dim**-0.5)


def _residual_init(config: ModelConfig) -> jax.nn.initializers.Initializer:
  """Smaller with depth, so that the residual stream does not grow with it.

  Source:
    Language models are unsupervised multitask learners (GPT-2), section 2.3.
  """
  return jax.nn.initializers.truncated_normal(
    (2 * config.num_layers * config.embed_dim) ** -0.5
  )
