"""The scheduler's promises, one by one; the random worlds mix them."""

import collections
import dataclasses
import pathlib

import numpy as np
import pytest

import jaxheads
from jaxheads.kvcache import CacheShape, Plan
from jaxheads.serve.request import QueueFull, Request, SamplingParams
from jaxheads.serve.scheduler import Scheduler
from tests.serve.fake_policies import Blocks, Full, Late, Uneven

SHAPE = CacheShape(2, 2)


def scheduler(policy=Full(), **settings):  # noqa: B008
  defaults = dict(
    shape=SHAPE,
    page_size=4,
    num_pages=101,
    max_batch=4,
    max_length=40,
    max_waiting=8,
    policy=policy,
  )
  return Scheduler(**(defaults | settings))


def request(name, length=6, max_tokens=5, budget=None, prompt=None):
  return Request(
    id=name,
    prompt=tuple(range(length)) if prompt is None else prompt,
    params=SamplingParams(max_tokens=max_tokens),
    budget=budget,
  )


def tokens(turn):
  """Ids of the requests that get a new token in a turn."""
  names = []
  if turn.prefill is not None and turn.prefill.emit:
    names.append(turn.prefill.request.id)
  if turn.decode is not None:
    for slot, name in zip(turn.decode.slots, turn.decode.requests, strict=True):
      if turn.decode.emit[slot]:
        names.append(name)
  return names


def run(s, turns=99):
  """Turns until nothing can run; all tokens are 7."""
  done = []
  while len(done) < turns and (turn := s.schedule()) is not None:
    for name in tokens(turn):
      s.record(name, (7,))
    done.append(turn)
  return done


def test_the_host_part_needs_no_jax():
  root = pathlib.Path(jaxheads.__file__).parent
  names = "allocator prefix row_table rows".split()
  files = [root / "kvcache" / f"{name}.py" for name in names]
  names = "request scheduler sequence stats turn".split()
  files += [root / "serve" / f"{name}.py" for name in names]
  for path in files:
    assert "import jax\n" not in path.read_text(), path
    assert "from jax" not in path.read_text().replace(
      "from jaxheads", ""
    ).replace("from jaxtyping", ""), path


def test_one_request_alone():
  s = scheduler()
  s.add(request("a", length=6, max_tokens=4))
  turns = run(s)
  assert len(turns) == 4
  first = turns[0].prefill
  assert (first.start, first.count, first.last, first.emit) == (
    0,
    6,
    True,
    True,
  )
  assert first.prompt_pages is None and first.row_pages.shape == (2, 2, 2)
  assert [t.decode is None for t in turns] == [True, False, False, False]
  # Tokens at 6, 7 and 8: the last one begins a page in every row.
  assert [int((t.decode.new_pages > 0).sum()) for t in turns[1:]] == [0, 0, 4]
  assert [t.decode.entries for t in turns[1:]] == [4, 4, 6]
  assert all((t.decode.forced == -1).all() for t in turns[1:])
  assert s.allocator.num_used == 0 and s.schedule() is None


def test_one_prompt_a_turn_beside_all_who_decode():
  s = scheduler()
  for name in "abc":
    s.add(request(name))
  turns = run(s)
  assert [t.prefill and t.prefill.request.id for t in turns[:4]] == [
    *"abc", None,
  ]  # fmt: skip
  assert [t.decode.requests for t in turns[1:4]] == [
    ("a",), ("a", "b"), ("a", "b", "c"),
  ]  # fmt: skip


def test_a_newcomer_takes_the_lowest_free_slot():
  s = scheduler()
  for name in "abcd":
    s.add(request(name, max_tokens=30))
  run(s, turns=4)
  s.cancel("b")
  s.stop("d")
  s.add(request("e"))
  assert s.schedule().prefill.slot == 1


