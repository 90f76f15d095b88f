"""Tokenizers: bytes, which need no file, and Hugging Face `tokenizers` JSON."""

import functools
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, Integer
from numpy.typing import ArrayLike

from jaxheads.errors import UserError

# Names under which published tokenizers keep their end-of-document token.
_EOT_NAMES = (
  "<|endoftext|>",
  "<|end_of_text|>",
  "<|eot|>",
  "</s>",
  "<eos>",
  "[SEP]",
)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer(Protocol):
  """What the corpus and the training script ask of a tokenizer."""

  @property
  def name(self) -> str:
    """What a log calls this tokenizer."""

  @property
  def vocab_size(self) -> int:
    """Number of ids: every id is in [0, vocab_size)."""

  @property
  def eot(self) -> int | None:
    """Id that ends each document, or None where the vocabulary has none."""

  def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
    """Ids of `text`, int32, without any special token."""

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> list[Integer[np.ndarray, " tokens"]]:
    """Ids of each UTF-8 document, without any special token."""

  def decode(self, ids: ArrayLike) -> str:
    """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""

  def num_bytes(self, ids: ArrayLike) -> int:
    """UTF-8 bytes of text that `ids` stand for; special tokens count 0."""


class ByteTokenizer:
  """UTF-8 bytes as ids 0..255, and 256 as the end of a document.

  >>> tokenizer = ByteTokenizer()
  >>> tokenizer.encode("né").tolist()
  [110, 195, 169]
  >>> tokenizer.decode([110, 195, 169, 256])
  'né'
  >>> tokenizer.num_bytes([110, 195, 169, 256])
  3
  """

  name = "bytes"
  vocab_size = 257
  eot = 256

  def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
    """Bytes of `text` as int32.

    Bytes of a command line that were not UTF-8 (surrogate escapes) come back
    as they were.
    """
    raw = text.encode("utf-8", errors="surrogateescape")
    return np.frombuffer(raw, np.uint8).astype(np.int32)

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> list[Integer[np.ndarray, " tokens"]]:
    """The documents themselves, seen as uint8 without a copy."""
    return [np.frombuffer(document, np.uint8) for document in documents]

  def decode(self, ids: ArrayLike) -> str:
    """Text of `ids`; 256 adds nothing, broken UTF-8 becomes U+FFFD.

    Raises:
      ValueError: An id is not in [0, 257).
    """
    flat = _checked_ids(ids, self.vocab_size)
    raw = flat[flat != self.eot].astype(np.uint8).tobytes()
    return raw.decode("utf-8", errors="replace")

  def num_bytes(self, ids: ArrayLike) -> int:
    """Number of ids that are bytes: a document's end counts 0.

    The end of a document costs a model bits but is no text, so it enters the
    numerator of bits per byte and not the denominator.
    """
    flat = _checked_ids(ids, self.vocab_size)
    return int(np.count_nonzero(flat != self.eot))


class HuggingFaceTokenizer:
  """A `tokenizers` JSON file (needs the extra `hf`).

  `num_bytes` reads lengths off the vocabulary: exact for byte-level BPE and
  for SentencePiece with byte fallback; where a normaliser rewrites the text
  (lower case, NFC), it counts the rewritten text.
  """

  def __init__(self, path: str | pathlib.Path):
    """Reads the file.

    Args:
      path: A `tokenizer.json`.

    Raises:
      UserError: The extra is not installed, or the file is no such JSON.
    """
    try:
      import tokenizers  # Optional extra, so not at the top.
    except ImportError:
      raise UserError(
        f"`tokenizer` = {str(path)!r} needs the package `tokenizers`, which "
        "is not installed; install it with: pip install 'jaxheads[hf]'"
      ) from None
    try:
      self._spec: dict[str, Any] = json.loads(
        pathlib.Path(path).read_text("utf-8")
      )
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except PermissionError:
      raise UserError(
        f"`tokenizer` file {str(path)!r} may not be read: permission denied; "
        "check its owner and mode."
      ) from None
    except Exception as error:  # `tokenizers` raises bare Exception.
      raise UserError(
        f'`tokenizer` must be "bytes" or a Hugging Face tokenizers JSON, '
        f"but {str(path)!r} is neither: {_first_line(error)}"
      ) from None
    # The file may ask for these; a corpus is never cut or padded by it.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._vocab: dict[str, int] = self._tokenizer.get_vocab(
      with_added_tokens=True
    )
    if not self._vocab:
      raise UserError(f"`tokenizer` file {str(path)!r} has no vocabulary.")
    self.name = pathlib.Path(path).name
    # Ids may have holes, so the largest counts, not how many there are.
    self.vocab_size = max(self._vocab.values()) + 1
    known = [self._vocab[name] for name in _EOT_NAMES if name in self._vocab]
    self.eot: int | None = known[0] if known else None

  def encode(self, text: str) -> Int[np.ndarray, " tokens"]:
    """Ids of `text`, int32, without special tokens."""
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> list[Integer[np.ndarray, " tokens"]]:
    """Ids of each document; the library spreads them over the cores."""
    encodings = self._tokenizer.encode_batch(
      [document.decode("utf-8") for document in documents],
      add_special_tokens=False,
    )
    return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

  def decode(self, ids: ArrayLike) -> str:
    """Text of `ids`, special tokens left out."""
    flat = _checked_ids(ids, self.vocab_size)
    return self._tokenizer.decode(flat.tolist(), skip_special_tokens=True)

  def num_bytes(self, ids: ArrayLike) -> int:
    """UTF-8 bytes that `ids` stand for; special tokens count 0."""
    return int(self._lengths[_checked_ids(ids, self.vocab_size)].sum())

  @functools.cached_property
  def _lengths(self) -> Int[np.ndarray, " vocab"]:
    """Bytes of text per id."""
    byte_level = '"ByteLevel"' in json.dumps(
      [self._spec.get("pre_tokenizer"), self._spec.get("decoder")]
    )
    prefix = (self._spec.get("model") or {}).get(
      "continuing_subword_prefix"
    ) or ""
    special = {
      token["id"]
      for token in self._spec.get("added_tokens") or ()
      if token.get("special")
    }
    lengths = np.zeros(self.vocab_size, np.int64)
    for token, index in self._vocab.items():
      if index in special:
        continue
      if byte_level:
        lengths[index] = len(token)  # One character stands for one byte.
      elif _BYTE_TOKEN.fullmatch(token):
        lengths[index] = 1
      else:
        text = token.removeprefix(prefix).replace("\u2581", " ")
        lengths[index] = len(text.encode("utf-8"))
    return lengths


def load_tokenizer(spec: str) -> Tokenizer:
  """The tokenizer that `spec` names.

  Args:
    spec: "bytes", or the path of a Hugging Face tokenizers JSON (extra `hf`),
      or of a folder that holds one as `tokenizer.json`.

  Returns:
    A `Tokenizer`.

  Raises:
    UserError: No such file, not such a JSON, or the extra is not installed.
  """
  if spec == "bytes":
    return ByteTokenizer()
  path = pathlib.Path(os.path.expanduser(spec))
  if os.path.isdir(path):
    path = path / "tokenizer.json"
  if not os.path.isfile(path):
    raise UserError(
      f'`tokenizer` must be "bytes" or the path of a Hugging Face '
      f"tokenizers JSON, but there is no file {str(path)!r}."
    )
  return HuggingFaceTokenizer(path)


def _checked_ids(
  ids: ArrayLike, vocab_size: int
) -> Integer[np.ndarray, " tokens"]:
  """`ids` as a flat integer array, each in [0, vocab_size)."""
  flat = np.asarray(ids).reshape(-1)
  if not flat.size:
    return np.zeros(0, np.int32)
  if not np.issubdtype(flat.dtype, np.integer):
    raise TypeError(f"`ids` must be integers, got {flat.dtype}.")
  low, high = int(flat.min()), int(flat.max())
  if low < 0 or high >= vocab_size:
    raise ValueError(
      f"`ids` must be in [0, {vocab_size}), got {low if low < 0 else high}."
    )
  return flat


def _first_line(error: BaseException) -> str:
  """First line of an error's text, or its type where it has none."""
  lines = str(error).strip().splitlines()
  return lines[0] if lines else type(error).__name__
