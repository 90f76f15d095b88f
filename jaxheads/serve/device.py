"""The device's part of the engine: its arrays, and the programs it has."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from jaxheads import sharding
from jaxheads.kvcache.pages import Pages
from jaxheads.kvcache.policy import CacheShape, Plan, Policy
from jaxheads.kvcache.rows import num_pages as pages_for
from jaxheads.models.decoder import DecoderLM
from jaxheads.serve import placement, programs
from jaxheads.serve.buckets import bucket, buckets, power_of_two
from jaxheads.serve.layers import Kept, Prompt
from jaxheads.serve.programs import Drawing, Placement, Start, State, Step
from jaxheads.serve.request import Request
from jaxheads.serve.sampling import Sampled, Sampling
from jaxheads.serve.state import Rows
from jaxheads.serve.turn import Compact, Decode, Prefill, Turn

# The list of a layer's pages has this many entries, 4 times as many, and so
# on: unused ones cost next to nothing.
_LEAST_ENTRIES = 64


class Outputs(NamedTuple):
  """What the host waits for, one turn later.

  Attributes:
    prefill: Sampled after a prompt's last token, one row.
    decode: Sampled for the sequences, by slot.
    lengths, head_of_slot: Of the rows of a prompt that has been read, see
      `layers.Kept`.
  """

  prefill: Sampled | None = None
  decode: Sampled | None = None
  lengths: Int[Array, "R K"] | None = None
  head_of_slot: Int[Array, "R K"] | None = None


class Memory(NamedTuple):
  """Bytes on each device; together the peak.

  Attributes:
    pool: Pages of keys and values.
    weights: The model.
    temporaries: What the program that needs most of them needs, as its
      compiler says.
  """

  pool: int
  weights: int
  temporaries: int


class Device:
  """Runs turns in order; each program is compiled once for a size.

  Args:
    model: A decoder.
    policy: What rows keep.
    num_pages, page_size: Of the pool of each device.
    max_batch, max_length, chunk: As in `engine.EngineConfig`.
    dtype: Of the pool; `None` is the model's.
    mesh: Devices that share the heads; `None` is one.
  """

  def __init__(
    self,
    model: DecoderLM,
    policy: Policy,
    *,
    num_pages: int,
    page_size: int,
    max_batch: int,
    max_length: int,
    chunk: int | None,
    dtype: Any,
    mesh: Mesh | None = None,
  ) -> None:
    config = model.config
    self._mesh = mesh
    self._shards = 1 if mesh is None else mesh.shape["heads"]
    self._num_pages = num_pages
    self._policy = policy
    self._page_size = page_size
    self._max_batch = max_batch
    self._most_tokens = pages_for(max_length, page_size) * page_size
    self._chunk = chunk
    self._shape = CacheShape(config.num_layers, config.num_kv_heads)

    def empty() -> State:
      return State(
        Pages.empty(
          self._shards * num_pages,
          page_size,
          config.head_dim,
          config.dtype if dtype is None else dtype,
        ),
        Rows.empty(self._shape, max_batch, max_length, page_size),
        Drawing.idle(max_batch, config.vocab_size),
      )

    if mesh is None:
      self._state = empty()
    else:
      where = placement.shardings(jax.eval_shape(empty), mesh)
      self._state = jax.jit(empty, out_shardings=where)()
    self._vocab_size = config.vocab_size
    # What is kept of prompts whose rows wait for their pages, by slot.
    self._kept: dict[int, Kept] = {}
    graphdef, self._variables = nnx.split(model)
    if mesh is not None:
      self._variables = jax.device_put(
        self._variables, sharding.shardings(self._variables, mesh)
      )

    def program(run: Callable[..., Any]) -> "_Program":
      return _Program(run, graphdef, self._variables, mesh)

    self._read_on = program(programs.read_on)
    self._finish_prompt = program(programs.finish_prompt)
    self._place_rows = program(programs.place_rows)
    self._step = program(programs.step)
    self._programs = (
      self._read_on,
      self._finish_prompt,
      self._place_rows,
      self._step,
    )

  @property
  def num_compiled(self) -> int:
    """Programs so far."""
    return sum(program.num_compiled for program in self._programs)

  @property
  def memory(self) -> Memory:
    """What the device must hold at once."""
    return Memory(
      pool=placement.bytes_on_one(self._state.pages),
      weights=placement.bytes_on_one(self._variables),
      temporaries=max(program.temporary_bytes for program in self._programs),
    )

  def run(self, turn: Turn) -> Outputs:
    """Gives the device a turn; returns before it is done."""
    outputs = Outputs()
    if turn.compact is not None:
      self._compact(turn.compact)
    if turn.prefill is not None:
      outputs = self._prefill(turn.prefill)
    if turn.decode is not None:
      outputs = outputs._replace(decode=self._decode(turn.decode))
    for array in jax.tree.leaves(outputs):
      array.copy_to_host_async()
    return outputs

  def wait(self) -> None:
    """Returns when all turns are done."""
    jax.block_until_ready(self._state)

  def compile_all(self) -> None:
    """Compiles whatever `run` may need."""
    early = self._policy.places_early
    plan = self._policy.plan(1, 1.0, self._shape)
    for size in self._prompt_sizes():
      pages = np.zeros((*self._shape, size // self._page_size), np.int32)
      placed = _placement(0, pages, plan, 0)
      in_pages = self._chunk is not None or not early
      prompt = _prompt(
        (),
        0,
        size if self._chunk is None else self._chunk,
        pages if in_pages else None,
      )
      self._finish_prompt.prepare(
        self._state,
        prompt,
        self._start(0, Request(id="", prompt=(0,))),
        plan.layers,
        placed if early else None,
        policy=self._policy,
      )
      if self._chunk is not None:
        self._read_on.prepare(self._state, prompt)
      if not early:
        # Arrays, because programs are told apart by where these are, too.
        heads = jnp.zeros(self._shape, jnp.int32)
        keep = jnp.zeros((*self._shape, size), bool)
        kept = Kept(keep, heads, heads)
        settled = placed._replace(rings_by_rank=None)
        if self._mesh is not None:
          kept = jax.device_put(kept, placement.shardings(kept, self._mesh))
        self._place_rows.prepare(self._state, kept, pages, settled)
    for slots in self._batch_sizes():
      rows = (self._shape.num_layers, slots, self._shape.num_kv_heads)
      each = np.zeros(slots, np.int32)
      told = Step(
        each, np.zeros(rows, np.int32), np.zeros(rows, np.int32), each
      )
      for entries in self._entries(slots):
        self._step.prepare(self._state, told, entries=entries)

  def _prefill(self, prefill: Prefill) -> Outputs:
    end = prefill.start + prefill.count
    size = self._prompt_size(end)
    room, pages = size, None
    if prefill.prompt_pages is not None:
      pages = self._pages(prefill.prompt_pages, size // self._page_size)
      # Not by what is left to read: prompts share beginnings of any length.
      room = self._chunk or size
    tokens = prefill.request.prompt[prefill.start : end]
    prompt = _prompt(tokens, prefill.start, room, pages)
    if not prefill.last:
      self._state = self._read_on(self._state, prompt)
      return Outputs()
    rows = None
    if prefill.row_pages is not None:
      rows = _placement(
        prefill.slot,
        self._pages(prefill.row_pages, size // self._page_size),
        prefill.plan,
        end,
      )
    self._state, sampled, kept = self._finish_prompt(
      self._state,
      prompt,
      self._start(prefill.slot, prefill.request),
      prefill.plan.layers,
      rows,
      policy=self._policy,
    )
    if rows is None:
      self._kept[prefill.slot] = kept
    return Outputs(
      prefill=sampled, lengths=kept.lengths, head_of_slot=kept.head_of_slot
    )

  def _compact(self, compact: Compact) -> None:
    length = len(compact.request.prompt)
    most = self._prompt_size(length) // self._page_size
    self._state = self._place_rows(
      self._state,
      self._kept.pop(compact.slot),
      self._pages(compact.prompt_pages, most),
      _placement(
        compact.slot,
        self._pages(compact.row_pages, most),
        compact.plan,
        length,
      ),
    )

  def _decode(self, decode: Decode) -> Sampled:
    slots = min(power_of_two(int(decode.slots[-1]) + 1), self._max_batch)
    active = np.zeros(slots, np.int32)
    active[decode.slots] = 1
    told = Step(
      active,
      decode.new_pages[:, :slots] % self._num_pages,
      decode.drop[:, :slots],
      decode.forced[:slots],
    )
    entries = next(n for n in self._entries(slots) if n >= decode.entries)
    self._state, sampled = self._step(self._state, told, entries=entries)
    return sampled

  def _start(self, slot: int, request: Request) -> Start:
    in_prompt = np.zeros(self._vocab_size, bool)
    in_prompt[list(request.prompt)] = True
    return Start(np.int32(slot), Sampling.of(request.params), in_prompt)

  def _pages(
    self, pages: Int[np.ndarray, "R K m"], count: int
  ) -> Int[np.ndarray, "R K count"]:
    """As the devices number them, so many for each row; 0 is none."""
    more = max(0, count - pages.shape[-1])
    padded = np.pad(pages, ((0, 0), (0, 0), (0, more)))
    return padded[..., :count] % self._num_pages

  def _prompt_size(self, length: int) -> int:
    """Room for a prompt, whole pages."""
    return min(bucket(length, self._page_size), self._most_tokens)

  def _prompt_sizes(self) -> list[int]:
    return sorted(
      {
        min(size, self._most_tokens)
        for size in buckets(self._most_tokens, self._page_size)
      }
    )

  def _batch_sizes(self) -> Iterator[int]:
    size = 1
    while size < 2 * self._max_batch:
      yield min(size, self._max_batch)
      size *= 2

  def _entries(self, slots: int) -> Iterator[int]:
    """Sizes of the list of a layer's pages; the last has room for all."""
    pages = self._most_tokens // self._page_size
    most = slots * self._shape.num_kv_heads // self._shards * pages
    size = _LEAST_ENTRIES
    while size < most:
      yield size
      size *= 4
    yield most


