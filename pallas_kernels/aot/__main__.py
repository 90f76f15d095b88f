r"""Asks whether attention compiles for a chip that is not here.

  python -m pallas_kernels.aot --chip v5e --seq-len 131072 --heads 32 \
    --kv-heads 8 --head-dim 128 --block 64 --local 8 --stride 16 --backward
  python -m pallas_kernels.aot --chip v6e --operation paged_attention \
    --batch 8 --seq-len 8192 --kv-heads 8 --page-dtype int8

Prints what it needs; exits with 1, and says why, if it does not compile, with 3
if the compiler is not installed: `pip install 'jaxheads[aot]'`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax

from pallas_kernels.aot.compile import DoesNotCompile, compile_for
from pallas_kernels.aot.programs import PROGRAMS
from pallas_kernels.aot.targets import CHIP_NAMES, CompilerMissing, find


class _Parser(argparse.ArgumentParser):
  """One that complains in one line."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def _at_least(least: int) -> Callable[[str], int]:
  """A type of flags."""

  def parse(text: str) -> int:
    try:
      number = int(text)
    except ValueError:
      raise argparse.ArgumentTypeError(
        f"must be a whole number, got {text!r}"
      ) from None
    if number < least:
      raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
    return number

  return parse


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog="python -m pallas_kernels.aot",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add, positive = parser.add_argument, _at_least(1)
  add("--chip", required=True, choices=CHIP_NAMES, help="to compile for")
  add(
    "--operation",
    choices=tuple(PROGRAMS),
    default="head_attention",
    help="routed attention has half of the heads active (%(default)s)",
  )
  add("--batch", type=positive, default=1, help="sequences (%(default)s)")
  add("--seq-len", type=positive, default=8192, help="tokens (%(default)s)")
  add("--heads", type=positive, default=32, help="query heads (%(default)s)")
  add("--kv-heads", type=positive, help="KV heads (as many as query heads)")
  add("--head-dim", type=positive, default=128, help="(%(default)s)")
  add(
    "--dtype",
    choices=("bfloat16", "float16", "float32"),
    default="bfloat16",
    help="(%(default)s)",
  )
  add("--block", type=positive, default=64, help="tokens (%(default)s)")
  add(
    "--local", type=positive, default=8, help="blocks of window (%(default)s)"
  )
  add(
    "--stride",
    type=_at_least(0),
    default=16,
    help="vertical stride in blocks; 1 is dense, 0 only the window "
    "(%(default)s)",
  )
  add("--backward", action="store_true", help="compile the gradients too")
  add("--implementation", help="one by name (the best that fits)")
  add("--block-q", type=positive, help="queries of a tile (a tuned size)")
  add("--block-kv", type=positive, help="keys of a tile (a tuned size)")
  add(
    "--page-size",
    type=positive,
    default=128,
    help="tokens of a page, of paged attention (%(default)s)",
  )
  add(
    "--page-dtype",
    choices=("int8", "float8_e4m3fn", "float8_e5m2"),
    help="of quantised pages (not quantised)",
  )
  return parser


def main(arguments: list[str] | None = None) -> int:
  """The command line; returns the exit status."""
  parser = _parser()
  flags = parser.parse_args(arguments)
  if (flags.block_q is None) != (flags.block_kv is None):
    parser.error("--block-q and --block-kv go together")
  if flags.operation != "head_attention" and flags.block_q is not None:
    parser.error("--block-q and --block-kv are head attention's")
  if flags.operation == "paged_attention" and flags.backward:
    parser.error("--backward: paged attention has no gradients")
  if flags.operation != "paged_attention" and flags.page_dtype is not None:
    parser.error("--page-dtype is paged attention's")
  # Nothing runs here: a TPU or GPU that is there stays free for others.
  jax.config.update("jax_platforms", "cpu")
  # Only programs may silence the compiler's log; libraries must not.
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  try:
    report = _compile(flags)
  except (TypeError, ValueError) as error:
    parser.error(str(error))
  except CompilerMissing as error:
    parser.exit(3, f"{parser.prog}: error: {error}\n")
  except (DoesNotCompile, NotImplementedError) as error:
    print(f"{flags.chip}: does not compile: {' '.join(str(error).split())}")
    return 1
  for name, value in report:
    print(f"{name:15} {value}")
  return 0


def _compile(flags: argparse.Namespace) -> list[tuple[str, str]]:
  """What there is to say about the shape, line by line."""
  program = PROGRAMS[flags.operation](flags)
  report = compile_for(flags.chip, program.function, *program.arguments)
  # The best one that is not plain XLA, if any kernel is.
  kernel = "mosaic_tpu" if find(flags.chip).platform == "tpu" else "triton"
  name = flags.implementation or (kernel if report.kernels else "xla")
  return [
    ("chip", report.chip),
    ("compiles", "yes, forward and backward" if flags.backward else "yes"),
    ("implementation", name),
    ("tiles", program.tiles),
    ("kernels", ", ".join(report.kernels) or "none: plain XLA"),
    ("arguments", size_text(report.argument_bytes)),
    ("results", size_text(report.output_bytes)),
    ("temporary", size_text(report.temp_bytes)),
    ("compile time", f"{report.seconds:.1f} s"),
  ]


def size_text(count: int) -> str:
  """A number of bytes, for people."""
  size = float(count)
  for unit in ("bytes", "KiB", "MiB"):
    if size < 1024:
      return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
    size /= 1024
  return f"{size:.2f} GiB"


if __name__ == "__main__":
  sys.exit(main())
