import math
import pathlib
import sysconfig

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads.data import ByteTokenizer, _text_files, bits_per_byte, load_corpus
from jaxheads.errors import UserError

TOKENIZER = ByteTokenizer()


def _documents(tokens):
  """The documents of an encoded split."""
  *documents, rest = np.split(
    tokens, np.flatnonzero(tokens == TOKENIZER.eot) + 1
  )
  assert not len(rest), "the last document has no end"
  return [document[:-1].astype(np.uint8).tobytes() for document in documents]


def _folder(tmp_path, count):
  folder = tmp_path / "texts"
  for index in range(count):
    path = folder / f"{'ab'[index % 2]}" / f"{index}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"text number {index}\n")
  return folder


# The standard library.


@pytest.fixture(scope="module")
def default_corpus():
  return load_corpus(None, tokenizer=TOKENIZER)


def test_default_corpus_is_large_source_text_in_a_small_dtype(default_corpus):
  corpus = default_corpus
  assert corpus.train.dtype == np.uint16
  # A distribution may leave out the library's tests, but not the library.
  assert corpus.train_bytes > 5e6
  share = corpus.validation_bytes / (
    corpus.train_bytes + corpus.validation_bytes
  )
  assert 0.02 < share < 0.1
  assert corpus.num_documents > 300
  ends = sum(
    int(np.count_nonzero(split == TOKENIZER.eot))
    for split in (corpus.train, corpus.validation)
  )
  assert ends == corpus.num_documents
  assert corpus.train_bytes == TOKENIZER.num_bytes(corpus.train)
  assert corpus.validation_bytes == TOKENIZER.num_bytes(corpus.validation)


def test_default_corpus_is_the_same_every_time(default_corpus):
  again = load_corpus(None, tokenizer=TOKENIZER)
  np.testing.assert_array_equal(again.train, default_corpus.train)
  np.testing.assert_array_equal(again.validation, default_corpus.validation)


def test_default_corpus_holds_whole_files_once(default_corpus):
  held_out = set(_documents(default_corpus.validation))
  for name in ("json/decoder.py", "dataclasses.py", "ast.py", "argparse.py"):
    raw = pathlib.Path(sysconfig.get_path("stdlib"), name).read_bytes()
    needle = np.frombuffer(raw, np.uint8).astype(np.uint16).tobytes()
    in_train = default_corpus.train.tobytes().count(needle)
    assert in_train + (raw in held_out) == 1, name