class _Program:
  """A function of the model and the state, compiled for each size it meets.

  The state is donated: every call replaces it.
  """

  def __init__(
    self,
    run: Callable[..., Any],
    graphdef: nnx.GraphDef,
    variables: nnx.State,
    mesh: Mesh | None,
  ) -> None:
    self._run = run
    self._mesh = mesh
    self._graphdef = graphdef
    self._variables = variables
    # By sizes; programs of equal models are shared.
    self._compiled: dict[Any, Any] = {}

  @property
  def num_compiled(self) -> int:
    return len(self._compiled)

  @property
  def temporary_bytes(self) -> int:
    """Of the size that needs most; 0 if compilers do not say."""
    found = (run.memory_analysis() for run in self._compiled.values())
    return max((x.temp_size_in_bytes for x in found if x), default=0)

  def prepare(
    self, state: State, *args: Any, **settings: Any
  ) -> Callable[..., Any]:
    """Compiles for arguments of these shapes, unless that has been done."""
    # Every turn comes by here: the model and the state have always one size.
    named = tuple(settings.items())
    key = (*_sizes(args), named)
    if key not in self._compiled:
      whole = _sizes((self._variables, state, *args))
      self._compiled[key] = _compile(
        self._run, self._graphdef, *whole, named, self._mesh
      )
    return self._compiled[key]

  def __call__(self, state: State, *args: Any, **settings: Any) -> Any:
    run = self.prepare(state, *args, **settings)
    return run(self._variables, state, *args)


