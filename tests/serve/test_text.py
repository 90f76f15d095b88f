"""Tokens to text: never taken back, cut in the same place however it comes."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers

from jaxheads.data import ByteTokenizer, load_tokenizer
from jaxheads.serve.text import StopStrings, TextStream


def streamed(decode, tokens):
  stream = TextStream(decode)
  return [*(stream.push(token) for token in tokens), stream.flush()]


def test_stream_never_takes_text_back():
  rng = np.random.default_rng(0)
  tokenizer = ByteTokenizer()
  valid = tokenizer.encode("aé€😀\ufffd\n").tolist()
  broken = rng.integers(0, 257, 500).tolist()
  cut = tokenizer.encode("😀").tolist()[:3]
  for tokens in (
    *(valid, broken, [0xE2, 0x82, *valid], valid + cut, 40 * valid),
    *(50 * [0xFF], 50 * [0x80] + valid, 20 * [256, *valid]),
  ):
    pieces = streamed(tokenizer.decode, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens)


def test_stream_shows_characters_when_they_are_whole():
  stream = TextStream(ByteTokenizer().decode)
  pieces = [stream.push(token) for token in ByteTokenizer().encode("€x")]
  assert pieces == ["", "", "€", "x"]
  # Bytes that begin nothing are shown too, three late at most.
  pieces = [stream.push(0xFF) for _ in range(5)]
  assert "".join(pieces) == "\ufffd" * 2


def test_stream_costs_the_same_at_any_length():
  lengths = []

  def decode(ids):
    lengths.append(len(ids))
    return ByteTokenizer().decode(ids)

  tokens = ByteTokenizer().encode("né😀x" * 500).tolist()
  assert "".join(streamed(decode, tokens)) == "né😀x" * 500
  assert max(lengths) < 64


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
  """Words that begin with a space, and bytes for all else, as Llama has."""
  vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
  for word in ("▁the", "▁cat", "s", "▁"):
    vocabulary[word] = len(vocabulary)
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      vocab=vocabulary, merges=[], byte_fallback=True, fuse_unk=False
    )
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace("▁", " "),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
      tokenizers.decoders.Strip(" ", 1, 0),
    ]
  )
  path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
  tokenizer.save(str(path))
  return load_tokenizer(str(path))


def test_stream_with_a_decoder_that_looks_at_neighbours(sentencepiece):
  the, cat, s = 256, 257, 258
  tokens = [the, cat, s, *"€😀".encode(), the, 0x41, *"é".encode(), cat] * 20
  pieces = streamed(sentencepiece.decode, tokens)
  assert "".join(pieces) == sentencepiece.decode(tokens)
  assert pieces[:5] == ["the", " cat", "s", "", ""]
  assert pieces[5] == "€"


def cut(text, stops):
  """Character by character: the first stop string that is complete."""
  for end in range(len(text) + 1):
    starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
    if starts:
      return text[: min(starts)], True
  return text, False


@hypothesis.given(
  text=st.text("ab", max_size=30),
  stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
  cuts=st.lists(st.integers(0, 30), max_size=6),
)
@hypothesis.settings(max_examples=300)
def test_stop_strings_do_not_depend_on_token_borders(text, stops, cuts):
  borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
  stream = StopStrings(stops)
  shown = ""
  expected, found = cut(text, stops)
  for start, end in itertools.pairwise(borders):
    shown += stream.push(text[start:end])
    assert expected.startswith(shown)
    # Nothing is held back that cannot become a stop string.
    late = text[len(shown) : end]
    assert (
      stream.found
      or any(stop.startswith(late) for stop in stops)
      or (late == "")
    )
  assert stream.found == found
  assert shown + stream.flush() == expected
