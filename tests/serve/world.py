"""A scheduler, a fake device behind it, and a caller who does anything.

After each operation, `check` compares the scheduler with what it must be:
which requests live and in what order, who owns each page, what rows hold.
"""

import collections

import numpy as np

from jaxheads.kvcache import CacheShape
from jaxheads.kvcache.by_shard import ByShard
from jaxheads.serve.request import QueueFull, Request, SamplingParams
from jaxheads.serve.scheduler import Scheduler
from jaxheads.serve.sequence import State
from tests.serve import fake_device
from tests.serve.fake_policies import Blocks, Full, Late, Uneven


class World:
  """Draws everything from `rng`, so that a seed tells the whole story."""

  def __init__(self, rng, shards=1):
    self.rng = rng
    shape = CacheShape(int(rng.integers(1, 4)), int(rng.integers(1, 4)))
    shape = shape._replace(num_kv_heads=shards * shape.num_kv_heads)
    page = int(rng.integers(1, 5))
    max_length = int(rng.integers(4, 33))
    window = int(rng.integers(1, 5))
    seed = int(rng.integers(2**31))
    policy = [
      Uneven(seed, window),
      Late(seed, window),
      Blocks(page, window),
      Full(window),
    ][rng.integers(4)]
    if shards > 1:
      policy = ByShard(policy=policy, shards=shards)
    chunk = None
    if rng.random() < 0.6:
      chunk = window + int(rng.integers(0, 6))
    sharing = bool(rng.random() < 0.6)
    sharing &= chunk is not None or not policy.places_early
    heads = shape.num_layers * shape.num_kv_heads // shards
    # From a pool that one long request may fill, to one for several.
    longest = heads * -(-max_length // page)
    num_pages = 2 + int(longest * 4 ** rng.uniform(-1, 1))
    max_batch = int(rng.integers(1, 8))
    self.max_length = max_length
    # Short prompts with long answers are what fills a pool unawares.
    self.longest_prompt = int(max_length * rng.uniform(0.2, 1.05))
    self.vocabulary = int(rng.integers(1, 4))
    self.scheduler = Scheduler(
      shape=shape,
      page_size=page,
      num_pages=num_pages,
      max_batch=max_batch,
      max_length=max_length,
      max_waiting=int(rng.integers(1, 13)),
      policy=policy,
      chunk=chunk,
      prefix_sharing=sharing,
      shards=shards,
    )
    if rng.random() < 0.7:
      # Admits whoever fits now: then much is preempted soon.
      self.scheduler._reserve = lambda sequence: 0
    self.device = fake_device.FakeDevice(
      shape, page, shards * num_pages, max_batch, policy, chunk, shards
    )
    self.shards = shards
    self.count = 0
    self.max_tokens = {}  # By id: requests that live, first come first.
    self.answered = {}  # Tokens scheduled, by id.
    self.ended = collections.Counter()
    self.queue = collections.deque()  # Turns that the device has not done.
    self.tokens = collections.deque()  # Of turns done, not recorded.
    self.lengths = []  # Found by the device, not set.
    self.checks = 0
    self.done = collections.Counter()  # Operations and what they led to.

  # Operations.

  def add(self):
    rng = self.rng
    self.count += 1
    name = f"r{self.count}"
    length = int(rng.integers(0, 1 + self.longest_prompt))
    answer = int(rng.integers(1, max(2, self.max_length - length + 2)))
    # Prompts begin alike, or meet again after different beginnings.
    common = np.sort(rng.integers(0, length + 1, 2))
    families = rng.integers(0, self.vocabulary, 2) + 1
    prompt = np.arange(length) + 10**4 + 100 * self.count
    for begin, end, family in zip(
      (0, common[0]), common, families, strict=True
    ):
      prompt[begin:end] = np.arange(begin, end) + 1000 * family
    request = Request(
      id=name,
      prompt=tuple(prompt.tolist()),
      params=SamplingParams(max_tokens=answer),
      budget=[None, 0.2, 0.5, 1.0][rng.integers(4)],
    )
    full = len(self.scheduler._waiting) >= self.scheduler._max_waiting
    try:
      self.scheduler.add(request)
    except ValueError:
      self.done["refused"] += 1
    except QueueFull:
      assert full
      self.done["queue full"] += 1
    else:
      assert not full and length > 0
      self.max_tokens[name] = request.params.max_tokens
      self.answered[name] = 0
      self.done["added"] += 1

  def schedule(self):
    # The device may be one turn behind.
    while len(self.queue) + len(self.tokens) > 1:
      self.record()
    scheduler = self.scheduler
    before = [s.request.id for s in scheduler._active]
    for name in [n for n in before if self._is_done(n)]:
      self._end(name)
      before.remove(name)
      self.done["finished"] += 1
    preemptions = scheduler.preemptions
    turn = scheduler.schedule()
    after = [s.request.id for s in scheduler._active]
    gone = [n for n in before if n not in after]
    assert scheduler.preemptions - preemptions == len(gone)
    # Whoever goes came last, and nobody comes in the same turn.
    assert after[: len(before) - len(gone)] == before[: len(before) - len(gone)]
    if gone:
      assert set(after) < set(before)
    self.done["preempted"] += len(gone)
    if turn is None:
      assert not self.max_tokens or self.queue or self.tokens or self.lengths
      return
    self.done["turns"] += 1
    self.done["compacts"] += turn.compact is not None
    if turn.prefill is not None:
      self.done["prefills"] += 1
      self.done["shared"] += turn.prefill.start > 0 and (
        turn.prefill.request.id not in before
      )
      if turn.prefill.emit:
        self.answered[turn.prefill.request.id] += 1
    if turn.decode is not None:
      self.done["decoded"] += len(turn.decode.slots)
      for slot, name in zip(
        turn.decode.slots, turn.decode.requests, strict=True
      ):
        self.answered[name] += int(turn.decode.emit[slot])
        self.done["replayed"] += int(turn.decode.forced[slot] >= 0)
      self.done["dropped"] += int((turn.decode.drop >= 0).sum())
    self.queue.append(turn)
    if self.rng.random() < 0.5:
      self.run()

  def run(self):
    """Lets the device do what it has to do."""
    while self.queue:
      new, found = self.device.run(self.queue.popleft(), self.rng)
      self.tokens.append(new)
      self.lengths += found

  def record(self):
    """Reports the oldest turn that was not reported."""
    self.run()
    if self.tokens:
      for name, index in self.tokens.popleft():
        if name in self.max_tokens:
          known = self.scheduler._sequences[name].known
          assert len(known) == index, "a token twice, or out of order"
        self.scheduler.record(name, (fake_device.answer(name, index),))
        if self.rng.random() < 0.01:
          self.stop(name)
      self.done["records"] += 1

  def set_lengths(self):
    self.run()
    for name, lengths, heads in self.lengths:
      self.scheduler.set_lengths(name, lengths, heads)
    self.lengths = []

  def cancel(self):
    names = list(self.max_tokens)
    if names and self.rng.random() < 0.9:
      name = names[self.rng.integers(len(names))]
      self.done["cancelled"] += 1
    else:
      name = f"r{self.rng.integers(self.count + 2)}"
    self._end(name)
    self.scheduler.cancel(name)

  def stop(self, name):
    self.done["stopped"] += name in self.max_tokens
    self._end(name)
    self.scheduler.stop(name)

  def _is_done(self, name):
    return self.answered[name] == self.max_tokens[name]

  def _end(self, name):
    if self.max_tokens.pop(name, None) is not None:
      self.ended[name] += 1

  # What must hold after each of them.

  def check(self):
    scheduler = self.scheduler
    active, waiting = scheduler._active, list(scheduler._waiting)
    # Everyone is somewhere, in the order of coming: who is active, who waits.
    names = [s.request.id for s in (*active, *waiting)]
    assert names == list(self.max_tokens)
    assert set(names) == set(scheduler._sequences)
    assert all(s.state is State.WAITING for s in waiting)
    assert all(s.state is not State.WAITING for s in active)
    assert all(s.slot == -1 and s.prompt_pages is None for s in waiting)
    assert all(scheduler._slots[s.slot] is s for s in active)
    assert sum(s is not None for s in scheduler._slots) == len(active)
    self._check_owners(active)
    self._check_rows(active)

  def _check_owners(self, active):
    allocator = self.scheduler.allocator
    size = allocator.owners.size

    def count(arrays):
      if not arrays:
        return np.zeros(size, int)
      return np.bincount(np.concatenate(arrays, axis=None), minlength=size)

    table = self.scheduler.rows.pages
    rows = count([table[table > 0]])
    cache = self.scheduler.prefixes
    entries = [*cache._used.values(), *cache._idle.values()]
    cached = count([e.pages for e in entries])
    prompts = count(
      [s.prompt_pages for s in active if s.prompt_pages is not None]
    )
    assert rows.max() <= 1 and cached.max() <= 1, "a page is owned twice"
    assert not (rows & (prompts + cached > 0)).any(), "a row shares a page"
    assert ((prompts <= 1) | (cached == 1)).all(), "shared behind the cache"
    owners = allocator.owners
    assert (owners == rows + cached + prompts).all(), "a page has leaked"
    by_shard = owners.reshape(self.shards, -1)
    assert (by_shard[:, 0] == 0).all()
    for mine, shard in zip(by_shard, allocator.shards, strict=True):
      free = np.sort(shard._stack[: shard.num_free])
      assert (free == np.flatnonzero(mine[1:] == 0) + 1).all()
    # A head's pages are where the head is.
    heads = np.arange(self.scheduler.shape[1])[:, None]
    home = heads * self.shards // self.scheduler.shape[1]
    for held in (
      table,
      *(s.prompt_pages for s in active if s.prompt_pages is not None),
    ):
      assert ((held == 0) | (held // by_shard.shape[1] == home)).all()
    assert cache.num_idle_pages == sum(
      e.pages.size for e in cache._idle.values()
    )
    assert all(e.users > 0 for e in cache._used.values())
    assert all(e.users == 0 for e in cache._idle.values())
    self.checks += 1
    if self.checks % 20:
      return  # The rest takes its time.
    stats = self.scheduler.stats()
    assert stats.pages_used == ((rows + prompts) > 0).sum()
    assert stats.pages_cached == ((cached > 0) & (prompts == 0)).sum()
    assert stats.pages_free == (by_shard[:, 1:] == 0).sum()

  def _check_rows(self, active):
    rows = self.scheduler.rows
    has_rows = np.zeros(len(self.scheduler._slots), bool)
    early = self.scheduler._policy.places_early
    for sequence in active:
      if sequence.state is not State.RUNNING:
        has_rows[sequence.slot] = early and sequence.state is State.SETTLING
        continue
      has_rows[sequence.slot] = True
      if self.queue:
        continue  # The device is behind.
      mine = self.device.rows[sequence.slot]
      slot = sequence.slot
      for r, k in np.ndindex(*self.scheduler.shape):
        row = mine[r][k]
        pages = rows.pages[r, slot, k]
        assert rows.lengths[r, slot, k] == len(row.labels)
        assert rows.rings[r, slot, k] == row.ring
        assert pages[: len(row.pages)].tolist() == row.pages
        assert not pages[len(row.pages) :].any()
    assert not rows.lengths[:, ~has_rows].any()
    assert not rows.pages[:, ~has_rows].any()

  def do(self, operation):
    getattr(self, operation)()
    self.check()

  def drain(self):
    """No more requests: everyone ends, every page comes back."""
    for _ in range(2000):
      if not self.max_tokens and not self.queue:
        break
      self.do("schedule")
      self.do("set_lengths")
    assert not self.max_tokens, "starved"
    assert all(count == 1 for count in self.ended.values())
    assert len(self.ended) == self.done["added"]
    prefixes = self.scheduler.prefixes
    assert self.scheduler.allocator.num_used == prefixes.num_idle_pages
    prefixes.evict(self.scheduler.allocator.num_pages)
    assert self.scheduler.allocator.num_used == 0


OPERATIONS = ("schedule", "add", "record", "set_lengths", "cancel")
WEIGHTS = (0.55, 0.25, 0.08, 0.1, 0.02)


def play(seed, operations, shards=1):
  """A world of one seed; returns it."""
  rng = np.random.default_rng(seed)
  world = World(rng, shards)
  for operation in rng.choice(OPERATIONS, size=operations, p=WEIGHTS):
    world.do(operation)
  world.drain()
  return world