@pytest.mark.parametrize(
  ("length", "chunks"),
  [(3, [3]), (5, [5]), (6, [1, 5]), (13, [3, 5, 5]), (15, [5, 5, 5])],
)
def test_chunks_end_with_the_prompt(length, chunks):
  s = scheduler(Full(window=3), chunk=5)
  s.add(request("a", length=length, max_tokens=1))
  parts = [t.prefill for t in run(s)]
  assert [p.count for p in parts] == chunks
  assert [p.start for p in parts] == [0, *np.cumsum(chunks)[:-1]]
  assert [p.last for p in parts] == [p.emit for p in parts]
  assert [p.last for p in parts] == [False] * (len(parts) - 1) + [True]
  assert all(p.row_pages is None for p in parts[:-1])
  assert parts[-1].row_pages.shape == parts[0].prompt_pages.shape
  assert s.allocator.num_used == 0


def test_prompts_that_begin_alike_share_but_not_the_window():
  s = scheduler(Full(window=3), chunk=8, prefix_sharing=True)
  s.add(request("a", length=16, max_tokens=1))
  old = [t.prefill for t in run(s)][-1].prompt_pages
  s.add(request("b", length=16, max_tokens=1))
  # The last three tokens are read again: of four pages, three are shared.
  (again,) = [t.prefill for t in run(s)]
  assert (again.start, again.count) == (12, 4)
  assert (again.prompt_pages[..., :3] == old[..., :3]).all()
  assert (again.prompt_pages[..., 3] != old[..., 3]).all()
  s.add(request("c", prompt=(*range(9), *range(50, 57)), max_tokens=1))
  assert s.schedule().prefill.start == 8


def test_one_token_at_least_is_read():
  s = scheduler(Full(window=1), chunk=8, prefix_sharing=True)
  for name in "ab":
    s.add(request(name, length=8, max_tokens=1))
  assert [t.prefill.start for t in run(s)] == [0, 4]