@functools.lru_cache(maxsize=512)
def _compile(
  run: Callable[..., Any],
  graphdef: nnx.GraphDef,
  leaves: tuple[jax.ShapeDtypeStruct, ...],
  tree: Any,
  settings: tuple[tuple[str, Any], ...],
  mesh: Mesh | None,
) -> Callable[..., Any]:
  def merged(variables: nnx.State, *args: Any) -> Any:
    out = run(nnx.merge(graphdef, variables), *args, **dict(settings))
    if mesh is None:
      return out
    # The next turn expects its state where this one had it.
    return jax.lax.with_sharding_constraint(out, placement.shardings(out, mesh))

  merged.__name__ = run.__name__
  jitted = jax.jit(merged, donate_argnums=1)
  with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
    return jitted.lower(*tree.unflatten(leaves)).compile()


def _sizes(args: Any) -> tuple[tuple[jax.ShapeDtypeStruct, ...], Any]:
  """Shapes, dtypes and places of all leaves, and the tree they hang on."""
  leaves, tree = jax.tree.flatten(args)
  abstract = (
    jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=getattr(x, "sharding", None)
    )
    for x in leaves
  )
  return tuple(abstract), tree


def _prompt(
  tokens: tuple[int, ...],
  start: int,
  room: int,
  pages: Int[np.ndarray, "R K n"] | None,
) -> Prompt:
  padded = np.zeros(room, np.int32)
  padded[: len(tokens)] = tokens
  return Prompt(padded, np.int32(start), np.int32(len(tokens)), pages)


def _placement(
  slot: int,
  pages: Int[np.ndarray, "R K m"],
  plan: Plan,
  length: int,
) -> Placement:
  return Placement(
    np.int32(slot), pages, plan.rings, np.int32(length), plan.rings_by_rank
  )
