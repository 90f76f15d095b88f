"""A device that keeps labels instead of keys, and believes nobody.

It does turns cell by cell, in plain loops, and checks whatever it reads: every
cell of a row must hold what this row wrote there last.
"""

import itertools
import zlib

import numpy as np

from jaxheads.kvcache.by_shard import ByShard


def answer(request_id, index):
  """Token `index` of the answer to a request."""
  return (zlib.crc32(request_id.encode()) + 31 * index) % 997


class FakeDevice:
  def __init__(
    self, shape, page_size, num_pages, max_batch, policy, chunk, shards=1
  ):
    self.shape, self.page, self.policy, self.chunk = (
      shape, page_size, policy, chunk,
    )  # fmt: skip
    self.cells = np.full((num_pages, page_size), -1, np.int64)
    self.shards = shards
    self.truth = {}  # Lengths, heads and rings of rows found, by request.
    self.rows = [None] * max_batch  # Of a slot: [R][K] of _Row.
    self.reading = {}  # Tokens read, by slot.
    self.last = [None] * max_batch  # (id, index) sampled last, by slot.
    self.written = [0] * max_batch
    self.names = [None] * max_batch
    self.first_unseen = itertools.count()

  def run(self, turn, rng):
    """Does a turn; returns new tokens (id, index) and lengths found."""
    new, found = [], []
    parts = [
      (turn.prefill, self._prefill),
      (turn.compact, self._compact),
      (turn.decode, self._decode),
    ]
    rng.shuffle(parts)
    for part, do in parts:
      if part is not None:
        do(part, new, found)
    return new, found

  def _sampled(self, name, index, emit, new):
    if not emit:
      return None  # Whoever replays must not rely on the same token coming.
    new.append((name, index))
    return name, index

  def _prompt_labels(self, request):
    heads = np.arange(self.shape[0] * self.shape[1]).reshape(self.shape)
    # Keys of a token depend on all tokens up to it.
    past = itertools.accumulate(
      request.prompt, lambda past, token: hash((past, token)), initial=0
    )
    past = np.array(list(past)[1:], np.int64)
    return past ^ heads[..., None]  # [R, K, N]

  def _prefill(self, part, new, found):
    slot, request = part.slot, part.request
    length = len(request.prompt)
    end = part.start + part.count
    if part.prompt_pages is None:
      assert (part.start, part.count) == (0, length)
    else:
      self._read_chunk(part, end, length)
    assert part.last == (end == length)
    assert not (part.emit and not part.last)
    if part.last and not self.policy.knows_lengths:
      found.append((request.id, *self._found(part, length)))
    if part.row_pages is not None:
      assert part.last and self.policy.places_early
      plan, row_pages = part.plan, part.row_pages
      if not self.policy.knows_lengths:
        lengths, rings = self.truth[request.id]
        # There is a page for all that is allowed.
        held = -(-plan.lengths // self.page)[..., None]
        at = np.arange(row_pages.shape[-1])
        assert ((row_pages > 0) == (at < held)).all()
        plan = plan._replace(lengths=lengths, rings=rings)
        used = -(-lengths // self.page)[..., None]
        row_pages = np.where(at < used, row_pages, 0)
      self._fill_rows(slot, plan, row_pages)
    elif part.last:
      assert not self.policy.places_early
    if part.last:
      self.names[slot] = request.id
      self.written[slot] = 0
      self.last[slot] = self._sampled(request.id, 0, part.emit, new)

  def _found(self, part, length):
    """Lengths, and heads where these are asked for, of each row slot."""
    if not isinstance(self.policy, ByShard):
      return self.policy.found(part.plan, length), None
    inner, request = self.policy.policy, part.request
    plan = inner.plan(length, request.budget or 1.0, self.shape)
    lengths = plan.lengths
    if not inner.knows_lengths:
      lengths = inner.found(plan, length)
    # Any head may be the one that keeps most.
    rng = np.random.default_rng([length, len(request.id)])
    order = rng.permuted(
      np.broadcast_to(np.arange(self.shape[1]), self.shape), axis=1
    )
    by_head, rings = [], []
    for many, mine, rank in zip(lengths, plan.rings, order, strict=True):
      by_head.append(many[rank])
      # Among equals, the lowest head comes first.
      ranked = sorted(range(len(rank)), key=lambda h, m=many[rank]: (-m[h], h))
      rings.append([mine[ranked.index(head)] for head in range(len(rank))])
    by_head, rings = np.array(by_head), np.array(rings)
    each = self.shape[1] // self.shards
    heads = np.array(
      [
        [
          head
          for shard in range(self.shards)
          for head in sorted(
            range(shard * each, (shard + 1) * each),
            key=lambda h, row=row: (-row[h], h),
          )
        ]
        for row in by_head
      ]
    )
    lengths, rings = (
      np.take_along_axis(x, heads, axis=1) for x in (by_head, rings)
    )
    self.truth[request.id] = lengths, rings
    return lengths, heads

  def _read_chunk(self, part, end, length):
    size = self.chunk or length
    assert (length - end) % size == 0 and 0 < part.count <= size
    if part.last:
      assert part.count >= min(length, self.policy.window)
    name = (part.slot, part.request.id)
    if self.reading.get(name) != part.start:
      # A first chunk: what comes before it is shared.
      assert part.start % self.page == 0
      assert part.start <= max(0, length - self.policy.window)
    self.reading[name] = end
    assert part.prompt_pages.shape == (*self.shape, -(-length // self.page))
    assert (part.prompt_pages > 0).all()
    labels = self._prompt_labels(part.request)
    at = np.arange(part.start, end)
    pages = part.prompt_pages[..., at // self.page]
    self.cells[pages, at % self.page] = labels[..., at]
    if part.last:
      del self.reading[name]
    self._check_prompt(part.prompt_pages, labels[..., :end])

  def _check_prompt(self, pages, labels):
    cells = self.cells[pages].reshape(*self.shape, -1)
    assert (cells[..., : labels.shape[-1]] == labels).all(), "prompt pages"

  def _compact(self, part, new, found):
    assert not self.policy.places_early
    labels = self._prompt_labels(part.request)
    self._check_prompt(part.prompt_pages, labels)
    assert self.names[part.slot] == part.request.id
    if part.request.id in self.truth:
      lengths, rings = self.truth[part.request.id]
      assert (part.plan.lengths == lengths).all()
      assert (part.plan.rings == rings).all()
    self._fill_rows(part.slot, part.plan, part.row_pages)

  def _fill_rows(self, slot, plan, row_pages):
    self.rows[slot] = [
      [
        _Row(int(length), int(ring), [int(p) for p in pages], self)
        for length, ring, pages in zip(*layer, strict=True)
      ]
      for layer in zip(plan.lengths, plan.rings, row_pages, strict=True)
    ]

  def _decode(self, part, new, found):
    assert len(part.slots) == len(set(part.slots.tolist())) > 0
    assert (np.diff(part.slots) > 0).all()
    idle = np.ones(len(self.rows), bool)
    idle[part.slots] = False
    assert (part.new_pages[:, idle] == 0).all()
    assert (part.drop[:, idle] == -1).all()
    assert (part.forced[idle] == -1).all() and not part.emit[idle].any()
    entries = np.zeros((self.shape[0], self.shards), int)
    each = self.shape[1] // self.shards
    for slot, name in zip(part.slots, part.requests, strict=True):
      assert self.names[slot] == name, "decoded without a prompt"
      written = self.written[slot]
      if part.forced[slot] >= 0:
        assert part.forced[slot] == answer(name, written), "replay"
      else:
        assert self.last[slot] == (name, written), "no token to write"
      for r, k in np.ndindex(*self.shape):
        row = self.rows[slot][r][k]
        row.step(
          written, int(part.drop[r, slot, k]), int(part.new_pages[r, slot, k])
        )
        entries[r, k // each] += len(row.pages)
      self.written[slot] += 1
      self.last[slot] = self._sampled(name, written + 1, part.emit[slot], new)
    assert part.entries == entries.max()


class _Row:
  """Cells that one KV head's tokens are in."""

  def __init__(self, length, ring, pages, device):
    self.device, self.ring, self.length = device, ring, length
    self.size, self.cells = device.page, device.cells
    count = -(-length // self.size)
    assert all(pages[:count]) and not any(pages[count:])
    self.pages = pages[:count]
    self.labels = []
    for slot in range(length):
      self.labels.append(next(device.first_unseen))
      self._write(slot)

  def _write(self, slot):
    page = self.pages[slot // self.size]
    self.cells[page, slot % self.size] = self.labels[slot]

  def step(self, written, drop, new_page):
    size = self.size
    if drop >= 0:
      assert drop < len(self.pages) and len(self.labels) >= size * (drop + 1)
      del self.pages[drop]
      del self.labels[size * drop : size * (drop + 1)]
    label = next(self.device.first_unseen)
    if self.ring:
      slot = len(self.labels) - self.ring + written % self.ring
      self.labels[slot] = label
      assert not new_page
    else:
      slot = len(self.labels)
      self.labels.append(label)
      if len(self.labels) > size * len(self.pages):
        assert new_page, "a new page is missing"
        self.pages.append(new_page)
      else:
        assert not new_page, "a new page too early"
    self._write(slot)
    read = self.cells[self.pages].reshape(-1)[: len(self.labels)]
    assert read.tolist() == self.labels, "a row lost its tokens"
