"""Continuous batching: requests in, tokens out, one turn at a time."""

import dataclasses
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from jaxheads import head_order
from jaxheads.kvcache.by_context import ByContext
from jaxheads.kvcache.by_shard import ByShard
from jaxheads.kvcache.full import Full
from jaxheads.kvcache.pages import QUANTISED
from jaxheads.kvcache.policy import CacheShape, Policy
from jaxheads.models.config import ModelConfig
from jaxheads.models.decoder import DecoderLM
from jaxheads.serve import shards
from jaxheads.serve.buckets import power_of_two
from jaxheads.serve.device import Device, Memory, Outputs
from jaxheads.serve.request import Event, FinishReason, Request
from jaxheads.serve.scheduler import Scheduler
from jaxheads.serve.turn import Turn
from pallas_kernels import platform

# Tokens of a page at most: larger ones are read hardly faster, see
# `experiments/bench_decode.py --page-size`.
_PAGE_SIZES = {"cpu": 128, "gpu": 64, "tpu": 128}
# Pages of the longest row at least, so that budgets are not lost in rounding.
_LEAST_PAGES = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Sizes of an engine.

  Attributes:
    max_batch: Sequences that run at once.
    max_length: Tokens of prompt and answer at most; `None` is the model's
      `max_seq_len`.
    max_waiting: Requests that wait at most.
    num_pages: Pages of the pool, on all devices together; `None` is room for
      `max_batch` full caches.
    page_size: Tokens of a page; `None` suits machine and length, and is the
      block size of a model whose heads have contexts.
    chunk: Tokens of a prompt to read in a turn; `None` is all.
    prefix_sharing: Whether prompts that begin alike share their pages while
      they are read; needs `chunk`.
    dtype: Of the cached keys and values; `None` is the model's.

  Raises:
    ValueError: A size is no integer or below 1, or `dtype` is not floating.
  """

  max_batch: int = 8
  max_length: int | None = None
  max_waiting: int = 256
  num_pages: int | None = None
  page_size: int | None = None
  chunk: int | None = None
  prefix_sharing: bool = False
  dtype: Any = None

  def __post_init__(self) -> None:
    for name, optional in (
      ("max_batch", False),
      ("max_waiting", False),
      ("max_length", True),
      ("num_pages", True),
      ("page_size", True),
      ("chunk", True),
    ):
      value = getattr(self, name)
      if optional and value is None:
        continue
      if not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(
          f"`{name}` must be an integer and at least 1, got {value!r}."
        )
    if self.dtype is None:
      return
    try:
      dtype = jnp.dtype(self.dtype)
      fits = dtype.name in QUANTISED or (
        jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
      )
    except TypeError:
      fits = False
    if not fits:
      names = " or ".join(QUANTISED)
      raise ValueError(
        f"`dtype` must be a float of 16 or 32 bits, {names}, got "
        f"{self.dtype!r}."
      )

  def resolve_page_size(self, model: ModelConfig) -> int:
    """Tokens of a page for a model on this machine.

    Raises:
      ValueError: `page_size` does not fit the model's contexts.
    """
    blocks = {c.block_size for c in model.contexts if c is not None}
    page_size = self.page_size
    if page_size is None:
      longest = self.max_length or model.max_seq_len
      page_size = min(
        _PAGE_SIZES[platform.current()],
        max(16, power_of_two(longest // _LEAST_PAGES)),
      )
      page_size = max(blocks, default=page_size)
    if blocks - {page_size}:
      raise ValueError(
        "`page_size` must be the block size of the model's contexts, "
        f"{sorted(blocks)}, got {page_size}."
      )
    return page_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
  """An engine at one moment.

  Attributes:
    waiting: Requests in the queue.
    running: Requests that hold a slot.
    pages_total: Pages of the pool that can be given out.
    pages_used: Pages of requests.
    pages_cached: Pages that only the prefix cache holds.
    preemptions: So far.
    tokens_generated: So far.
    compilations: Programs compiled so far.
    failed_replicas: Engines that serve no more, of several.
  """

  waiting: int
  running: int
  pages_total: int
  pages_used: int
  pages_cached: int
  preemptions: int
  tokens_generated: int
  compilations: int
  failed_replicas: int = 0


@dataclasses.dataclass(slots=True)
class _Live:
  """A request that has not ended."""

  request: Request
  generated: int = 0
  head_of_slot: Int[np.ndarray, "R K"] | None = None


@dataclasses.dataclass(slots=True)
class _Flight:
  """A turn that the device works on."""

  turn: Turn
  outputs: Outputs


class Engine:
  """Serves requests with one model, one pool and one policy of budgets.

  The device is given a turn before the tokens of the one before it are known:
  it never waits for the host. Not safe for use by several threads at once.

  Args:
    model: A decoder; it is not changed.
    policy: What each head keeps of a prompt; see `jaxheads.kvcache`.
    budget: Fraction of the cache that prompts keep unless their request says
      otherwise, in (0, 1].
    config: Sizes.
    mesh: Devices that share the heads, along the axis `heads` of a
      `jaxheads.sharding.make_mesh`: each holds the pages of its own KV heads,
      and its part of the parameters. `None` is the default device.

  Raises:
    ValueError: A setting is out of range, or does not fit the model.
  """

  def __init__(
    self,
    model: DecoderLM,
    *,
    policy: Policy | None = None,
    budget: float = 1.0,
    config: EngineConfig | None = None,
    mesh: Mesh | None = None,
  ) -> None:
    config = EngineConfig() if config is None else config
    sizes = model.config
    page_size = config.resolve_page_size(sizes)
    longest = sizes.max_seq_len
    max_length = longest if config.max_length is None else config.max_length
    if not 2 <= max_length <= longest:
      raise ValueError(
        f"`max_length` must be in [2, {longest}] (`max_seq_len`), got "
        f"{max_length}."
      )
    shape = CacheShape(sizes.num_layers, sizes.num_kv_heads)
    num_shards = 1
    if mesh is not None:
      num_shards = shards.check_mesh(mesh, sizes.num_heads, sizes.num_kv_heads)
    if config.num_pages is None:
      rows = shape.num_layers * shape.num_kv_heads * config.max_batch
      num_pages = 1 + rows // num_shards * -(-max_length // page_size)
    else:
      num_pages = config.num_pages // num_shards
      if num_pages < 2:
        raise ValueError(
          f"`num_pages` must be at least {2 * num_shards}, a dummy and one to "
          f"give out on each device, got {config.num_pages}."
        )
    policy = Full() if policy is None else policy
    if not hasattr(policy, "plan"):
      raise ValueError(
        "`policy` must be a policy, for instance "
        f"`jaxheads.kvcache.make_policy('task_kv')`, got {policy!r}."
      )
    if any(sizes.contexts):
      policy = ByContext(policy=policy, contexts=sizes.stored_contexts)
    if num_shards > 1:
      policy = ByShard(policy=policy, shards=num_shards)
    self._scheduler = Scheduler(
      shape=shape,
      page_size=page_size,
      num_pages=num_pages,
      max_batch=config.max_batch,
      max_length=max_length,
      max_waiting=config.max_waiting,
      policy=policy,
      budget=budget,
      chunk=config.chunk,
      prefix_sharing=config.prefix_sharing,
      shards=num_shards,
    )
    self._device = Device(
      model,
      policy,
      num_pages=num_pages,
      page_size=page_size,
      max_batch=config.max_batch,
      max_length=max_length,
      chunk=config.chunk,
      dtype=config.dtype,
      mesh=mesh,
    )
    self._budget = budget
    self._policy = policy
    self._shape = shape
    self._vocab_size = sizes.vocab_size
    # Where each KV head is stored.
    self._place_of_head = np.array(
      [
        range(shape.num_kv_heads)
        if order is None
        else head_order.inverse(
          head_order.of_kv_heads(order, shape.num_kv_heads)
        )
        for order in sizes.head_orders or (None,) * shape.num_layers
      ]
    )
    self._live: dict[str, _Live] = {}
    self._flight: _Flight | None = None
    self._ended: list[Event] = []
    self._generated = 0

  def submit(self, request: Request) -> None:
    """Takes a request; its tokens come with later steps.

    The id of one that has ended can be used again after the next step: until
    then the device, or an event, may still speak of it.

    Raises:
      ValueError: It can never be served; the message says why.
      QueueFull: Too many requests wait.
    """
    self._check_prompt(request.prompt)
    if request.id in self._live or request.id in self._names_ending():
      raise ValueError(f"`id` must be unique, {request.id!r} is in use.")
    self._scheduler.add(request)
    self._live[request.id] = _Live(request)

  def check(self, request: Request) -> None:
    """Refuses what can never be served; any thread may ask.

    Raises:
      ValueError: The message says why.
    """
    self._check_prompt(request.prompt)
    self._scheduler.check(request)

  def kept_fraction(self, request: Request) -> float:
    """Share of the prompt's tokens that heads keep: the effective budget.

    At most so much, where it depends on the prompt.

    Raises:
      ValueError: As `submit`.
    """
    budget = self._budget if request.budget is None else request.budget
    length = len(request.prompt)
    plan = self._policy.plan(length, budget, self._shape)
    return plan.kept_fraction(length)

  def cancel(self, request_id: str) -> None:
    """Ends a request early; nothing happens if it has ended."""
    if self._live.pop(request_id, None) is None:
      return
    self._scheduler.cancel(request_id)
    self._ended.append(Event(request_id=request_id, finish="cancelled"))

  def has_work(self) -> bool:
    """Whether another step would do anything."""
    return bool(self._live or self._flight or self._ended)

  def step(self) -> list[Event]:
    """Starts the next turn, and waits for the one before it."""
    turn = self._scheduler.schedule()
    outputs = None if turn is None else self._device.run(turn)
    events, self._ended = self._ended, []
    if self._flight is not None:
      events += self._collect(self._flight)
    self._flight = None
    if turn is not None and outputs is not None:
      self._flight = _Flight(turn, outputs)
    return events

  def wait(self) -> None:
    """Returns when the device has done all that it was given, for timing."""
    self._device.wait()

  def generate(self, requests: Iterable[Request]) -> dict[str, list[Event]]:
    """Serves requests to their end; what `submit` and `step` do, in a loop.

    Raises:
      ValueError: As `submit`.
    """
    answers: dict[str, list[Event]] = {}

    def step() -> None:
      for event in self.step():
        answers.setdefault(event.request_id, []).append(event)

    for request in requests:
      while self._scheduler.is_full:
        step()
      self.submit(request)
      answers[request.id] = []
    while self.has_work():
      step()
    return answers

  def warm_up(self) -> int:
    """Compiles every program that requests may need; returns how many."""
    self._device.compile_all()
    return self._device.num_compiled

  @property
  def memory(self) -> Memory:
    """What the device holds for the programs compiled so far."""
    return self._device.memory

  def stats(self) -> EngineStats:
    """For metrics."""
    stats = self._scheduler.stats()
    return EngineStats(
      waiting=stats.waiting,
      running=stats.running,
      pages_total=self._scheduler.allocator.num_pages,
      pages_used=stats.pages_used,
      pages_cached=stats.pages_cached,
      preemptions=stats.preemptions,
      tokens_generated=self._generated,
      compilations=self._device.num_compiled,
    )

  def snapshot(self) -> list[dict[str, Any]]:
    """What each running sequence keeps, by layer and KV head.

    Returns:
      For each sequence whose prompt has been read a dict of JSON types: id,
      prompt_tokens, generated_tokens, budget (asked for), kept_fraction (of
      tokens), kept_page_fraction (of whole pages), and by layer and head
      tokens, pages and full (whether the head keeps everything).
    """
    stats = self._scheduler.stats()
    page_size = self._scheduler.page_size
    found = []
    for sequence in stats.sequences:
      live = self._live.get(sequence.id)
      if live is None or live.head_of_slot is None:
        continue
      slot_of_place = np.argsort(live.head_of_slot, axis=-1)
      slot_of_head = np.take_along_axis(
        slot_of_place, self._place_of_head, axis=-1
      )
      tokens, pages = (
        np.take_along_axis(x, slot_of_head, axis=-1)
        for x in (sequence.lengths, sequence.pages)
      )
      whole = -(-sequence.tokens // page_size)
      budget = live.request.budget
      found.append(
        {
          "id": sequence.id,
          "prompt_tokens": len(live.request.prompt),
          "generated_tokens": live.generated,
          "budget": self._budget if budget is None else budget,
          "kept_fraction": float(tokens.sum() / tokens.size / sequence.tokens),
          "kept_page_fraction": float(pages.sum() / pages.size / whole),
          "tokens": tokens.tolist(),
          "pages": pages.tolist(),
          "full": (tokens >= sequence.tokens).tolist(),
        }
      )
    return found

  def _check_prompt(self, prompt: Sequence[int]) -> None:
    tokens = np.asarray(prompt)
    if not tokens.size and tokens.ndim == 1:
      return  # The scheduler has a word for it.
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
      raise ValueError(
        f"`prompt` must be a tuple of integers, got {tokens.ndim} axes of "
        f"{tokens.dtype}."
      )
    outside = tokens[(tokens < 0) | (tokens >= self._vocab_size)]
    if outside.size:
      raise ValueError(
        f"`prompt` must hold tokens in [0, {self._vocab_size}), got "
        f"{outside[0]}."
      )

  def _names_ending(self) -> Sequence[str]:
    """Ids that events or turns to come may mention, live or not."""
    names = [event.request_id for event in self._ended]
    if self._flight is None:
      return names
    turn = self._flight.turn
    if turn.decode is not None:
      names += turn.decode.requests
    for part in (turn.prefill, turn.compact):
      if part is not None:
        names.append(part.request.id)
    return names

  def _collect(self, flight: _Flight) -> list[Event]:
    """Events of a turn that the device has been given."""
    turn, outputs = flight.turn, jax.device_get(flight.outputs)
    events: list[Event] = []
    prefill = turn.prefill
    if prefill is not None and prefill.last:
      name = prefill.request.id
      live = self._live.get(name)
      if live is not None:
        live.head_of_slot = outputs.head_of_slot
        if not self._policy.knows_lengths:
          self._scheduler.set_lengths(
            name, outputs.lengths, outputs.head_of_slot
          )
        if prefill.emit:
          events += self._emit(name, outputs.prefill, 0)
    if turn.decode is not None:
      for slot, name in zip(
        turn.decode.slots, turn.decode.requests, strict=True
      ):
        if turn.decode.emit[slot]:
          events += self._emit(name, outputs.decode, int(slot))
    return events

  def _emit(self, name: str, sampled: Any, index: int) -> list[Event]:
    """The event of one new token, unless its request has ended."""
    live = self._live.get(name)
    if live is None:
      return []
    params = live.request.params
    token = int(sampled.tokens[index])
    self._scheduler.record(name, (token,))
    live.generated += 1
    self._generated += 1
    finish: FinishReason | None = None
    if token in params.stop_tokens:
      finish = "stop"
    elif live.generated == params.max_tokens:
      finish = "length"
    if finish is not None:
      self._scheduler.stop(name)
      del self._live[name]
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    if params.logprobs is not None:
      logprob = float(sampled.logprobs[index])
      most = min(params.logprobs, self._vocab_size)
      top = tuple(
        zip(
          sampled.top_tokens[index, :most].tolist(),
          sampled.top_logprobs[index, :most].tolist(),
          strict=True,
        )
      )
    return [
      Event(
        request_id=name,
        token=token,
        logprob=logprob,
        top_logprobs=top,
        finish=finish,
      )
    ]
