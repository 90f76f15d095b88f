"""What a person sees while a run goes on: a bar, or lines where none can be."""

import sys
import time
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)
from rich.table import Table


class Reporter:
  """Prints for process 0 and is silent elsewhere.

  Args:
    stream: Where to print; None is standard output.
  """

  def __init__(self, stream: TextIO | None = None) -> None:
    self._quiet = jax.process_index() != 0
    self.console = Console(
      file=stream or sys.stdout, quiet=self._quiet, highlight=False
    )
    if not self.console.is_terminal:
      # Nobody looks at the width of a file: do not wrap lines.
      self.console = Console(
        file=stream or sys.stdout,
        quiet=self._quiet,
        highlight=False,
        width=1000,
        color_system=None,
      )

  def say(self, text: str) -> None:
    """One line, text taken as it is."""
    self.console.print(text, markup=False, soft_wrap=True)
    self.console.file.flush()

  def table(self, table: Table) -> None:
    """A table as wide as it needs to be."""
    self.console.print(table)

  def progress(
    self, *, label: str, steps: int, done: int
  ) -> "LiveBar | PlainLines":
    """A progress display; `done` of the `steps` steps are behind the run."""
    kind = LiveBar if self.console.is_terminal else PlainLines
    return kind(self, label=label, steps=steps, done=done)


class LiveBar:
  """Bar with loss, tokens per second and time left; a context manager."""

  def __init__(
    self, reporter: Reporter, *, label: str, steps: int, done: int
  ) -> None:
    self._progress = Progress(
      TextColumn(label),
      BarColumn(bar_width=20),
      MofNCompleteColumn(),
      TextColumn("{task.fields[text]}"),
      TimeElapsedColumn(),
      TextColumn("left"),
      TimeRemainingColumn(),
      console=reporter.console,
      speed_estimate_period=120.0,
    )
    self._task = self._progress.add_task(
      label, total=steps, completed=done, text="compiling"
    )

  def __enter__(self) -> "LiveBar":
    self._progress.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._progress.stop()

  def update(self, step: int, loss: float, tokens_per_s: float) -> None:
    """Shows the state after `step` steps."""
    text = f"loss {loss:.3f}  {_rate(tokens_per_s)}"
    self._progress.update(self._task, completed=step, text=text)


class PlainLines:
  """About twenty lines over the run, for logs; a context manager."""

  def __init__(
    self, reporter: Reporter, *, label: str, steps: int, done: int
  ) -> None:
    self._reporter = reporter
    self._label = label
    self._steps = steps
    self._every = max(1, steps // 20)
    self._first = done
    self._start: tuple[int, float] | None = None

  def __enter__(self) -> "PlainLines":
    return self

  def __exit__(self, *_: Any) -> None:
    pass

  def update(self, step: int, loss: float, tokens_per_s: float) -> None:
    """Prints a line if it is time for one."""
    now = time.monotonic()
    if self._start is None:
      self._start = (step, now)  # The first step compiles: not counted.
    first, since = self._start
    due = step == self._first + 1 or step == self._steps
    if not due and step % self._every:
      return
    left = "..."
    if step > first:
      left = clock((self._steps - step) * (now - since) / (step - first))
    self._reporter.say(
      f"{self._label}  step {step}/{self._steps}  loss {loss:.4f}  "
      f"{_rate(tokens_per_s)}  left {left}"
    )


def comparison_table(rows: dict[str, dict[str, Any]]) -> Table:
  """One column of final figures per run, from their summaries."""
  table = Table(title="validation at the last step, all figures as measured")
  table.add_column("")
  for name in rows:
    table.add_column(name, justify="right")
  summaries = list(rows.values())

  def row(title: str, form: Any) -> None:
    table.add_row(title, *(form(summary) for summary in summaries))

  row("validation loss (nats/token)", lambda s: f"{s['validation_loss']:.4f}")
  row(
    "validation loss (bits/byte)",
    lambda s: f"{s['validation_bits_per_byte']:.4f}",
  )
  row("activated heads", lambda s: f"{100 * s['active_heads_fraction']:.1f} %")
  row("visible keys", lambda s: f"{100 * s['visible_keys_fraction']:.1f} %")
  row("FLOPs/token (forward)", lambda s: quantity(s["flops_per_token"]))
  row(
    "KV bytes read/token (decoding)",
    lambda s: quantity(s["kv_read_bytes_per_token"]),
  )
  row("parameters", lambda s: quantity(s["num_params"]))
  row("tokens/s", lambda s: f"{s['tokens_per_s']:,.0f}")
  return table


def quantity(value: float) -> str:
  """1234567 as "1.235 M"."""
  for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
    if abs(value) >= factor:
      return f"{value / factor:.4g} {letter}"
  return f"{value:.4g}"


def clock(seconds: float) -> str:
  """Seconds as 1:02:03 or 2:03."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


def _rate(tokens_per_s: float) -> str:
  return f"{tokens_per_s:,.0f} tokens/s" if tokens_per_s else "... tokens/s"
