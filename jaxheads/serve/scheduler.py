"""Who runs next, and on which pages: pure Python, the same every time."""

import collections
import numbers

import numpy as np
from jaxtyping import Bool, Int

from jaxheads.kvcache.by_shard import rings_of
from jaxheads.kvcache.policy import CacheShape, Plan, Policy
from jaxheads.kvcache.prefix import PrefixCache, block_keys
from jaxheads.kvcache.row_table import RowTable
from jaxheads.kvcache.rows import (
  RowStep,
  check_drops,
  check_rows,
  most_pages,
  num_pages,
  pages_by_shard,
)
from jaxheads.kvcache.shards import ShardedAllocator
from jaxheads.serve.request import QueueFull, Request
from jaxheads.serve.sequence import Sequence, State
from jaxheads.serve.stats import SequenceStats, Stats
from jaxheads.serve.turn import Compact, Decode, Prefill, Turn


class Scheduler:
  """First come, first served, over the slots of a batch and a pool of pages.

  Every turn decodes one token for each running sequence, and reads at most one
  prompt or chunk of one. When pages are short, the sequence that came last
  gives up all it has and waits at the front of the queue; its prompt is then
  read again and its known tokens are replayed, so that its answer does not
  depend on it. Who came first is never held up by who came later, and any
  request that was accepted fits when it is alone: everyone ends.

  The device may be a turn behind. A sequence that was scheduled for its last
  token is gone at the next `schedule`, whether or not the token is known by
  then; its pages may be given out at once, because the device works through
  turns in order. The caller must run every turn, in order, also for requests
  that it cancels meanwhile, and must not reuse an id before the turns that
  name it are over.

  A prompt is read whole, or in chunks that end with the prompt: the first one
  is the short one, the last one holds the policy's window. A policy that does
  not know lengths beforehand always reads into prompt pages (in one chunk, if
  `chunk` is `None`), and its sequences wait for `set_lengths` after that.

  Not safe for use by several threads at once.

  Args:
    shape: Layers R and KV heads K.
    page_size: Tokens of a page.
    num_pages: Pages of the pool of each shard, the dummy page 0 among them.
    max_batch: Sequence slots B.
    max_length: Tokens of prompt and answer, at most.
    max_waiting: Requests that wait, at most.
    policy: What rows keep. `plan`, `window`, `drops`, `knows_lengths` and
      `places_early` are
      used.
    budget: Of requests that name none, in (0, 1].
    chunk: Tokens of a prompt to read in a turn; `None` is all.
    prefix_sharing: Whether prompts that begin alike share prompt pages. Needs
      a policy or a `chunk` that uses prompt pages.
    shards: Devices that share the KV heads evenly; each has its own pool, and
      all of them must have room. Of several, `policy` is a
      `jaxheads.kvcache.by_shard.ByShard`. Page numbers are those of a
      `jaxheads.kvcache.shards.ShardedAllocator`.

  Raises:
    ValueError: A setting is out of range; the message names it.
  """

  def __init__(
    self,
    *,
    shape: CacheShape,
    page_size: int,
    num_pages: int,
    max_batch: int,
    max_length: int,
    max_waiting: int,
    policy: Policy,
    budget: float = 1.0,
    chunk: int | None = None,
    prefix_sharing: bool = False,
    shards: int = 1,
  ) -> None:
    for name, value, least in (
      ("page_size", page_size, 1),
      ("max_batch", max_batch, 1),
      ("max_length", max_length, 2),
      ("max_waiting", max_waiting, 1),
      ("chunk", chunk, policy.window),
    ):
      if value is not None and value < least:
        raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    _check_budget(budget)
    uses_prompt_pages = chunk is not None or not policy.places_early
    if prefix_sharing and not uses_prompt_pages:
      raise ValueError(
        "`prefix_sharing` needs prompt pages; set `chunk`, the tokens of a "
        "prompt to read in a turn."
      )
    policy.plan(1, budget, shape)  # It may be for another model.
    self.shape = shape
    self.page_size = page_size
    self.max_length = max_length
    self.allocator = ShardedAllocator(num_pages, shards)
    self.prefixes = PrefixCache(self.allocator)
    self.rows = RowTable(shape, max_batch, max_length, page_size)
    self.preemptions = 0
    self._max_waiting = max_waiting
    self._policy = policy
    self._budget = budget
    self._chunk = chunk
    self._uses_prompt_pages = uses_prompt_pages
    self._prefix_sharing = prefix_sharing
    self._shards = shards
    # Where each row slot's pages are.
    by_slot = np.arange(shape.num_kv_heads) * shards // shape.num_kv_heads
    self._shard_of_row = np.broadcast_to(by_slot, shape)
    self._heads = self._shard_of_row.size
    self._sequences: dict[str, Sequence] = {}
    # Both in the order in which requests came; who is active came before all
    # who wait.
    self._waiting: collections.deque[Sequence] = collections.deque()
    self._active: list[Sequence] = []
    self._slots: list[Sequence | None] = [None] * max_batch

  # What a caller does with requests.

  def add(self, request: Request) -> None:
    """Puts a request at the end of the queue.

    Raises:
      ValueError: It can never run; the message says why.
      QueueFull: `max_waiting` requests wait already.
    """
    if request.id in self._sequences:
      raise ValueError(f"`id` must be unique, {request.id!r} is in use.")
    plan = self.check(request)
    if self.is_full:
      raise QueueFull(f"{len(self._waiting)} requests are waiting.")
    blocks: tuple[bytes, ...] = ()
    if self._prefix_sharing:
      blocks = block_keys(request.prompt, self.page_size)
    sequence = Sequence(request=request, plan=plan, blocks=blocks)
    self._sequences[request.id] = sequence
    self._waiting.append(sequence)

  def check(self, request: Request) -> Plan:
    """The plan of a request that may come; changes nothing.

    Raises:
      ValueError: It can never run; the message says why.
    """
    length, answer = len(request.prompt), request.params.max_tokens
    if not length:
      raise ValueError("`prompt` must hold at least one token.")
    if length + answer > self.max_length:
      raise ValueError(
        f"`prompt` ({length} tokens) and `max_tokens` ({answer}) must fit in "
        f"{self.max_length} tokens. Shorten the prompt or ask for fewer."
      )
    budget = self._budget if request.budget is None else request.budget
    _check_budget(budget)
    plan = self._policy.plan(length, budget, self.shape)
    check_rows(plan.lengths, plan.rings, self.shape, length, self._shards)
    most = int(self._most_pages(plan, length, answer).max())
    if most > self.allocator.pages_in_shard:
      where = "" if self._shards == 1 else " on one device"
      raise ValueError(
        f"The request may need {most} pages{where}, the pool has "
        f"{self.allocator.pages_in_shard}. Lower `budget` or `max_tokens`, or "
        "shorten the prompt."
      )
    return plan

  @property
  def is_full(self) -> bool:
    """Whether `add` takes no more."""
    return len(self._waiting) >= self._max_waiting

  def cancel(self, request_id: str) -> None:
    """Ends a request now; nothing happens if it has ended."""
    sequence = self._sequences.get(request_id)
    if sequence is not None:
      self._retire(sequence)

  def stop(self, request_id: str) -> None:
    """Ends a request whose answer is complete, as `cancel` does."""
    self.cancel(request_id)

  def record(self, request_id: str, tokens: tuple[int, ...]) -> None:
    """Notes the values of a request's next new tokens, in order.

    Those of a turn must be here before `schedule` is called for the second
    time after it. Nothing happens if the request has ended.

    Raises:
      ValueError: There are more than were scheduled.
    """
    sequence = self._sequences.get(request_id)
    if sequence is None:
      return
    if len(sequence.known) + len(tokens) > sequence.scheduled:
      raise ValueError(
        f"{len(tokens)} new tokens for {request_id!r}, of which "
        f"{len(sequence.known)} are known and {sequence.scheduled} scheduled."
      )
    sequence.known.extend(tokens)

  def set_lengths(
    self,
    request_id: str,
    lengths: Int[np.ndarray, "R K"],
    heads: Int[np.ndarray, "R K"] | None = None,
  ) -> None:
    """Says how many tokens each row slot keeps of a prompt.

    For policies that do not know it, after the turn of the last chunk. Nothing
    happens if the request has ended, was preempted since, or knows already.

    Args:
      request_id: Of whose prompt.
      lengths: How many.
      heads: The KV head of each row slot; `None` if the plan knows it, or
        need not know.
    Raises:
      ValueError: They are no lengths, or exceed the policy's bounds.
    """
    sequence = self._sequences.get(request_id)
    if sequence is None or sequence.state is not State.SETTLING:
      return
    if sequence.settled is not None:
      return
    plan = sequence.plan
    lengths, rings = np.asarray(lengths, np.int32), plan.rings
    if plan.rings_by_rank is not None:
      rings = rings_of(plan.rings_by_rank, lengths, heads)
      plan = plan._replace(heads=heads, rings_by_rank=None)
    check_rows(lengths, rings, self.shape, sequence.length, self._shards)
    if (lengths > plan.lengths).any():
      raise ValueError("Lengths of rows exceed the bounds of the plan.")
    sequence.settled = plan._replace(lengths=lengths, rings=rings)
    if self._policy.places_early:
      over = self.rows.settle(sequence.slot, lengths, rings)
      self.allocator.free(over)
      sequence.state = State.RUNNING

  # What the device does next.

  def schedule(self) -> Turn | None:
    """The next turn; `None` if nothing can run as things are.

    That is: nobody waits or runs, or everyone who could run waits for
    `set_lengths`.

    Raises:
      RuntimeError: A token that must be replayed has not been recorded.
    """
    self._finish_turn()
    preemptions = self.preemptions
    drops = self._drop()
    step = self.rows.next_step(self._written())
    ready = next((s for s in self._active if self._is_settled(s)), None)
    ready = self._make_room(step, ready)
    decode = self._decode(step, drops)
    compact = None if ready is None else self._compact(ready)
    prefill = None
    if self._active and self._active[-1].state is State.PREFILLING:
      prefill = self._read_on(self._active[-1])
    elif self.preemptions == preemptions and not any(
      map(self._is_settled, self._active)
    ):
      prefill = self._admit()
    if prefill is None and compact is None and decode is None:
      return None
    return Turn(prefill=prefill, compact=compact, decode=decode)

  def stats(self) -> Stats:
    """How full everything is, as of the turns given out."""
    sequences = tuple(
      SequenceStats(
        id=s.request.id,
        slot=s.slot,
        tokens=s.position,
        lengths=self.rows.lengths[:, s.slot].copy(),
        rings=self.rows.rings[:, s.slot].copy(),
        pages=num_pages(self.rows.lengths[:, s.slot], self.page_size),
      )
      for s in self._active
      if s.state is State.RUNNING
    )
    return Stats(
      waiting=len(self._waiting),
      running=len(self._active),
      pages_used=self.allocator.num_used - self.prefixes.num_idle_pages,
      pages_cached=self.prefixes.num_idle_pages,
      pages_free=int(self.allocator.num_free.sum()),
      preemptions=self.preemptions,
      page_size=self.page_size,
      sequences=sequences,
    )

  # Pages.

  def _most_pages(
    self, plan: Plan, length: int, answer: int
  ) -> Int[np.ndarray, " shards"]:
    """Pages that a request holds at once on each shard, at most."""
    exact = self._policy.knows_lengths
    rows = most_pages(
      plan.lengths,
      plan.rings,
      first=length,
      count=answer - 1,  # Nobody reads the last token's keys.
      page_size=self.page_size,
      drops=lambda at: self._drops_at(at, plan) if exact else None,
      shards=self._shards,
    )
    if not self._uses_prompt_pages:
      return rows
    prompt = self._heads // self._shards * num_pages(length, self.page_size)
    return np.maximum(rows, prompt + self._row_pages(plan.lengths))

  def _row_pages(
    self, lengths: Int[np.ndarray, "R K"]
  ) -> Int[np.ndarray, " shards"]:
    return pages_by_shard(lengths, self.page_size, self._shards)

  def _growing_rows(self, plan: Plan) -> Int[np.ndarray, " shards"]:
    """Rows that may need a page for a new token."""
    return pages_by_shard((plan.rings == 0).astype(np.int32), 1, self._shards)

  def _drops_at(
    self, position: int, plan: Plan
  ) -> Int[np.ndarray, "R K"] | None:
    """`Policy.drops`, by row slot."""
    by_head = self._policy.drops(position, self.page_size, self.shape)
    if by_head is None or plan.heads is None:
      return by_head
    return np.take_along_axis(by_head, plan.heads, axis=-1)

  @property
  def _available(self) -> Int[np.ndarray, " shards"]:
    # What the prefix cache holds is spread evenly.
    idle = self.prefixes.num_idle_pages // self._shards
    return self.allocator.num_free + idle

  def _allocate(self, where: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """New pages, each of the shard that is named."""
    counts = np.bincount(where, minlength=self._shards)
    self.prefixes.evict(counts)
    pages = self.allocator.allocate(counts)
    in_order = np.empty_like(pages)
    in_order[np.argsort(where, kind="stable")] = pages
    return in_order

  def _place_rows(
    self, sequence: Sequence, plan: Plan
  ) -> Int[np.ndarray, "R K m"]:
    """Gives a sequence its rows; their lengths may be bounds."""
    counts = num_pages(plan.lengths, self.page_size)
    pages = self._allocate(np.repeat(self._shard_of_row, counts.reshape(-1)))
    is_settled = sequence.settled is not None
    sequence.state = State.RUNNING if is_settled else State.SETTLING
    return self.rows.place(sequence.slot, plan.lengths, plan.rings, pages)

  # Ends, and what they leave.

  def _finish_turn(self) -> None:
    """Frees what the turns given out were the last to need."""
    for sequence in [s for s in self._active if s.done]:
      self._retire(sequence)
    for sequence in self._active:
      if sequence.state is State.RUNNING:
        self._release_prompt(sequence)

  def _retire(self, sequence: Sequence) -> None:
    if sequence.state is State.WAITING:
      self._waiting.remove(sequence)
    else:
      self._release(sequence)
    del self._sequences[sequence.request.id]

  def _preempt(self, sequence: Sequence) -> None:
    self._release(sequence)
    self._waiting.appendleft(sequence)
    self.preemptions += 1

  def _release(self, sequence: Sequence) -> None:
    """Takes from an active sequence its slot and its pages."""
    self._release_prompt(sequence)
    self.allocator.free(self.rows.clear(sequence.slot))
    self._active.remove(sequence)
    self._slots[sequence.slot] = None
    sequence.state = State.WAITING
    sequence.slot = -1
    sequence.settled = None

  def _release_prompt(self, sequence: Sequence) -> None:
    """Frees prompt pages; of a prompt that was read, some may stay cached."""
    pages = sequence.prompt_pages
    if pages is None:
      return
    if sequence.read == sequence.length:
      count = len(sequence.blocks)
      blocks = pages[..., :count].reshape(self._heads, count)
      self.prefixes.insert(sequence.blocks, blocks.T)
    self.prefixes.release(sequence.blocks[: sequence.shared])
    self.allocator.free(pages.reshape(-1))
    sequence.prompt_pages = None
    sequence.shared = 0

  # Rows of prompts whose lengths came late.

  def _is_settled(self, sequence: Sequence) -> bool:
    # Rows that were placed early run as soon as they are settled.
    return sequence.state is State.SETTLING and sequence.settled is not None

  def _compact(self, sequence: Sequence) -> Compact:
    assert sequence.settled is not None
    assert sequence.prompt_pages is not None
    return Compact(
      slot=sequence.slot,
      request=sequence.request,
      plan=sequence.settled,
      prompt_pages=sequence.prompt_pages,
      row_pages=self._place_rows(sequence, sequence.settled),
    )

  # Decoding.

  def _running(self) -> Bool[np.ndarray, " B"]:
    return np.array(
      [s is not None and s.state is State.RUNNING for s in self._slots]
    )

  def _written(self) -> Int[np.ndarray, " B"]:
    return np.array(
      [0 if s is None else s.written for s in self._slots], np.int32
    )

  def _drop(self) -> Int[np.ndarray, "R B K"]:
    """Lets rows give up pages before the next token, as the policy says."""
    drops = np.full_like(self.rows.lengths, -1)
    for sequence in self._active:
      if (
        sequence.state is not State.RUNNING
        or sequence.position % self.page_size
      ):
        continue
      assert sequence.settled is not None
      gone = self._drops_at(sequence.position, sequence.settled)
      if gone is None:
        continue
      slot = sequence.slot
      check_drops(
        gone,
        self.rows.lengths[:, slot],
        self.rows.rings[:, slot],
        self.page_size,
      )
      self.allocator.free(self.rows.drop(slot, gone))
      drops[:, slot] = gone
    return drops

  def _make_room(
    self, step: RowStep, ready: Sequence | None
  ) -> Sequence | None:
    """Preempts who came last until the others' pages are there.

    Args:
      step: One more token in every slot.
      ready: Who may get its rows now.
    Returns:
      `ready`, if there is room for its rows too.
    """
    new = step.new_page
    needs = new.reshape(*new.shape[:2], self._shards, -1).sum(axis=(0, 3))
    wanted = self._running() @ needs  # By shard.
    rows = 0 if ready is None else self._rows_of(ready)
    wanted = wanted + rows
    while (wanted > self._available).any():
      last = self._active[-1]
      if last is ready:
        # It can wait; it goes only if the others need its prompt pages.
        wanted = wanted - rows
        ready = None
        continue
      if last.state is State.RUNNING:
        wanted = wanted - needs[last.slot]
      self._preempt(last)
    return ready

  def _rows_of(self, sequence: Sequence) -> Int[np.ndarray, " shards"]:
    """Pages of its rows, now that they are known."""
    assert sequence.settled is not None
    return self._row_pages(sequence.settled.lengths)

  def _decode(
    self, step: RowStep, drops: Int[np.ndarray, "R B K"]
  ) -> Decode | None:
    """One token for everyone who runs."""
    active = self._running()
    slots = np.flatnonzero(active)
    if not slots.size:
      return None
    needs = (step.new_page > 0) & active[:, None]
    where = np.broadcast_to(self._shard_of_row[:, None], needs.shape)[needs]
    new_pages = self.rows.take_step(step, active, self._allocate(where))
    drops[:, ~active] = -1
    forced = np.full(active.size, -1, np.int32)
    emit = np.zeros(active.size, bool)
    names = []
    for slot in slots:
      sequence = self._slots[slot]
      assert sequence is not None
      names.append(sequence.request.id)
      if sequence.written < sequence.replay:
        forced[slot] = self._known(sequence)
      sequence.written += 1
      emit[slot] = sequence.written == sequence.scheduled
      sequence.scheduled += int(emit[slot])
    return Decode(
      slots=slots.astype(np.int32),
      requests=tuple(names),
      new_pages=new_pages,
      drop=drops,
      forced=forced,
      emit=emit,
      entries=self.rows.listed(active, self._shards),
    )

  def _known(self, sequence: Sequence) -> int:
    """The token that a sequence writes next, in replay."""
    if sequence.written >= len(sequence.known):
      raise RuntimeError(
        f"Token {sequence.written} of {sequence.request.id!r} must be "
        "recorded before it is replayed."
      )
    return sequence.known[sequence.written]

  # Prompts.

  def _admit(self) -> Prefill | None:
    """Starts who has waited longest, if there is a slot and room."""
    if not self._waiting or None not in self._slots:
      return None
    sequence = self._waiting[0]
    # The window must be read again, and one token at least: window >= 1.
    sharable = max(0, sequence.length - self._policy.window) // self.page_size
    shared, idle = self.prefixes.match(sequence.blocks[:sharable])
    blocks = 0
    if self._uses_prompt_pages:
      blocks = num_pages(sequence.length, self.page_size) - shared
    needs = self._reserve(sequence) + self._heads * blocks // self._shards
    if self._policy.places_early:
      needs = needs + self._row_pages(sequence.plan.lengths)
    if (needs > self._available - idle // self._shards).any():
      return None
    self._waiting.popleft()
    self._active.append(sequence)
    sequence.slot = self._slots.index(None)
    self._slots[sequence.slot] = sequence
    sequence.state = State.PREFILLING
    sequence.written = 0
    sequence.replay = sequence.scheduled
    sequence.read = shared * self.page_size
    sequence.shared = shared
    if self._policy.knows_lengths:
      sequence.settled = sequence.plan
    if self._uses_prompt_pages:
      old = self.prefixes.take(sequence.blocks[:shared])
      new = self._allocate(np.tile(self._shard_of_row.reshape(-1), blocks))
      pages = np.concatenate([*old, new]).reshape(-1, self._heads)
      sequence.prompt_pages = pages.T.reshape(*self.shape, shared + blocks)
    return self._read_on(sequence)

  def _reserve(self, sequence: Sequence) -> Int[np.ndarray, " shards"]:
    """Pages to leave for others, so that a newcomer is not sent away at once.

    One page for each row that grows, and the rows of those who have none yet.
    Nothing if nobody else is active: the newcomer then fits.
    """
    if not self._active:
      return np.zeros(self._shards, int)
    reserve = self._growing_rows(sequence.plan)
    for other in self._active:
      reserve = reserve + self._growing_rows(other.settled or other.plan)
      if other.state is State.SETTLING and not self._policy.places_early:
        reserve = reserve + self._row_pages(other.plan.lengths)
    return reserve

  def _read_on(self, sequence: Sequence) -> Prefill | None:
    """The next chunk; `None` if it is the last and its rows find no room."""
    left = sequence.length - sequence.read
    size = left if self._chunk is None else self._chunk
    count = (left - 1) % size + 1  # Chunks end with the prompt.
    last = count == left
    row_pages = None
    if last and self._policy.places_early:
      if (self._row_pages(sequence.plan.lengths) > self._available).any():
        return None
      row_pages = self._place_rows(sequence, sequence.plan)
    elif last:
      sequence.state = State.SETTLING
    emit = last and not sequence.scheduled
    sequence.scheduled += int(emit)
    start, sequence.read = sequence.read, sequence.read + count
    return Prefill(
      slot=sequence.slot,
      request=sequence.request,
      start=start,
      count=count,
      last=last,
      plan=sequence.plan,
      prompt_pages=sequence.prompt_pages,
      row_pages=row_pages,
      emit=emit,
    )


def _check_budget(budget: float) -> None:
  if not isinstance(budget, numbers.Real) or not 0 < budget <= 1:
    raise ValueError(f"`budget` must be in (0, 1], got {budget!r}.")
