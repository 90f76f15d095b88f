import ast
import importlib
import json
import os
import pathlib
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Imports go one way, from higher to lower. What is not named here is a library.
RANK = {"pallas_kernels": 1, "jaxheads": 2, "experiments": 3, "tests": 4}

PUBLIC = [
  "jaxheads",
  "jaxheads.attention",
  "jaxheads.checks",
  "jaxheads.data",
  "jaxheads.errors",
  "jaxheads.flops",
  "jaxheads.kvcache",
  "jaxheads.models",
  "jaxheads.moh",
  "jaxheads.nn",
  "jaxheads.rope",
  "jaxheads.s2",
  "jaxheads.serve",
  "jaxheads.serve.http",
  "jaxheads.sharding",
  "jaxheads.training",
  "pallas_kernels",
  "pallas_kernels.head_attention",
]


def source_files():
  for package in RANK:
    for path in sorted((ROOT / package).rglob("*.py")):
      yield package, path


def imported_modules(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level:
      # `from ._x import f` stays in its own folder; nothing else is relative.
      assert node.level == 1, f"line {node.lineno}: write the full module name"
    elif isinstance(node, ast.ImportFrom):
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_one_way():
  wrong = [
    f"{path.relative_to(ROOT)} imports {module}"
    for package, path in source_files()
    for module in imported_modules(ast.parse(path.read_text("utf-8")))
    if RANK.get(module.split(".")[0], 0) > RANK[package]
  ]
  assert wrong == []


# JAX has no public door to the service through which processes of a job talk,
# nor to how schedulers are asked; Orbax goes the same way.
PRIVATE = {
  "jaxheads/training/distributed.py": {
    "jax._src",
    "jax._src.clusters",
    "jax._src.distributed",
  }
}


def test_private_parts_of_jax_and_flax_are_left_alone():
  wrong = [
    f"{path.relative_to(ROOT)} imports {module}"
    for _, path in source_files()
    for module in imported_modules(ast.parse(path.read_text("utf-8")))
    if module.split(".")[0] in ("jax", "flax", "optax", "orbax", "grain")
    and any(part.startswith("_") for part in module.split("."))
    and not module.endswith("__")  # __version__ is public
    and module not in PRIVATE.get(path.relative_to(ROOT).as_posix(), ())
  ]
  assert wrong == []


def test_the_rules_see_what_they_forbid():
  tree = ast.parse("from jax._src import core\nimport experiments.train_moh")
  found = set(imported_modules(tree))
  assert {"jax._src", "jax._src.core", "experiments.train_moh"} <= found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_module_imports_and_has_a_docstring(name):
  module = importlib.import_module(name)
  assert module.__doc__


@pytest.mark.parametrize(
  "name", [name for name in PUBLIC if (ROOT / name.replace(".", "/")).is_dir()]
)
def test_package_exports_are_explicit(name):
  # `from ._x import f as f`: whatever is public was meant to be. A plain
  # `from x import f` in an __init__.py would export f by accident.
  path = ROOT / name.replace(".", "/") / "__init__.py"
  accidental = [
    alias.name
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if alias.asname != alias.name
  ]
  assert accidental == []


def test_importing_the_library_stays_light():
  # Someone who only wants a layer should not wait for plots and data loaders.
  #
  script = (
    "import json, sys, jaxheads, jaxheads.moh, jaxheads.nn\n"
    "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
  )
  result = subprocess.run(
    [sys.executable, "-c", script],
    capture_output=True,
    check=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    text=True,
  )
  loaded = set(json.loads(result.stdout))
  assert "jaxheads" in loaded
  heavy = {"matplotlib", "tensorboardX", "grain", "tyro", "datasets"}
  heavy |= {"starlette", "uvicorn", "pydantic"}
  assert loaded & heavy == set()


def test_lowest_constraints_are_the_declared_lower_bounds():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"]
  requirements = project["dependencies"] + extras["serve"] + extras["test"]
  requirements.remove("jaxheads[serve]")
  declared = {}
  for requirement in requirements:
    spec, _, marker = requirement.partition(";")
    if marker.strip() == "python_version >= '3.12'":
      continue
    name, bound = spec.split(",")[0].strip().split(">=")
    declared[name.lower()] = bound
  pinned = {}
  lowest = (ROOT / ".ci/constraints/lowest-py311.txt").read_text()
  for line in lowest.splitlines():
    if not line.startswith("#"):
      name, version = line.strip().split("==")
      pinned[name.lower()] = tuple(map(int, version.split(".")))
  assert pinned.pop("jaxlib") == pinned["jax"]
  assert pinned.keys() == declared.keys()
  for name, bound in declared.items():
    assert pinned[name][: bound.count(".") + 1] == tuple(
      map(int, bound.split("."))
    ), name
