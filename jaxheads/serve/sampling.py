"""Drawing the next token of each slot from the model's logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxheads.serve.request import MOST_LOGPROBS, SamplingParams


class Sampling(NamedTuple):
  """`SamplingParams` of all slots: arrays, so that new values compile nothing.

  Attributes:
    temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty,
      frequency_penalty: As in `SamplingParams`; float32, `top_k` int32.
    seed: The seed's high and low 32 bits.
    logprobs: Whether log-probabilities are asked for.
  """

  temperature: Float[Any, "*B"]
  top_k: Int[Any, "*B"]
  top_p: Float[Any, "*B"]
  min_p: Float[Any, "*B"]
  repetition_penalty: Float[Any, "*B"]
  presence_penalty: Float[Any, "*B"]
  frequency_penalty: Float[Any, "*B"]
  seed: Int[Any, "*B 2"]
  logprobs: Bool[Any, "*B"]

  @classmethod
  def of(cls, params: SamplingParams) -> "Sampling":
    """What goes into one slot: NumPy scalars, and the seed's two words."""
    most = np.iinfo(np.int32).max
    return cls(
      temperature=np.float32(params.temperature),
      top_k=np.int32(min(params.top_k, most)),
      top_p=np.float32(params.top_p),
      min_p=np.float32(params.min_p),
      repetition_penalty=np.float32(params.repetition_penalty),
      presence_penalty=np.float32(params.presence_penalty),
      frequency_penalty=np.float32(params.frequency_penalty),
      seed=np.array([params.seed >> 32, params.seed % 2**32], np.uint32),
      logprobs=np.bool_(params.logprobs is not None),
    )

  @classmethod
  def idle(cls, batch_size: int) -> "Sampling":
    """Slots without a request: the likeliest token, and nothing else."""
    one = cls.of(SamplingParams(temperature=0.0))
    return cls(
      *(np.broadcast_to(x, (batch_size, *x.shape)).copy() for x in one)
    )


class Sampled(NamedTuple):
  """What `sample` gives each slot.

  Log-probabilities are the model's own, before penalties, temperature and
  filters, and 0 in all slots if no slot asks for them.

  Attributes:
    tokens: The tokens drawn, int32.
    logprobs: Log-probability of each.
    top_tokens: The likeliest tokens, likeliest first, the lowest id among
      equals; -1 beyond the vocabulary. T is `MOST_LOGPROBS`.
    top_logprobs: Log-probability of each; -inf beyond the vocabulary.
  """

  tokens: Int[Array, " B"]
  logprobs: Float[Array, " B"]
  top_tokens: Int[Array, "B T"]
  top_logprobs: Float[Array, "B T"]


def sample(
  logits: Float[Array, "B V"],
  sampling: Sampling,
  index: Int[Array, " B"],
  in_prompt: Bool[Array, "B V"],
  answer_counts: Int[Array, "B V"],
) -> Sampled:
  """Draws one token for each slot.

  In this order, each step on what the one before left:

  1. Penalties: repetition on tokens of prompt or answer, then frequency and
     presence on tokens of the answer.
  2. With temperature 0, the likeliest token, the lowest id among equals.
  3. Otherwise the logits are divided by the temperature.
  4. `min_p` keeps tokens at least so likely, relative to the likeliest.
  5. `top_k` keeps so many likeliest; among equals, those of lower ids.
  6. `top_p` keeps the fewest likeliest tokens that together have this share of
     what is left; at least one.
  7. One of what is left is drawn.

  A draw depends on the slot's own logits, seed and index alone: its key is
  `fold_in(key(seed), index)`. Sorting, penalties, drawing and
  log-probabilities are skipped while no slot needs them.

  Args:
    logits: Of the model, float32.
    sampling: Settings of each slot.
    index: How many tokens of its answer come before this one.
    in_prompt: Which tokens the prompt holds.
    answer_counts: How often the answer holds each token so far.

  Source:
    Penalties: repetition, CTRL, https://arxiv.org/abs/1909.05858, for negative
    logits as in Hugging Face transformers: generation/logits_process.py;
    frequency and presence, the OpenAI API's "parameter details". Order of the
    steps and log-probabilities: vllm-project/vllm: vllm/v1/sample/sampler.py.
    Differs: transformers applies `min_p` last; both keep all tokens that are
    equal to the last of `top_k`.
  """
  penalised = _penalise(logits, sampling, in_prompt, answer_counts)
  greedy = jnp.argmax(penalised, axis=-1).astype(jnp.int32)
  draws = sampling.temperature > 0

  def draw() -> Array:
    drawn = _draw(_keep(penalised, sampling), sampling.seed, index)
    return jnp.where(draws, drawn, greedy)

  tokens = jax.lax.cond(draws.any(), draw, lambda: greedy)
  return Sampled(tokens, *_log_probabilities(logits, tokens, sampling))


