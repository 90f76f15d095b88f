"""Text generation: one prefill, then one compiled step for every token."""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxheads.models.decoder import DecoderLM

# The cache grows in these steps, so that prompts of other lengths find the
# decoding step compiled.
_CACHE_MULTIPLE = 128


def generate(
  model: DecoderLM,
  prompt_tokens: Int[Array, "B T"],
  *,
  max_new_tokens: int,
  temperature: float = 1.0,
  top_p: float = 1.0,
  key: Array | None = None,
  stop_token: int | None = None,
) -> Iterator[Int[np.ndarray, " B"]]:
  """Continuations of the prompts, one token of each sequence at a time.

  The prompt is read in one call and each token costs one call of a step that
  is compiled once per model, batch size and cache size. `model` is not
  changed.

  Args:
    model: A decoder; its parameters may be sharded.
    prompt_tokens: Prompts of equal length, at least one token each.
    max_new_tokens: Tokens to add; prompt and continuation together must fit
      in `max_seq_len`.
    temperature: Divides the logits; 0 always takes the likeliest token, the
      lowest id among equals.
    top_p: Samples from the likeliest tokens that together reach this
      probability, in (0, 1]; 1 samples from all.
    key: PRNG key; needed unless `temperature` is 0.
    stop_token: Ends a sequence, which then repeats it; the iterator ends when
      every sequence has. `None` never stops early.
  Returns:
    Iterator over at most `max_new_tokens` int32 arrays.
  Raises:
    ValueError: At the call, not at the first token: an argument out of range,
      or more tokens than the model can hold.
    TypeError: `prompt_tokens` are no integers.
  Source:
    Nucleus sampling: https://arxiv.org/abs/1904.09751.
  """
  prompt = jnp.asarray(prompt_tokens)
  if not jnp.issubdtype(prompt.dtype, jnp.integer):
    raise TypeError(f"`prompt_tokens` must be integers, got {prompt.dtype}.")
  if prompt.ndim != 2 or 0 in prompt.shape:
    raise ValueError(
      "`prompt_tokens` must have shape [B, T] with at least one token, got "
      f"{prompt.shape}."
    )
  if max_new_tokens < 1:
    raise ValueError(f"`max_new_tokens` must be at least 1: {max_new_tokens}.")
  limit = model.config.max_seq_len
  if prompt.shape[1] + max_new_tokens > limit:
    raise ValueError(
      f"the prompt ({prompt.shape[1]} tokens) and `max_new_tokens` "
      f"({max_new_tokens}) must fit in `max_seq_len` ({limit}). Shorten the "
      "prompt or ask for fewer tokens."
    )
  if not (math.isfinite(temperature) and temperature >= 0):
    raise ValueError(f"`temperature` must be 0 or more, got {temperature}.")
  if not 0 < top_p <= 1:
    raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
  if key is None:
    if temperature > 0:
      raise ValueError(
        "`key` must be given when `temperature` is above 0; for example "
        "`jax.random.key(0)`."
      )
    key = jax.random.key(0)
  if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
    raise ValueError(
      f"`stop_token` must be in [0, {model.config.vocab_size}), got "
      f"{stop_token}."
    )
  return _stream(
    model, prompt, max_new_tokens, temperature, top_p, key, stop_token
  )


def _stream(
  model: DecoderLM,
  prompt: Array,
  max_new_tokens: int,
  temperature: float,
  top_p: float,
  key: Array,
  stop_token: int | None,
) -> Iterator[np.ndarray]:
  batch, length = prompt.shape
  room = -(-(length + max_new_tokens) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
  decoder = nnx.merge(*nnx.split(model))  # Same arrays, a cache of its own.
  decoder.init_cache(batch, min(room, model.config.max_seq_len))
  cache = nnx.state(decoder, nnx.Cache)
  next_token = functools.partial(
    step,
    nnx.graphdef(decoder),
    nnx.state(decoder, nnx.Not(nnx.Cache)),
    temperature=jnp.float32(temperature),
    top_p=jnp.float32(top_p),
    nucleus=top_p < 1,
  )
  stopped = np.zeros(batch, bool)
  tokens = prompt
  for index in range(max_new_tokens):
    tokens, cache = next_token(cache, tokens, jax.random.fold_in(key, index))
    new = np.asarray(tokens)[:, 0]
    if stop_token is not None:
      new = np.where(stopped, np.int32(stop_token), new)
      stopped |= new == stop_token
    yield new
    if stopped.all():
      return


@functools.partial(
  jax.jit,
  static_argnames=("graphdef", "nucleus"),
  donate_argnames=("cache",),
)
def step(
  graphdef: nnx.GraphDef,
  variables: nnx.State,
  cache: nnx.State,
  tokens: Array,
  key: Array,
  *,
  temperature: Array,
  top_p: Array,
  nucleus: bool,
) -> tuple[Array, nnx.State]:
  """Feeds tokens [B, T], returns the next one [B, 1] and the longer cache."""
  model = nnx.merge(graphdef, variables, cache)
  logits = model(tokens, decode=True)[:, -1]
  new = _sample(logits, key, temperature, top_p, nucleus=nucleus)
  return new[:, None], nnx.state(model, nnx.Cache)


def _sample(
  logits: Float[Array, "B V"],
  key: Array,
  temperature: Array,
  top_p: Array,
  *,
  nucleus: bool,
) -> Int[Array, " B"]:
  """One token per row; `temperature` 0 is the argmax."""
  greedy = jnp.argmax(logits, axis=-1)
  # Keeps the branch that is not taken finite.
  scaled = logits / jnp.maximum(temperature, 1e-6)
  if nucleus:
    order = jnp.argsort(-scaled, axis=-1, stable=True)
    scaled = jnp.take_along_axis(scaled, order, axis=-1)
    probs = jax.nn.softmax(scaled, axis=-1)
    # Kept while the tokens before it have not reached `top_p`: never empty.
    before = jnp.cumsum(probs, axis=-1) - probs
    scaled = jnp.where(before < top_p, scaled, -jnp.inf)
    choice = jax.random.categorical(key, scaled, axis=-1)
    drawn = jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0]
  else:
    drawn = jax.random.categorical(key, scaled, axis=-1)
  return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)
