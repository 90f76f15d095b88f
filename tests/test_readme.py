import contextlib
import io
import pathlib
import re
import shlex
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [
  "README.md",
  "CONTRIBUTING.md",
  "CHANGELOG.md",
  "experiments/README.md",
]


def code_blocks(language):
  return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def test_the_library_examples_print_what_they_say():
  names = {}  # A reader types one after the other.
  for example, expected in zip(
    code_blocks("python"), code_blocks("text"), strict=True
  ):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
      exec(compile(example, "README.md", "exec"), names)
    assert printed.getvalue() == expected


def test_two_commands_near_the_top_each_one_line():
  commands = code_blocks("sh")
  assert len(commands) == 2
  assert all(command.count("\n") == 1 for command in commands)
  assert README.index(commands[1]) < 1000
  # Installing outside a virtual environment is refused by many systems.
  for command in commands:
    venv, install, run = command.split(" && ")
    assert shlex.split(venv) == ["python3", "-m", "venv", ".venv"]
    assert shlex.split(install)[0] == ".venv/bin/pip"
    assert shlex.split(run)[0] == ".venv/bin/python"


def test_the_commands_run_files_and_extras_that_exist():
  train, test = (shlex.split(command) for command in code_blocks("sh"))
  assert (ROOT / train[-1]).is_file()
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
  ]
  assert ".[test]" in test
  for extra in re.findall(r"'\.\[(\w+)\]'", README):
    assert extra in extras


def test_ci_takes_the_test_command_from_the_readme():
  # The pattern .ci/run greps for must find exactly the line above.
  (pattern,) = re.findall(
    r"grep -E '(\^python3[^']*)' README\.md", (ROOT / ".ci/run").read_text()
  )
  found = re.findall(pattern + ".*$", README, re.M)
  assert [line + "\n" for line in found] == code_blocks("sh")[1:]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_and_named_files_exist(document):
  path = ROOT / document
  text = path.read_text("utf-8")
  links = re.findall(r"\]\(([^)\s]+)\)", text)
  missing = [
    link
    for link in links
    if not link.startswith(("http://", "https://", "#"))
    and not (path.parent / link.split("#")[0]).exists()
  ]
  named = re.findall(
    r"(?:jaxheads|pallas_kernels|experiments|tests)/[\w/]+\.\w+", text
  )
  missing += [name for name in named if not (ROOT / name).exists()]
  assert missing == []


def test_scripts_and_notebooks_are_listed():
  listed = (ROOT / "experiments/README.md").read_text("utf-8")
  scripts = [
    str(path.relative_to(ROOT / "experiments"))
    for pattern in ("*.py", "notebooks/*.ipynb")
    for path in (ROOT / "experiments").glob(pattern)
    if not path.name.startswith("_")
  ]
  assert scripts
  assert [name for name in scripts if f"`{name}`" not in listed] == []


def test_one_version():
  version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "version"
  ]
  headings = re.findall(
    r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M
  )
  assert headings[:2] == ["Unreleased", version]


def test_nothing_is_left_to_fill_in():
  assert "TODO" not in README