def test_lengths_that_come_late():
  policy = Late(seed=0, window=2, rings=False)
  s = scheduler(policy)
  s.add(request("a", length=9))
  turn = s.schedule()
  part = turn.prefill
  assert part.last and part.emit and part.row_pages is None
  assert part.prompt_pages.shape == (2, 2, 3)
  assert s.schedule() is None and s.schedule() is None
  bounds = part.plan.lengths
  with pytest.raises(ValueError, match="exceed the bounds"):
    s.set_lengths("a", np.full(SHAPE, 9))
  with pytest.raises(ValueError, match="descend"):
    s.set_lengths("a", np.array([[0, 1], [0, 0]]))
  lengths = bounds // 2
  s.set_lengths("a", lengths)
  s.set_lengths("nobody", lengths)
  turn = s.schedule()
  assert turn.prefill is None and turn.decode is None
  assert (turn.compact.plan.lengths == lengths).all()
  assert (turn.compact.prompt_pages == part.prompt_pages).all()
  assert ((turn.compact.row_pages > 0).sum(-1) == -(-lengths // 4)).all()
  assert s.schedule().decode.requests == ("a",)


@dataclasses.dataclass(frozen=True)
class FullLate(Full):
  """Keeps everything, and says so late."""

  knows_lengths = places_early = False


def waiting_for_rows(max_tokens):
  """12 pages: `a` has 8 of them, `b` 4 for its prompt, and waits for 4."""
  s = scheduler(FullLate(), num_pages=13)
  s._reserve = lambda sequence: 0
  s.add(request("a", length=4, max_tokens=max_tokens))
  assert s.schedule().prefill.request.id == "a"
  s.set_lengths("a", np.full(SHAPE, 4))
  s.add(request("b", length=4, max_tokens=2))
  s.add(request("c", length=4, max_tokens=2))
  turn = s.schedule()
  assert turn.compact.request.id == "a" and turn.prefill.request.id == "b"
  assert s.schedule().decode.new_pages.sum() > 0
  s.set_lengths("b", np.full(SHAPE, 4))
  turn = s.schedule()
  assert turn.decode.requests == ("a",)
  assert turn.compact is None and turn.prefill is None
  assert s.preemptions == 0
  return s


def test_who_came_last_waits_for_its_rows_and_nobody_passes():
  s = waiting_for_rows(max_tokens=5)
  while (turn := s.schedule()).compact is None:
    assert turn.decode.requests == ("a",) and turn.prefill is None
  assert turn.decode is None and turn.compact.request.id == "b"
  assert turn.prefill.request.id == "c" and s.preemptions == 0
  assert s.schedule().decode.requests == ("b",)


def test_who_waits_for_its_rows_gives_way_too():
  s = waiting_for_rows(max_tokens=8)  # `a` needs all pages in the end.
  seen = []
  while s.preemptions == 0:
    seen.append(s.schedule())
  assert seen[-1].decode.requests == ("a",)
  assert (seen[-1].decode.new_pages > 0).sum() == 4
  while (turn := s.schedule()).prefill is None:
    assert turn.decode.requests == ("a",)
  assert turn.decode is None and turn.prefill.request.id == "b"


def test_tokens_that_were_not_recorded_cannot_be_replayed():
  s = scheduler(num_pages=25)
  s.add(request("a", length=5, max_tokens=14))
  s.add(request("b", length=5, max_tokens=10))
  with pytest.raises(RuntimeError, match="Token 0 of 'b' must be recorded"):
    collections.deque(iter(s.schedule, None))


def test_the_youngest_gives_way_and_is_replayed():
  # 4 rows, pages of 4: 13 and 12 tokens take 28 pages, 24 are there.
  s = scheduler(num_pages=25)
  s.add(request("a", length=5, max_tokens=14))
  s.add(request("b", length=5, max_tokens=10))
  answers = {"a": [], "b": []}
  replayed = []
  preempted_in = None
  for count in range(99):
    turn = s.schedule()
    if turn is None:
      break
    if s.preemptions and preempted_in is None:
      preempted_in = count
      assert turn.prefill is None and turn.decode.requests == ("a",)
    if preempted_in is not None and turn.decode is not None:
      forced = turn.decode.forced[turn.decode.forced >= 0].tolist()
      assert not forced or "b" in turn.decode.requests
      replayed += forced
    for name in tokens(turn):
      answers[name].append(100 * count + ord(name))
      s.record(name, (answers[name][-1],))
  assert s.preemptions == 1
  assert [len(answers[name]) for name in "ab"] == [14, 10]
  known = [x for x in answers["b"] if x < 100 * preempted_in]
  assert len(known) > 1 and replayed == known


def test_rows_give_up_pages_without_copying():
  s = scheduler(Blocks(page_size=4))
  s.add(request("a", length=4, max_tokens=30))
  drops, used = 0, []
  for turn in run(s):
    if turn.decode is not None:
      drops += int((turn.decode.drop >= 0).sum())
    used.append(s.allocator.num_used)
  assert drops > 0 and max(used) <= 2 * (3 + 4)


def test_who_would_never_fit_is_refused():
  s = scheduler(num_pages=17)  # 16 pages: 4 rows of 4 pages, 16 tokens.
  s.add(request("a", length=10, max_tokens=7))
  with pytest.raises(ValueError, match="may need 20 pages, the pool has 16"):
    s.add(request("b", length=10, max_tokens=8))
  # Prompt pages and rows exist together for a while.
  s = scheduler(num_pages=17, chunk=4)
  s.add(request("a", length=8, max_tokens=1))
  with pytest.raises(ValueError, match="may need 24 pages, the pool has 16"):
    s.add(request("b", length=9, max_tokens=1))


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (request("new", length=0), "at least one token"),
    (request("new", length=36), r"\(36 tokens\).*must fit in 40"),
    (request("new", budget=0.0), r"`budget` must be in \(0, 1\], got 0.0"),
    (request("new", budget=1.1), r"`budget` must be in \(0, 1\], got 1.1"),
    (request("new", budget=float("nan")), "`budget` must be in"),
    (request("old"), "'old' is in use"),
  ],
)
def test_bad_requests_are_refused(bad, message):
  s = scheduler()
  s.add(request("old"))
  with pytest.raises(ValueError, match=message):
    s.add(bad)
  assert s.stats().waiting == 1


@dataclasses.dataclass(frozen=True)
class Longer(Full):
  def plan(self, length, budget, shape):
    lengths = np.full(shape, length + 1, np.int32)
    return Plan(lengths, 0 * lengths, {})


def test_a_wrong_plan_is_refused():
  with pytest.raises(ValueError, match=r"must be in \[0, 6\]"):
    scheduler(Longer()).add(request("a"))


