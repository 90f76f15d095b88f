import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads.data import HuggingFaceTokenizer, load_tokenizer
from jaxheads.errors import UserError

# Of the `hf` extra; the `test` extra brings it too.
tokenizers = pytest.importorskip(
  "tokenizers", reason="the tokenizers package is not installed"
)


def _byte_level_file(path):
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    ["the cat and the hat", "def f(x): return x"] * 4,
    tokenizers.trainers.BpeTrainer(
      vocab_size=300,
      special_tokens=["<|endoftext|>"],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  tokenizer.enable_truncation(2)  # A trap that many published files hold.
  tokenizer.save(str(path))


@hypothesis.given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_byte_level_file_round_trips_and_counts_bytes(
  byte_level_tokenizer, text
):
  ids = byte_level_tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert byte_level_tokenizer.decode(ids) == text
  assert byte_level_tokenizer.num_bytes(ids) == len(text.encode("utf-8"))


@pytest.fixture(scope="module")
def byte_level_tokenizer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  _byte_level_file(folder / "tokenizer.json")
  return load_tokenizer(str(folder))  # The folder will do.


def test_byte_level_file_knows_its_end_of_document(byte_level_tokenizer):
  eot = byte_level_tokenizer.eot
  assert eot == 0
  assert byte_level_tokenizer.num_bytes([eot]) == 0
  assert byte_level_tokenizer.decode([eot]) == ""
  [ids] = byte_level_tokenizer.encode_documents([b"the cat and the hat"])
  assert eot not in ids
  assert (
    ids.tolist() == byte_level_tokenizer.encode("the cat and the hat").tolist()
  )


def test_sentencepiece_like_file_counts_bytes_and_has_holes(tmp_path):
  path = tmp_path / "tokenizer.json"
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {"<0xC3>": 0, "<0xA9>": 1, "▁a": 2, "é": 9}, [], byte_fallback=True
    )
  )
  tokenizer.save(str(path))
  loaded = HuggingFaceTokenizer(path)
  assert loaded.vocab_size == 10  # Ids 3 to 8 do not exist.
  assert loaded.eot is None
  assert [loaded.num_bytes([i]) for i in (0, 1, 2, 9)] == [1, 1, 2, 2]


def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path):
  path = tmp_path / "tokenizer.json"
  path.write_text("{}")
  with pytest.raises(UserError, match="neither") as raised:
    load_tokenizer(str(path))
  assert "\n" not in str(raised.value)