def test_standard_library_leaves_out_what_is_not_its_own(tmp_path):
  for name in (
    "site-packages/x.py",
    "__pycache__/x.py",
    "lib/dist-packages/x.py",
    "_sysconfigdata__linux.py",
    "notes.txt",
  ):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x = 1\n")
  (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
  (tmp_path / "nul.py").write_bytes(b"# \0\n")
  (tmp_path / "empty.py").write_bytes(b"")
  (tmp_path / "b.py").write_text("b = 1\n")
  (tmp_path / "a").mkdir()
  (tmp_path / "a" / "c.py").write_text("c = 1\n")
  assert _text_files.read_standard_library(tmp_path) == [
    ("a/c.py", b"c = 1\n"),
    ("b.py", b"b = 1\n"),
  ]


@pytest.mark.parametrize("exists", [True, False])
def test_python_without_source_says_to_give_data(tmp_path, exists):
  folder = tmp_path if exists else tmp_path / "nowhere"
  with pytest.raises(UserError, match="`data` was not given.*folder"):
    _text_files.read_standard_library(folder)


# Folders.


def test_split_by_file_is_disjoint_complete_and_stable(tmp_path):
  folder = _folder(tmp_path, 60)
  corpus = load_corpus(folder, tokenizer=TOKENIZER, validation_fraction=0.3)
  train, held_out = _documents(corpus.train), _documents(corpus.validation)
  everything = {f"text number {i}\n".encode() for i in range(60)}
  assert len(train) + len(held_out) == 60 == corpus.num_documents
  assert set(train) | set(held_out) == everything
  # Golden: these names hash below 0.03 on every machine and Python.
  few = load_corpus(folder, tokenizer=TOKENIZER, validation_fraction=0.03)
  assert sorted(_documents(few.validation)) == [
    f"text number {index}\n".encode() for index in (15, 26, 29, 57)
  ]
  # Other files come and go: each remaining file stays where it was.
  for path in sorted(folder.rglob("*.txt"))[::3]:
    path.unlink()
  fewer = load_corpus(folder, tokenizer=TOKENIZER, validation_fraction=0.3)
  assert set(_documents(fewer.train)) <= set(train)
  assert set(_documents(fewer.validation)) <= set(held_out)


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_each_split_keeps_a_file_whatever_the_hash_says(tmp_path, fraction):
  corpus = load_corpus(
    _folder(tmp_path, 2), tokenizer=TOKENIZER, validation_fraction=fraction
  )
  assert len(_documents(corpus.train)) == 1
  assert len(_documents(corpus.validation)) == 1


def test_folder_of_one_file_is_split_by_position(tmp_path):
  path = tmp_path / "texts" / "only.txt"
  path.parent.mkdir()
  path.write_text("".join(f"line {i}\n" for i in range(100)))
  one = load_corpus(path.parent, tokenizer=TOKENIZER)
  same = load_corpus(path, tokenizer=TOKENIZER)
  np.testing.assert_array_equal(one.train, same.train)
  np.testing.assert_array_equal(one.validation, same.validation)


def test_folder_skips_and_reports_what_is_no_text(tmp_path):
  folder = _folder(tmp_path, 4)
  (folder / "picture.PNG").write_text("text by its bytes, not by its name")
  (folder / "nul.txt").write_bytes(b"a\0b")
  (folder / "latin.txt").write_bytes(b"caf\xe9")
  (folder / "empty.txt").write_bytes(b" \n")
  (folder / ".hidden").write_text("hidden")
  (folder / ".git").mkdir()
  (folder / ".git" / "config").write_text("hidden")
  corpus = load_corpus(folder, tokenizer=TOKENIZER)
  assert corpus.skipped == ("latin.txt", "nul.txt", "picture.PNG")
  assert corpus.num_skipped == 3
  assert corpus.num_documents == 4
  assert not any(
    b"hidden" in document
    for document in _documents(
      np.concatenate([corpus.train, corpus.validation])
    )
  )


def test_folder_without_text_says_what_it_has(tmp_path):
  (tmp_path / "a.bin").write_bytes(b"\0")
  (tmp_path / "b.txt").write_bytes(b"")
  with pytest.raises(UserError, match=r"no UTF-8 text file \(1 bin.*1 empty"):
    load_corpus(tmp_path, tokenizer=TOKENIZER)


# Files.


@hypothesis.given(
  text=st.text(st.sampled_from("ab\né€\r"), min_size=1).filter(str.strip),
  fraction=st.floats(0.01, 0.99),
)
def test_split_by_position_keeps_all_text_in_order(
  tmp_path_factory, text, fraction
):
  path = tmp_path_factory.getbasetemp() / "some.txt"
  path.write_bytes(text.encode("utf-8"))
  corpus = load_corpus(path, tokenizer=TOKENIZER, validation_fraction=fraction)
  [train], [held_out] = map(_documents, (corpus.train, corpus.validation))
  assert (train + held_out).decode("utf-8") == text
  train.decode("utf-8")  # Not cut inside a character.


def test_split_by_position_holds_out_the_end_from_a_line_on(tmp_path):
  path = tmp_path / "some.txt"
  path.write_text("".join(f"line {i:03d}\n" for i in range(200)))
  corpus = load_corpus(path, tokenizer=TOKENIZER, validation_fraction=0.1)
  assert TOKENIZER.decode(corpus.validation).startswith("line 180\n")
  assert corpus.train_bytes + corpus.validation_bytes == 200 * 9


# Bad input.


def test_missing_path(tmp_path):
  with pytest.raises(UserError, match="`data` must be.*nothing.*not exist"):
    load_corpus(str(tmp_path / "nothing"), tokenizer=TOKENIZER)
  with pytest.raises(UserError, match="`data` is empty"):
    load_corpus("", tokenizer=TOKENIZER)


@pytest.mark.parametrize("raw", [b"", b" \n\t"])
def test_empty_file(tmp_path, raw):
  path = tmp_path / "empty.txt"
  path.write_bytes(raw)
  with pytest.raises(UserError, match="empty.txt' is empty"):
    load_corpus(path, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
  ("raw", "message"),
  [
    (b"abc\0def", "a NUL byte at offset 3"),
    (b"caf\xe9\n", "byte 0xe9 at offset 3 is not UTF-8"),
  ],
)
def test_binary_file_says_where(tmp_path, raw, message):
  path = tmp_path / "binary.txt"
  path.write_bytes(raw)
  with pytest.raises(UserError, match=f"binary.txt' is not UTF-8.*{message}"):
    load_corpus(path, tokenizer=TOKENIZER)


def test_endless_device_is_refused():
  with pytest.raises(UserError, match="'/dev/zero' is neither"):
    load_corpus("/dev/zero", tokenizer=TOKENIZER)


@pytest.mark.parametrize("in_folder", [True, False])
def test_permission_denied(tmp_path, monkeypatch, in_folder):
  # Not by chmod, which does not hold for root.
  folder = _folder(tmp_path, 2)

  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
  data = folder if in_folder else folder / "a" / "0.txt"
  with pytest.raises(UserError, match=r"0.txt' may not be read: permission"):
    load_corpus(data, tokenizer=TOKENIZER)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, math.nan])
def test_fraction_outside_its_range(fraction):
  with pytest.raises(UserError, match="`validation_fraction` must be"):
    load_corpus(None, tokenizer=TOKENIZER, validation_fraction=fraction)


# Arithmetic.


def test_bits_per_byte_of_a_uniform_model():
  # 257 equally likely ids cost log2(257) bits each; the document's end costs
  # as much and is no byte: 4 tokens, 3 bytes.
  ids = [*TOKENIZER.encode("né"), TOKENIZER.eot]
  total_nats = len(ids) * math.log(257)
  assert bits_per_byte(total_nats, TOKENIZER.num_bytes(ids)) == pytest.approx(
    math.log2(257) * 4 / 3, rel=1e-12
  )
  with pytest.raises(ValueError, match="`num_bytes` must be positive"):
    bits_per_byte(1.0, 0)


class _TwoLetters:
  """A vocabulary without an end of document."""

  name, eot = "letters", None

  def __init__(self, vocab_size):
    self.vocab_size = vocab_size

  def encode_documents(self, documents):
    return [np.frombuffer(raw, np.uint8) - 97 for raw in documents]


@pytest.mark.parametrize(
  ("vocab_size", "dtype"),
  [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.int32)],
)
def test_without_an_end_of_document_texts_follow_one_another(
  tmp_path, vocab_size, dtype
):
  (tmp_path / "t").mkdir()
  for name in "pqr":
    (tmp_path / "t" / name).write_text("ab")
  corpus = load_corpus(tmp_path / "t", tokenizer=_TwoLetters(vocab_size))
  assert corpus.train.dtype == corpus.validation.dtype == dtype
  tokens = np.concatenate([corpus.train, corpus.validation])
  assert tokens.tolist() == [0, 1] * 3
