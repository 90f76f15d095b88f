import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxheads.data import ByteTokenizer, load_tokenizer
from jaxheads.errors import UserError


@hypothesis.given(st.text())
def test_bytes_round_trip_any_text(text):
  tokenizer = ByteTokenizer()
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert tokenizer.num_bytes(ids) == len(text.encode("utf-8"))


def test_bytes_are_the_utf8_bytes_and_256_ends_a_document():
  tokenizer = load_tokenizer("bytes")
  assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
  assert tokenizer.encode("né").tolist() == [110, 195, 169]
  assert tokenizer.decode([104, 256, 105]) == "hi"
  assert tokenizer.num_bytes([104, 256, 105]) == 2
  assert tokenizer.num_bytes([]) == 0


def test_bytes_cut_inside_a_character_decode_to_a_replacement():
  assert ByteTokenizer().decode([97, 195]) == "a�"


def test_bytes_of_a_command_line_that_are_not_utf8_survive():
  argument = b"a\xff".decode("utf-8", errors="surrogateescape")
  assert ByteTokenizer().encode(argument).tolist() == [97, 255]


@pytest.mark.parametrize("bad", [257, -1])
def test_bytes_refuse_ids_outside_the_vocabulary(bad):
  with pytest.raises(ValueError, match=rf"`ids` must be in \[0, 257\).*{bad}"):
    ByteTokenizer().decode([0, bad])
  with pytest.raises(TypeError, match="`ids` must be integers"):
    ByteTokenizer().num_bytes([0.5])


def test_missing_tokenizer_file_is_one_line_with_both_choices(tmp_path):
  with pytest.raises(UserError, match='"bytes" or the path.*nothing.json'):
    load_tokenizer(str(tmp_path / "nothing.json"))


def test_missing_extra_says_what_to_install(tmp_path, monkeypatch):
  path = tmp_path / "tokenizer.json"
  path.write_text("{}")
  monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
  with pytest.raises(UserError, match=r"pip install 'jaxheads\[hf\]'"):
    load_tokenizer(str(path))
