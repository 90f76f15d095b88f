"""YAML and JSON config files, checked key by key against the dataclasses."""

import dataclasses
import difflib
import json
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import yaml

from jaxheads.errors import UserError

_T = TypeVar("_T")


def nearest(name: str, valid: Iterable[str]) -> str:
  """The words ", did you mean `x`?", or none where no valid name is close."""
  close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
  return f", did you mean `{close[0]}`?" if close else ""


def read(path: str | pathlib.Path) -> dict[str, Any]:
  """The mapping in a .yaml, .yml or .json file."""
  path = pathlib.Path(path)
  if path.suffix not in (".yaml", ".yml", ".json"):
    raise UserError(
      f"`--config` must be a .yaml or .json file, got {str(path)!r}"
    )
  try:
    text = path.read_text(encoding="utf-8")
  except OSError as error:
    raise UserError(
      f"`--config` {str(path)!r} cannot be read: {error.strerror}"
    ) from error
  except UnicodeDecodeError as error:
    raise UserError(f"`--config` {str(path)!r} is not text") from error
  try:
    values = (
      json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    )
  except (json.JSONDecodeError, yaml.YAMLError) as error:
    reason = " ".join(str(error).split())
    raise UserError(
      f"`--config` {str(path)!r} does not parse: {reason}"
    ) from error
  if values is None:
    return {}
  if not isinstance(values, dict):
    raise UserError(
      f"`--config` {str(path)!r} must hold a mapping of names to values, got "
      f"a {type(values).__name__}"
    )
  return values


def override(
  config: _T, values: Mapping[str, Any], *, where: str = "config"
) -> _T:
  """`config` with the values of a (nested) mapping put in.

  Args:
    config: A dataclass instance, possibly of further dataclasses.
    values: Names to values; `-` and `_` mean the same in names.
    where: What to call the source in messages.
  Raises:
    UserError: A name that the dataclass lacks, with the nearest one it has, or
      a value of another type.
  """
  return _override(config, values, where, "")


def _override(
  config: Any, values: Mapping[str, Any], where: str, prefix: str
) -> Any:
  hints = typing.get_type_hints(type(config))
  changes = {}
  for name, value in values.items():
    field = str(name).replace("-", "_")
    if field not in hints:
      raise UserError(
        f"{where}: unknown key `{prefix}{name}`{nearest(field, hints)}"
      )
    current = getattr(config, field)
    if dataclasses.is_dataclass(current):
      if not isinstance(value, Mapping):
        raise UserError(
          f"{where}: `{prefix}{name}` must be a mapping, got {value!r}"
        )
      changes[field] = _override(current, value, where, f"{prefix}{name}.")
    else:
      try:
        changes[field] = _coerce(value, hints[field])
      except (TypeError, ValueError):
        raise UserError(
          f"{where}: `{prefix}{name}` must be {_describe(hints[field])}, "
          f"got {value!r}"
        ) from None
  return dataclasses.replace(config, **changes)


def _coerce(value: Any, hint: Any) -> Any:
  """`value` as `hint`, without guessing: 3 is a float, "3" is not an int."""
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    options = typing.get_args(hint)
    if value is None and type(None) in options:
      return None
    (hint,) = (option for option in options if option is not type(None))
    return _coerce(value, hint)
  if origin is typing.Literal:
    if value not in typing.get_args(hint):
      raise ValueError
    return value
  if origin is tuple:
    element = typing.get_args(hint)[0]
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(_coerce(item, element) for item in values)
  if hint is float:
    # YAML 1.1 reads 1e-3 as text, for want of a dot.
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
      raise TypeError
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise TypeError
  return value


def _describe(hint: Any) -> str:
  origin = typing.get_origin(hint)
  if origin in (typing.Union, types.UnionType):
    return " or ".join(
      "null" if option is type(None) else _describe(option)
      for option in typing.get_args(hint)
    )
  if origin is typing.Literal:
    return " or ".join(repr(option) for option in typing.get_args(hint))
  if origin is tuple:
    return f"one or a list of {_describe(typing.get_args(hint)[0])}"
  return {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
  }.get(hint, str(hint))
