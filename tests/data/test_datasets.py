import sys
import types

import pytest

from jaxheads.data import ByteTokenizer, load_corpus
from jaxheads.errors import UserError

TOKENIZER = ByteTokenizer()


class _Rows(list):
  """As much of a `datasets.Dataset` as is used."""

  @property
  def column_names(self):
    return list(self[0]) if self else []


@pytest.fixture
def load_dataset(monkeypatch):
  """Puts a fake `datasets` in place; returns what stores its answer."""
  calls = []

  def give(answer):
    def load_dataset(name, config=None):
      calls.append((name, config))
      if isinstance(answer, Exception):
        raise answer
      return answer

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return calls

  return give


def _texts(*texts, column="text"):
  return _Rows({"id": 1, column: text} for text in texts)


def _load(spec="hf:owner/name", **keywords):
  return load_corpus(spec, tokenizer=TOKENIZER, **keywords)


def test_named_splits_are_kept_and_blank_rows_left_out(load_dataset):
  calls = load_dataset(
    {
      "test": _texts("never"),
      "train": _texts("one", "", " \n", "two"),
      "validation": _texts("é"),
    }
  )
  corpus = _load("hf:owner/name:config-1")
  assert calls == [("owner/name", "config-1")]
  assert TOKENIZER.decode(corpus.train) == "onetwo"
  assert corpus.train_bytes == 6
  assert len(corpus.train) == 8
  assert TOKENIZER.decode(corpus.validation) == "é"
  assert corpus.validation_bytes == 2
  assert corpus.name == "hf:owner/name:config-1"


def test_one_split_is_divided_by_text_with_duplicates_on_one_side(
  load_dataset,
):
  rows = [f"row {i}." for i in range(100)] * 2
  calls = load_dataset({"train": _texts(*rows, column="content")})
  corpus = _load(validation_fraction=0.2)
  assert calls == [("owner/name", None)]
  train, held_out = (
    set(TOKENIZER.decode(split).split("."))
    for split in (corpus.train, corpus.validation)
  )
  assert not (train & held_out) - {""}
  assert len(train | held_out) == 101
  assert 5 < len(held_out) < 40
  assert corpus.num_documents == 200


@pytest.mark.parametrize(
  ("answer", "message"),
  [
    (FileNotFoundError("no such dataset\nmore"), "not be loaded: no such data"),
    (ConnectionError(), "could not be loaded: ConnectionError"),
    ({}, "has no splits"),
    ({"train": _Rows([{"label": 1}])}, "no column of text.*label"),
    ({"train": _texts("a"), "test": _texts(" ")}, "1 rows .* 0 to validate"),
  ],
)
def test_bad_datasets_are_one_line(load_dataset, answer, message):
  load_dataset(answer)
  with pytest.raises(
    UserError, match=f"`data` = 'hf:owner/name'.*{message}"
  ) as e:
    _load()
  assert "\n" not in str(e.value)


def test_missing_extra_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(UserError, match=r"pip install 'jaxheads\[hf\]'"):
    _load()


@pytest.mark.parametrize("spec", ["hf:", "hf::config"])
def test_no_name(spec):
  with pytest.raises(UserError, match="names no dataset"):
    _load(spec)
