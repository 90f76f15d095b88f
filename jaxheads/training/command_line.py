"""From `sys.argv` to a checked run: presets, config files, then flags."""

import argparse
import contextlib
import dataclasses
import io
import pathlib
import re
import sys
from collections.abc import Collection, Sequence
from typing import Annotated

import tyro

from jaxheads.errors import UserError
from jaxheads.training import configfile, presets, run_folder
from jaxheads.training.config import TrainConfig
from jaxheads.training.distributed import Processes
from jaxheads.training.run_folder import RunFolder

_NEWEST = "newest"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
  """What one call asks for: a config, and where it runs.

  Flags override the config file, which overrides the preset. A resumed run
  starts from its own config instead.
  """

  preset: str = "tiny"
  """Defaults to start from: tiny, smoke, tiny-s2, smoke-s2, llm-s, llm-b,
  moh-llama3-8b or moh-llama3-70b."""
  config: str | None = None
  """YAML or JSON file of defaults; its keys are the flags below."""
  out: str | None = None
  """Folder of the run. Default: runs/<script>-<date>-<time>."""
  resume: str | None = None
  """Continue a run exactly: the newest one, or the one in the folder named."""
  compile_cache: str | None = None
  """Folder in which compiled programs are kept for the next start."""
  mesh: str | None = None
  """How devices share the work, such as data=2,fsdp=4: axes data and fsdp
  (sequences; fsdp also splits the parameters), context (tokens), heads.
  Default: all devices on fsdp."""
  processes: Annotated[Processes, tyro.conf.arg(name="")] = dataclasses.field(
    default_factory=Processes
  )
  train: Annotated[TrainConfig, tyro.conf.arg(name="")] = dataclasses.field(
    default_factory=TrainConfig
  )


@dataclasses.dataclass(frozen=True)
class Request:
  """A checked command.

  Attributes:
    config: The run's config, all defaults resolved.
    run: Its folder; made already if `resume`.
    resume: Whether to continue what the folder holds.
    compile_cache: Folder for compiled programs, or None.
    mesh: As in `jaxheads.sharding.parse_mesh`.
    processes: Of the job, as far as the flags say.
  """

  config: TrainConfig
  run: RunFolder
  resume: bool
  compile_cache: str | None
  mesh: str | None = None
  processes: Processes = dataclasses.field(default_factory=Processes)


def parse(
  argv: Sequence[str] | None = None,
  *,
  prog: str = "train_moh.py",
  preset: str = "tiny",
  what: str = "a mixture-of-head language model",
) -> Request:
  """The request that the arguments make.

  Args:
    argv: Without the program's name; None takes `sys.argv`.
    prog: What the help calls the program; runs are named after it.
    preset: What `--preset` is by default.
    what: What the program trains, for the help.
  Raises:
    UserError: A flag, key or value that is not known or does not fit.
    SystemExit: After `--help`.
  """
  argv = _name_newest(list(sys.argv[1:] if argv is None else argv))
  first = _first_phase(argv)
  script = pathlib.Path(prog).stem
  run = None
  if first.resume is not None:
    if first.preset is not None or first.config is not None:
      raise UserError(
        "`--resume` continues a run under its own config: leave out "
        "`--preset` and `--config`"
      )
    run = _resumed(first.resume, first.out, script)
    defaults, _ = run.read_config()
  else:
    defaults = _defaults(first, preset)
  default = Command(preset=preset, train=defaults)
  command = _second_phase(argv, default, prog, what)
  if run is None:
    path = command.out or run_folder.default_path(script=script)
    run = RunFolder(pathlib.Path(path))
    if run.holds_run:
      raise UserError(
        f"`--out` {command.out!r} already holds a run; continue it with "
        f"`--resume {command.out}`, or choose another folder"
      )
  return Request(
    config=command.train,
    run=run,
    resume=first.resume is not None,
    compile_cache=command.compile_cache,
    mesh=command.mesh,
    processes=command.processes,
  )


def _name_newest(argv: list[str]) -> list[str]:
  """`--resume` without a folder means the newest run."""
  named = []
  for index, argument in enumerate(argv):
    named.append(argument)
    if argument == "--resume":
      following = argv[index + 1 : index + 2]
      if not following or following[0].startswith("-"):
        named.append(_NEWEST)
  return named


def _first_phase(argv: list[str]) -> argparse.Namespace:
  """Only what decides the defaults of all other flags."""
  parser = argparse.ArgumentParser(
    add_help=False, allow_abbrev=False, exit_on_error=False
  )
  for name in ("preset", "config", "resume", "out"):
    parser.add_argument(f"--{name}")
  try:
    return parser.parse_known_args(argv)[0]
  except argparse.ArgumentError as error:
    raise UserError(f"`{error.argument_name}` needs a value") from error


def _defaults(first: argparse.Namespace, preset: str) -> TrainConfig:
  values = {}
  if first.config is not None:
    values = configfile.read(first.config)
  # A file may name its own preset; the flag wins.
  in_file = values.pop("preset", None)
  config = presets.get(first.preset or in_file or preset)
  return configfile.override(config, values, where=f"`--config` {first.config}")


def _resumed(resume: str, out: str | None, script: str) -> RunFolder:
  if resume == _NEWEST:
    if out is None:
      return run_folder.newest(script=script)
    resume = out
  run = RunFolder(pathlib.Path(resume))
  if out is not None and pathlib.Path(out) != run.path:
    raise UserError(
      f"`--resume` {resume!r} continues in its own folder: leave out `--out`"
    )
  if not run.path.is_dir():
    raise UserError(f"`--resume`: there is no folder {resume!r}")
  return run


def _second_phase(
  argv: list[str], default: Command, prog: str, what: str
) -> Command:
  """All flags, over `default`; tyro's complaints become one line."""
  complaint = io.StringIO()
  try:
    with contextlib.redirect_stderr(complaint):
      return tyro.cli(
        Command,
        args=argv,
        default=default,
        prog=prog,
        description=(
          f"Trains {what} on whatever JAX sees. "
          "Flags override --config, which overrides --preset."
        ),
      )
  except SystemExit as exit_:
    if not exit_.code:
      raise
    raise UserError(_first_section(complaint.getvalue(), prog)) from None


def _first_section(box: str, prog: str) -> str:
  """The message in a drawn box of several sections, as one line."""
  lines = [line.strip("│┃|╭╮╰╯ ").strip() for line in box.splitlines()[1:]]
  sections: list[list[str]] = [[]]
  for line in lines:
    if line and not line.strip("─━-"):
      sections.append([])
    elif line:
      sections[-1].append(line)
  message = " ".join(sections[0]) or "the flags do not parse"
  if sections[1:] and sections[1] and "meant" in sections[1][0]:
    flags = re.findall(r"--[a-z0-9][\w.-]*", " ".join(sections[1]))
    if flags:
      message += f", did you mean `{flags[0]}`?"
  return f"{message.rstrip('.')} (see {prog} --help)"


def chosen_preset(
  argv: Sequence[str], presets: Collection[str], default: str
) -> str:
  """What `--preset` says: it decides what the other flags start from.

  Raises:
    UserError: There is no such preset.
  """
  preset = default
  for index, argument in enumerate(argv):
    if argument == "--preset":
      preset = argv[index + 1] if index + 1 < len(argv) else ""
    elif argument.startswith("--preset="):
      preset = argument.partition("=")[2]
  if preset not in presets:
    raise UserError(
      f"`--preset` must be one of {', '.join(presets)}, got {preset!r}"
    )
  return preset
