"""Windows of tokens as batches: deterministic, resumable, sharded."""

import sys
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import grain
import numpy as np
from jaxtyping import Integer

from jaxheads.errors import UserError

# One process's rows of a global batch:
#   "tokens": int32 [B, T].
#   "targets": int32 [B, T]; targets[:, t] is the token after tokens[:, t].
#   "mask": bool [B, T]; False in rows that only fill up the last batch.
Batch: TypeAlias = dict[str, np.ndarray]


class _Windows:
  """Window i is tokens[i * T : i * T + T + 1]: neighbours share one token."""

  def __init__(self, tokens: Integer[np.ndarray, " tokens"], seq_len: int):
    self._tokens = tokens
    self._seq_len = seq_len

  def __len__(self) -> int:
    return (len(self._tokens) - 1) // self._seq_len

  def __getitem__(self, index: int) -> Integer[np.ndarray, " window"]:
    start = int(index) * self._seq_len
    return self._tokens[start : start + self._seq_len + 1]


class Loader(Iterator[Batch]):
  """Iterator over the batches of one process; see `make_loader`.

  Attributes:
    num_windows: Windows in one epoch.
    num_steps: Batches in all; None if the epochs never end.
  """

  def __init__(
    self,
    tokens: Integer[np.ndarray, " tokens"],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_epochs: int | None,
    rows: Sequence[int],
  ):
    self._tokens = tokens
    self._settings: dict[str, Any] = {
      "seq_len": seq_len,
      "batch_size": batch_size,
      "seed": seed,
      "shuffle": shuffle,
      "num_epochs": num_epochs,
    }
    self._fingerprint: dict[str, Any] | None = None
    self._batch_size = batch_size
    self._rows = tuple(rows)
    windows = _Windows(tokens, seq_len)
    self.num_windows = len(windows)
    order = grain.MapDataset.source(windows)
    if shuffle:
      # Grain numbers its epoch orders seed, seed + 1, ...: spread the seeds,
      # or epoch 1 of seed 0 would be epoch 0 of seed 1.
      spread = np.random.SeedSequence(seed).generate_state(1, np.uint32)[0]
      order = order.shuffle(seed=int(spread))
    self._order = order.repeat(num_epochs)
    if num_epochs is None:
      self.num_steps: int | None = None
      num_elements = sys.maxsize // batch_size
    else:
      self.num_steps = -(-num_epochs * self.num_windows // batch_size)
      num_elements = self.num_steps
    # Elements are steps, not windows, so Grain's position is the step: the
    # same on every process and under every number of processes. The tokens
    # are in memory and a batch is quickly cut: one thread stays ahead.
    self._batches = iter(
      grain.MapDataset.range(num_elements)
      .map(self._cut_batch)
      .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )

  def __next__(self) -> Batch:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch taken, as JSON can hold it.

    It is the same on every process, and fits a loader with another number of
    processes.
    """
    step = int(self._batches.get_state()["next_index"])
    return {"step": step, **self._describe()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to a position from `get_state`.

    Raises:
      UserError: It comes from other tokens or other settings, under which
        the position means nothing.
    """
    here = self._describe()
    changed = [
      f"`{name}` was {state.get(name)}, is {value}"
      for name, value in here.items()
      if name != "tokens_crc32" and state.get(name) != value
    ]
    if changed:
      raise UserError(
        "the data position cannot be resumed with other settings: "
        f"{'; '.join(changed)}."
      )
    if state.get("tokens_crc32") != here["tokens_crc32"]:
      raise UserError(
        "the data position cannot be resumed: the text has changed since the "
        "checkpoint; give the same `data` and `tokenizer` as before."
      )
    last = self.num_steps
    step = state.get("step")
    if not isinstance(step, int) or step < 0 or (last and step > last):
      raise UserError(f"the data position has no valid `step`: {step!r}.")
    self._batches.set_state({"next_index": step})

  def close(self) -> None:
    """Ends the thread; the loader cannot be used after that."""
    self._batches.close()

  def _describe(self) -> dict[str, Any]:
    """What must be equal for a position to mean the same."""
    if self._fingerprint is None:
      self._fingerprint = {
        **self._settings,
        "num_tokens": len(self._tokens),
        "tokens_crc32": zlib.crc32(np.ascontiguousarray(self._tokens).data),
      }
    return self._fingerprint

  def _cut_batch(self, step: int) -> Batch:
    """This process's rows of global batch `step`."""
    first = int(step) * self._batch_size
    shape = (len(self._rows), self._settings["seq_len"])
    tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    mask = np.zeros(shape, np.bool_)
    for place, row in enumerate(self._rows):
      if first + row >= len(self._order):
        break  # Rows ascend: those after it only fill up the last batch.
      window = self._order[first + row]
      tokens[place] = window[:-1]
      targets[place] = window[1:]
      mask[place] = True
    return {"tokens": tokens, "targets": targets, "mask": mask}


def make_loader(
  tokens: Integer[np.ndarray, " tokens"],
  *,
  seq_len: int,
  batch_size: int,
  seed: int = 0,
  shuffle: bool = True,
  num_epochs: int | None = None,
  rows: Sequence[int] | None = None,
  name: str = "tokens",
) -> Loader:
  """An iterator over batches of windows of `tokens`.

  Window i holds tokens[i * T : i * T + T + 1], so that over an epoch every
  token but the first is a target once (up to T - 1 at the end, which fill no
  window, are left out). Every epoch has its own order. The windows of all
  epochs form one stream, and global batch g is its next `batch_size` windows,
  of which each process reads the `rows` that its devices hold.

  To validate: `shuffle=False, num_epochs=1` gives each window exactly once.

  Args:
    tokens: Ids of any integer dtype; kept, not copied.
    seq_len: T, tokens per window.
    batch_size: Rows of the global batch, over all processes.
    seed: Names the sequence of orders; at least 0.
    shuffle: False keeps the order of the text.
    num_epochs: How often each window comes; None never ends. A last batch
      that is not full is filled with zeros whose mask is False.
    rows: Which rows of the global batch to read, in ascending order; None
      reads all. See `jaxheads.training.devices.rows_of_process`.
    name: What error messages call `tokens`.

  Returns:
    A `Loader`: `next` gives {"tokens": int32 [B, T], "targets": int32 [B, T],
    "mask": bool [B, T]} with B = `len(rows)`, where targets are the tokens one
    later; `get_state` and `set_state` save and restore the
    position exactly.

  Raises:
    UserError: `tokens` has no whole window, or a number is out of its range.
    TypeError: `tokens` are not integers.
    ValueError: `tokens` is not one-dimensional, or `rows` are not rows of the
      batch in ascending order.
  """
  if not np.issubdtype(tokens.dtype, np.integer):
    raise TypeError(f"`tokens` must be integers, got {tokens.dtype}.")
  if tokens.ndim != 1:
    raise ValueError(
      f"`tokens` must have one dimension, got shape {tokens.shape}."
    )
  for label, value, least in (
    ("seq_len", seq_len, 1),
    ("batch_size", batch_size, 1),
    ("seed", seed, 0),
    ("num_epochs", 1 if num_epochs is None else num_epochs, 1),
  ):
    if value < least:
      raise UserError(f"`{label}` must be at least {least}, got {value}.")
  if len(tokens) < seq_len + 1:
    raise UserError(
      f"`seq_len` = {seq_len} needs at least {seq_len + 1} tokens, but {name} "
      f"has {len(tokens)}; use a smaller `seq_len` or more `data`."
    )
  rows = range(batch_size) if rows is None else rows
  if list(rows) != sorted(set(rows) & set(range(batch_size))):
    raise ValueError(
      f"`rows` must ascend and be in [0, {batch_size}), got {list(rows)}."
    )
  return Loader(
    tokens,
    seq_len=seq_len,
    batch_size=batch_size,
    seed=seed,
    shuffle=shuffle,
    num_epochs=num_epochs,
    rows=rows,
  )