def _penalise(
  logits: Float[Array, "B V"],
  sampling: Sampling,
  in_prompt: Bool[Array, "B V"],
  answer_counts: Int[Array, "B V"],
) -> Float[Array, "B V"]:
  repetition = sampling.repetition_penalty[:, None]
  presence = sampling.presence_penalty[:, None]
  frequency = sampling.frequency_penalty[:, None]

  def penalise() -> Array:
    in_answer = answer_counts > 0
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    x = jnp.where(in_prompt | in_answer, scaled, logits)
    x -= frequency * answer_counts.astype(jnp.float32)
    return x - presence * in_answer.astype(jnp.float32)

  needed = (repetition != 1) | (presence != 0) | (frequency != 0)
  return jax.lax.cond(needed.any(), penalise, lambda: logits)


def _keep(
  logits: Float[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
  """Logits over temperature, the likeliest at 0; what is filtered is -inf."""
  # The division comes last: no temperature, however low, gives inf - inf.
  tiny = jnp.finfo(jnp.float32).tiny
  temperature = jnp.maximum(sampling.temperature, tiny)
  x = logits - logits.max(axis=-1, keepdims=True)
  x = x / temperature[:, None]
  x = jnp.where(x >= jnp.log(sampling.min_p)[:, None], x, -jnp.inf)

  vocabulary = x.shape[-1]
  ids = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  top_k = jnp.where(sampling.top_k > 0, sampling.top_k, vocabulary)[:, None]
  top_p = sampling.top_p[:, None]

  def cut() -> Array:
    # Ids in the order of likelihood, lower ones first among equals. Each
    # filter keeps a beginning of it: all that matters is where it ends.
    descending, order = jax.lax.sort((-x, ids), num_keys=1, is_stable=True)
    weights = jnp.where(ids < top_k, jnp.exp(-descending), 0.0)
    before = jnp.cumsum(weights, axis=-1) - weights
    total = weights.sum(axis=-1, keepdims=True)
    inside = (top_p >= 1) | (before < top_p * total)
    count = (inside & (ids < top_k)).sum(axis=-1, keepdims=True)
    last = jnp.maximum(count, 1) - 1
    least = -jnp.take_along_axis(descending, last, axis=-1)
    least_id = jnp.take_along_axis(order, last, axis=-1)
    kept = (x > least) | ((x == least) & (ids <= least_id))
    return jnp.where(kept, x, -jnp.inf)

  needed = (top_k < vocabulary) | (top_p < 1)
  needed &= sampling.temperature[:, None] > 0
  return jax.lax.cond(needed.any(), cut, lambda: x)


def _draw(
  logits: Float[Array, "B V"], seed: Int[Array, "B 2"], index: Int[Array, " B"]
) -> Int[Array, " B"]:
  """One token per row, by the largest of logits plus Gumbel noise."""
  # The two words are what `jax.random.key` makes of a 64-bit seed. The
  # generator is named: answers must not change with a setting of JAX.
  keys = jax.random.wrap_key_data(
    jnp.asarray(seed, jnp.uint32), impl="threefry2x32"
  )

  def draw(x: Array, key: Array, at: Array) -> Array:
    noise = jax.random.gumbel(jax.random.fold_in(key, at), x.shape)
    return jnp.argmax(x + noise).astype(jnp.int32)

  return jax.vmap(draw)(logits, keys, index)


def _log_probabilities(
  logits: Float[Array, "B V"], tokens: Int[Array, " B"], sampling: Sampling
) -> tuple[Array, Array, Array]:
  batch, vocabulary = logits.shape
  most = min(MOST_LOGPROBS, vocabulary)
  room = ((0, 0), (0, MOST_LOGPROBS - most))

  def compute() -> tuple[Array, Array, Array]:
    x = jax.nn.log_softmax(logits, axis=-1)
    top, ids = jax.lax.top_k(x, most)
    return (
      jnp.take_along_axis(x, tokens[:, None], axis=-1)[:, 0],
      jnp.pad(ids.astype(jnp.int32), room, constant_values=-1),
      jnp.pad(top, room, constant_values=-jnp.inf),
    )

  def nothing() -> tuple[Array, Array, Array]:
    wide = (batch, MOST_LOGPROBS)
    return jnp.zeros(batch), jnp.zeros(wide, jnp.int32), jnp.zeros(wide)

  return jax.lax.cond(sampling.logprobs.any(), compute, nothing)
