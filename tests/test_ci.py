"""The lists of CI name what exists."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIST = ROOT / ".ci/newest_leaves_out.txt"


@pytest.mark.skipif(not LIST.exists(), reason="not a checkout")
def test_what_the_newest_python_leaves_out_exists():
  lines = re.findall(r"^tests/.*", LIST.read_text(), re.M)
  assert len(set(lines)) == len(lines) > 40
  for line in lines:
    path, _, test = line.partition("::")
    assert (ROOT / path).exists(), line
    if test:
      name = test.partition("[")[0]
      assert f"def {name}(" in (ROOT / path).read_text(), line
