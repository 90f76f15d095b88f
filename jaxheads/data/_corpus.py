"""A corpus: text from somewhere, split in two and encoded once."""

import dataclasses
import hashlib
import math
import os
import pathlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from jaxheads.errors import UserError

from . import _datasets, _text_files
from ._tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
  """Tokens to train on and tokens to validate on.

  Attributes:
    train, validation: Ids in the smallest of uint8, uint16 and int32 that
      holds the vocabulary (the loader widens each window to int32). Every
      document is followed by the tokenizer's `eot`, where it has one.
    train_bytes, validation_bytes: UTF-8 bytes of text in each split; document
      ends count 0.
    name: What a log calls this text.
    num_documents: Documents in both splits; a single file that was cut by
      position counts as 2.
    skipped: Files of a folder that were passed over because they are no text.
  """

  train: Integer[np.ndarray, " tokens"]
  validation: Integer[np.ndarray, " tokens"]
  train_bytes: int
  validation_bytes: int
  name: str
  num_documents: int = 0
  skipped: tuple[str, ...] = ()

  @property
  def num_skipped(self) -> int:
    """How many files were passed over because they are no text."""
    return len(self.skipped)


def load_corpus(
  data: str | os.PathLike[str] | None,
  *,
  tokenizer: Tokenizer,
  validation_fraction: float = 0.05,
) -> Corpus:
  """The corpus that `data` names, split and encoded.

  A folder, and Python's own source, are split by file: a file validates if
  the hash of its relative path says so, hence the same files on every machine
  and in every run, whatever other files come or go. A single file is split by
  position: its end validates, from a line boundary on.

  Args:
    data: None for the standard library's source on this machine; a path for
      a file or folder of UTF-8 text; "hf:NAME" or "hf:NAME:CONFIG" for a
      dataset of the `datasets` library (extra `hf`; may use the network).
    tokenizer: See `load_tokenizer`.
    validation_fraction: Expected share of the files (or share of the single
      file's bytes) that validates; in (0, 1). A dataset that brings its own
      validation split keeps it.

  Returns:
    A `Corpus`. It may be too short to train on: `make_loader`, which knows
    the window, checks that.

  Raises:
    UserError: Missing, empty, unreadable or binary data; the extra is not
      installed; a fraction outside (0, 1).
  """
  if not 0 < validation_fraction < 1:
    raise UserError(
      "`validation_fraction` must be more than 0 and less than 1, got "
      f"{validation_fraction}."
    )
  skipped: tuple[str, ...] = ()
  if data is None:
    name = "python standard library"
    train, validation = _split_by_name(
      _text_files.read_standard_library(), validation_fraction
    )
  elif str(data).startswith("hf:"):
    name = str(data)
    train, validation = _datasets.read_dataset(name, validation_fraction)
  else:
    path = pathlib.Path(os.path.expanduser(data))
    name = path.name or str(path)
    if not str(data):
      raise UserError("`data` is empty; give a path, or leave it out.")
    if _text_files.is_folder(path):
      documents, skipped = _text_files.read_folder(path)
      train, validation = _split_by_name(documents, validation_fraction)
    else:
      train, validation = _split_by_position(
        _text_files.read_file(path), validation_fraction
      )
  return Corpus(
    train=_encode(train, tokenizer),
    validation=_encode(validation, tokenizer),
    train_bytes=sum(map(len, train)),
    validation_bytes=sum(map(len, validation)),
    name=name,
    num_documents=len(train) + len(validation),
    skipped=skipped,
  )


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
  """Bits that a model spends per byte of text.

  Equals `mean_nats * num_tokens / num_bytes / ln 2`, and for the byte
  tokenizer without document ends just `mean_nats / ln 2`.

  Args:
    total_nats: Negative log-likelihood summed over the target tokens,
      document ends included.
    num_bytes: `tokenizer.num_bytes` of those targets: document ends count 0.

  Raises:
    ValueError: `num_bytes` is not positive.
  """
  if num_bytes <= 0:
    raise ValueError(f"`num_bytes` must be positive, got {num_bytes}.")
  return total_nats / num_bytes / math.log(2)


def _split_by_name(
  documents: Sequence[tuple[str, bytes]], fraction: float
) -> tuple[list[bytes], list[bytes]]:
  """Documents to train on and to validate on, by the hash of their names."""
  if len(documents) == 1:
    return _split_by_position(documents[0][1], fraction)
  ranks = {name: _name_hash(name) for name, _ in documents}
  held_out = {name for name, rank in ranks.items() if rank < fraction}
  # Of few files the hash may take none or all: each split keeps at least one.
  if not held_out:
    held_out = {min(ranks, key=ranks.__getitem__)}
  elif len(held_out) == len(ranks):
    held_out.remove(max(ranks, key=ranks.__getitem__))
  train = [raw for name, raw in documents if name not in held_out]
  validation = [raw for name, raw in documents if name in held_out]
  return train, validation


def _name_hash(name: str) -> float:
  """A number in [0, 1) that depends on nothing but `name`."""
  digest = hashlib.sha256(os.fsencode(name)).digest()
  return int.from_bytes(digest[:6], "big") / 2**48


def _split_by_position(
  raw: bytes, fraction: float
) -> tuple[list[bytes], list[bytes]]:
  """The beginning and the end of one document, cut at a line boundary."""
  target = len(raw) - round(len(raw) * fraction)
  target = min(max(target, 1), len(raw))
  cut = raw.rfind(b"\n", 0, target) + 1
  if cut == 0:
    cut = raw.find(b"\n", target) + 1
  if cut in (0, len(raw)):
    # One line: cut between two characters, never inside one.
    cut = target
    while cut > 0 and cut < len(raw) and raw[cut] & 0xC0 == 0x80:
      cut -= 1
  return [raw[:cut]], [raw[cut:]]


def _encode(
  documents: Sequence[bytes], tokenizer: Tokenizer
) -> Integer[np.ndarray, " tokens"]:
  """All documents as one array, each followed by `eot` if there is one."""
  pieces = tokenizer.encode_documents(documents)
  gap = 0 if tokenizer.eot is None else 1
  out = np.empty(
    sum(len(piece) + gap for piece in pieces),
    _token_dtype(tokenizer.vocab_size),
  )
  start = 0
  for piece in pieces:
    stop = start + len(piece)
    out[start:stop] = piece
    if tokenizer.eot is not None:
      out[stop] = tokenizer.eot
    start = stop + gap
  return out


def _token_dtype(vocab_size: int) -> type[np.integer]:
  """The smallest dtype that holds every id."""
  if vocab_size <= 2**8:
    return np.uint8
  return np.uint16 if vocab_size <= 2**16 else np.int32