def test_a_full_queue_says_so():
  s = scheduler(max_waiting=2)
  s.add(request("a"))
  s.add(request("b"))
  with pytest.raises(ValueError, match="at least one token"):
    s.add(request("c", length=0))
  with pytest.raises(QueueFull, match="2 requests are waiting"):
    s.add(request("c"))
  s.schedule()
  s.add(request("c"))


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(page_size=0), "`page_size` must be at least 1"),
    (dict(num_pages=1), "`num_pages` must be at least 2"),
    (dict(max_batch=0), "`max_batch` must be at least 1"),
    (dict(max_length=1), "`max_length` must be at least 2"),
    (dict(max_waiting=0), "`max_waiting` must be at least 1"),
    (dict(chunk=2), "`chunk` must be at least 3"),
    (dict(budget=0.0), "`budget` must be in"),
    (dict(prefix_sharing=True), "`prefix_sharing` needs prompt pages"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    scheduler(Full(window=3), **settings)


def test_ends_are_idempotent_and_late_news_is_ignored():
  s = scheduler()
  s.add(request("a"))
  s.add(request("b"))
  s.schedule()
  s.cancel("b")  # It waits.
  s.cancel("a")
  for _ in range(2):
    s.cancel("a")
    s.stop("a")
    s.record("a", (1,))
    s.set_lengths("a", np.zeros(SHAPE))
  assert s.schedule() is None and s.allocator.num_used == 0
  s.add(request("a"))
  with pytest.raises(ValueError, match="0 are known and 0 scheduled"):
    s.record("a", (1,))


def test_turns_are_the_same_every_time():
  def story():
    s = scheduler(Uneven(seed=3, window=2), num_pages=60, chunk=4)
    for i in range(8):
      s.add(request(str(i), length=3 + 5 * i % 17, max_tokens=9))
    turns = run(s)
    new = [t.decode and t.decode.new_pages.tolist() for t in turns]
    return new, [t.prefill and t.prefill.request.id for t in turns]

  assert story() == story()


@dataclasses.dataclass(frozen=True)
class Share(Full):
  """Some rows whole, the others as short as the budget asks."""

  whole: int = 1

  def plan(self, length, budget, shape):
    K = shape.num_kv_heads
    rest = (budget * K - self.whole) * length / (K - self.whole)
    lengths = np.full(shape, int(rest), np.int32)
    lengths[:, : self.whole] = length
    return Plan(lengths, 0 * lengths, {})


def test_a_budget_of_40_percent_frees_58_of_100_pages():
  shape = CacheShape(8, 8)
  s = scheduler(
    Share(), shape=shape, page_size=128, num_pages=40_000, max_length=9000
  )
  for name in "abcd":
    s.add(request(name, length=8192, max_tokens=2, budget=0.4))
  run(s, turns=4)
  stats = s.stats()
  full = 4 * 64 * -(-8193 // 128)
  assert stats.pages_used == sum(x.pages.sum() for x in stats.sequences)
  assert stats.pages_used <= 0.42 * full
  assert stats.kept_page_ratio <= 0.42
  assert 0.399 <= stats.kept_ratio <= 0.4001


def test_stats_count_everything():
  s = scheduler(chunk=4, prefix_sharing=True, max_batch=2)
  empty = s.stats()
  assert (empty.kept_ratio, empty.kept_page_ratio) == (1.0, 1.0)
  for name in "abc":
    s.add(request(name, length=8, max_tokens=20))
  for _ in range(6):
    s.schedule()
  stats = s.stats()
  assert (stats.waiting, stats.running, stats.preemptions) == (1, 2, 0)
  a, b = stats.sequences
  assert (a.id, a.slot, b.id, b.slot) == ("a", 0, "b", 1)
  assert (a.lengths == a.tokens).all() and (a.rings == 0).all()
  assert stats.pages_used == a.pages.sum() + b.pages.sum()
  assert stats.pages_cached == 8  # Two blocks, 4 heads.
  assert stats.pages_used + stats.pages_cached + stats.pages_free == 100
  assert stats.kept_ratio == stats.kept_page_ratio == 1.0
