"""What the cycles of turns add up to, for `bench_decode_tpu_cycles.py`."""

import dataclasses
from collections.abc import Iterable

from experiments._decode_cycle_cases import Case, Problem
from experiments._tpu_cycle_costs import BRANCH, BYTES_PER_CYCLE
from pallas_kernels.aot.bundles import Body, Schedule
from pallas_kernels.paged_attention import mosaic_tpu

# Chips whose two cores share the rows; bandwidth is that of one core.
_CORES = {"v4": 2, "v5p": 2}


@dataclasses.dataclass(frozen=True)
class Turn:
  """A few pages of a row.

  Attributes:
    starting: Cycles of the core to start the copies of a turn like this.
    computing: Cycles of the core once its pages are there.
    copied: Bytes.
  """

  starting: float
  computing: float
  copied: int


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one layer's step, in cycles of the busiest core.

  Attributes:
    cycles: From first to last.
    busy: Of them, those in which the core has instructions to run.
    copying: What is copied, at full bandwidth.
    floor: The live pages, at full bandwidth.
  """

  cycles: float
  busy: float
  copying: float
  floor: float


def live_pages(case: Case, problem: Problem, lengths: list[int]) -> int:
  """Pages that hold a token; pages of all heads count once a head."""
  if case.kernel == "stock, all heads":
    lengths = _longest(problem, lengths)
  return sum(-(-length // case.page_size) for length in lengths)


def cost(
  case: Case, schedule: Schedule, problem: Problem, lengths: list[int]
) -> Cost:
  """Of rows of these lengths."""
  bandwidth = BYTES_PER_CYCLE[case.chip]
  pages = live_pages(case, problem, lengths)
  cores = _CORES.get(case.chip, 1)
  if case.kernel == "ours":
    costs = OurCosts.of(schedule)
    # Cores take turns by blocks of rows.
    block = min(mosaic_tpu._SHARED_ROWS, problem.rows)
    shares = [
      [
        length
        for at, length in enumerate(lengths)
        if cores == 1 or at // block % cores == core
      ]
      for core in range(cores)
    ]
    each = [
      run(
        costs.turns(case, share),
        mosaic_tpu._BUFFERS - 1,
        len(share) * costs.row,
        bandwidth,
      )
      for share in shares
    ]
  else:
    # Half of its blocks on each of two cores, as its megacore mode shares them.
    if case.kernel == "stock, all heads":
      lengths = _longest(problem, lengths)
    turns, rest = stock_turns(case, schedule, problem, lengths)
    each = [run(turns[: len(turns) // cores], 1, rest / cores, bandwidth)]
  floor = pages * case.page_bytes / bandwidth / cores
  slowest = max(each, key=lambda one: one.cycles)
  return dataclasses.replace(slowest, floor=floor)


def run(turns: list[Turn], ahead: int, rest: float, bandwidth: float) -> Cost:
  """Cycles of turns in order, with copies under way so many turns ahead.

  Copies run one after the other at full bandwidth, whoever waits for them.

  Args:
    turns: Of all rows.
    ahead: Turns whose copies are started before a turn computes.
    rest: Cycles of the core besides turns, spread over them.
    bandwidth: Bytes a cycle.
  """
  now, memory = 0.0, 0.0
  arrival = []
  share = rest / max(1, len(turns))
  for started in turns[:ahead]:
    now += started.starting
    memory = max(memory, now) + started.copied / bandwidth
    arrival.append(memory)
  for at, turn in enumerate(turns):
    if at + ahead < len(turns):
      started = turns[at + ahead]
      now += started.starting
      memory = max(memory, now) + started.copied / bandwidth
      arrival.append(memory)
    now = max(now, arrival[at]) + turn.computing + share
  return Cost(
    cycles=now,
    busy=sum(turn.starting + turn.computing for turn in turns) + rest,
    copying=sum(turn.copied for turn in turns) / bandwidth,
    floor=0.0,
  )


@dataclasses.dataclass(frozen=True)
class OurCosts:
  """Bundles of the parts of our kernel.

  Attributes:
    whole: A turn all of whose tokens are seen.
    partial: A turn of a row's last tokens, besides the next two.
    halves: In it, so many tokens all of which are seen.
    least: In it, what is left, as many tokens as the last of `halves`.
    ahead: Starting the copies of a turn, besides those.
    page: Starting the copies of a page.
    row: A row, besides its turns.
  """

  whole: float
  partial: float
  halves: dict[int, float]
  least: float
  ahead: float
  page: float
  row: float

  @classmethod
  def of(cls, schedule: Schedule) -> "OurCosts":
    """From the tree of its loops.

    Raises:
      ValueError: The kernel is not built as this expects.
    """
    tiles = schedule.tiles()
    loops = [body for body in schedule.root.walk() if body.kind == "loop"]
    rows = [body for body in loops if _holds(body, tiles)][-1]
    inner = [body for body in rows.walk() if body.kind == "loop"][1:]
    whole = next(body for body in inner if body.matmuls)
    partial = next(
      body for body in inner if not body.matmuls and _holds(body, tiles[1:])
    )
    if whole is not tiles[0] or any(
      tile.kind != "guard" for tile in tiles[1:-1]
    ):
      raise ValueError(f"{schedule.name}: the turns are not where they were.")
    ahead, page = _look_ahead(whole)
    ahead_of_part, _ = _look_ahead(partial)
    *halves, least = tiles[1:]
    sizes = [mosaic_tpu._TOKENS >> at for at in range(1, len(halves) + 1)]
    if least.kind != "loop":
      raise ValueError(f"{schedule.name}: the last tokens are not in a loop.")
    parts = sum(_bundles(tile) for tile in tiles[1:])
    around = _bundles(partial) - parts
    return cls(
      whole=whole.bundles + BRANCH,
      partial=around - _bundles(partial.inner[0]) + ahead_of_part - ahead,
      halves={
        size: tile.bundles for size, tile in zip(sizes, halves, strict=True)
      },
      least=least.bundles + BRANCH,
      ahead=ahead,
      page=page,
      row=_bundles(rows) - _bundles(whole) - _bundles(partial) + BRANCH,
    )

  def turns(self, case: Case, lengths: list[int]) -> list[Turn]:
    """Of rows of these lengths, whose queries see all of them."""
    size = mosaic_tpu._TOKENS
    found = []
    for length in lengths:
      for first in range(0, length, size):
        tokens = min(size, length - first)
        pages = -(-tokens // case.page_size)
        computing = self.whole
        if tokens < size:
          computing = self.partial
          left = tokens
          for piece, cycles in self.halves.items():
            computing += cycles if piece <= left else BRANCH
            left -= piece if piece <= left else 0
          computing += self.least if left else 0
        starting = self.ahead + pages * self.page
        found.append(Turn(starting, computing, pages * case.page_bytes))
    return found


def stock_turns(
  case: Case, schedule: Schedule, problem: Problem, lengths: list[int]
) -> tuple[list[Turn], float]:
  """Blocks of the stock kernel, and its cycles besides them.

  It copies whole blocks, also past the end of a row.
  """
  (tile,) = schedule.tiles()
  # The first copies are started once, the next ones by every block: nothing
  # else in it is as long.
  longest = sorted(tile.inner, key=_bundles)[-2:]
  copies = [body for body in tile.inner if body in longest]
  computing = _bundles(tile) - sum(map(_bundles, copies)) + BRANCH
  pages = problem.stock_tokens // case.page_size
  block = Turn(_bundles(copies[1]), computing, pages * case.page_bytes)
  count = sum(-(-length // problem.stock_tokens) for length in lengths)
  grid = next(body for body in schedule.root.inner if tile in body.walk())
  around = _bundles(grid) - _bundles(tile)
  return [block] * count, len(lengths) * around


def _longest(problem: Problem, lengths: list[int]) -> list[int]:
  """What pages of all heads hold: for each head, what any of them keeps."""
  heads = problem.kv_heads
  sequences = [lengths[at : at + heads] for at in range(0, len(lengths), heads)]
  return [max(one) for one in sequences for _ in range(heads)]


def _look_ahead(turn: Body) -> tuple[float, float]:
  """Bundles to start the copies of a turn, and those of each page."""
  guard = turn.inner[0]
  loops = [body for body in guard.walk() if body.kind == "loop"]
  if guard.kind != "guard" or not loops or guard.matmuls:
    raise ValueError("the first thing in a turn must be to look ahead.")
  rest = sum(body.bundles for body in guard.walk() if body not in loops)
  return rest, loops[0].bundles + BRANCH


def _holds(body: Body, tiles: Iterable[Body]) -> bool:
  inside = list(body.walk())
  return all(tile in inside for tile in tiles)


def _bundles(body: Body) -> int:
  return sum(each.bundles for each in body.walk())
