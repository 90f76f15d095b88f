"""Hugging Face `datasets` by name; the only place that may use the network."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from jaxheads.errors import UserError

_HELD_OUT_SPLITS = ("validation", "valid", "dev", "test")


def read_dataset(
  spec: str, validation_fraction: float
) -> tuple[list[bytes], list[bytes]]:
  """Texts of a dataset to train on and to validate on.

  The text is the column "text", or else the first column of strings. Rows
  that are blank are left out. Where the dataset brings no validation split,
  a row validates if the hash of its text says so, which keeps duplicates on
  one side.

  Args:
    spec: "hf:NAME" or "hf:NAME:CONFIG".
    validation_fraction: Expected share of rows that validates.

  Returns:
    UTF-8 documents of both splits.

  Raises:
    UserError: The extra is not installed, there is no such dataset, or it
      has no text.
  """
  name, _, config = spec.removeprefix("hf:").partition(":")
  if not name:
    raise UserError(
      '`data` names no dataset; write "hf:NAME" or "hf:NAME:CONFIG", got '
      f"{spec!r}."
    )
  try:
    import datasets  # Optional extra, so not at the top.
  except ImportError:
    raise UserError(
      f"`data` = {spec!r} needs the package `datasets`, which is not "
      "installed; install it with: pip install 'jaxheads[hf]'"
    ) from None
  try:
    splits = datasets.load_dataset(name, config or None)
  except Exception as error:  # Whatever it is, this dataset cannot be had.
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    raise UserError(
      f"`data` = {spec!r} could not be loaded: {reason}"
    ) from None
  if not isinstance(splits, Mapping) or not splits:
    raise UserError(f"`data` = {spec!r} has no splits.")

  train_name = "train" if "train" in splits else next(iter(splits))
  train = list(_texts(splits[train_name], spec))
  held_out = [
    split for split in _HELD_OUT_SPLITS if split in splits.keys() - {train_name}
  ]
  if held_out:
    validation = list(_texts(splits[held_out[0]], spec))
  else:
    rows = [(row, _text_hash(row)) for row in train]
    train = [row for row, rank in rows if rank >= validation_fraction]
    validation = [row for row, rank in rows if rank < validation_fraction]
  if not train or not validation:
    raise UserError(
      f"`data` = {spec!r} has {len(train)} rows of text to train on and "
      f"{len(validation)} to validate on; both must have some."
    )
  return train, validation


def _texts(rows: Any, spec: str) -> Iterable[bytes]:
  """UTF-8 of every row that is not blank."""
  columns = list(rows.column_names)
  for column in ["text", *columns]:
    if column in columns and len(rows) and isinstance(rows[0][column], str):
      break
  else:
    raise UserError(
      f"`data` = {spec!r} has no column of text; its columns are "
      f"{', '.join(columns) or 'none'}."
    )
  for row in rows:
    text = row[column]
    if text and text.strip():
      yield text.encode("utf-8", errors="replace")


def _text_hash(raw: bytes) -> float:
  """A number in [0, 1) that depends on nothing but the text."""
  return int.from_bytes(hashlib.sha256(raw).digest()[:6], "big") / 2**48
