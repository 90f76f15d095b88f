"""Continues a prompt with a model that `train_moh.py` has trained.

python experiments/sample.py                          the newest run in runs/
python experiments/sample.py --prompt "class Queue:"
python experiments/sample.py --run runs/NAME --temperature 0
python experiments/sample.py --help                   every flag
"""

import dataclasses
import io
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, Literal

from jaxheads.errors import UserError, one_line_errors
from jaxheads.serve.text import TextStream

# Control characters that a model may write and that would steer the terminal,
# as their visible pictures: all but tab and newline, and those beyond ASCII.
_PICTURES = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_PICTURES |= {127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What to sample, and from which model."""

  run: pathlib.Path | None = None
  """Folder of a run. Default: the newest one in `--runs` with a checkpoint."""
  runs: pathlib.Path = pathlib.Path("runs")
  """Where to look for the newest run."""
  step: int | Literal["best"] | None = None
  """Saved step, or "best" for the lowest validation loss. Default: newest."""
  prompt: str = "def "
  """Text to continue; "" starts a new document."""
  max_new_tokens: int | None = None
  """Tokens to add. Default: what the model's context leaves, at most 512."""
  temperature: float = 0.8
  """Divides the logits: below 1 safer, above it wilder; 0 the likeliest."""
  top_p: float = 0.95
  """Samples from the likeliest tokens that together have this probability."""
  seed: int = 0
  """Same seed, same text."""


def find_run(options: Options) -> pathlib.Path:
  """The folder to load; `UserError` if there is none."""
  from jaxheads.training import newest_run

  run = options.run or newest_run(options.runs)
  if run is None:
    raise UserError(
      f"`--runs` {str(options.runs)!r} holds no run with a checkpoint; train "
      "one with `python experiments/train_moh.py`, or name one with `--run`"
    )
  return run


def continuation(options: Options, model: Any, tokenizer: Any) -> Iterator[int]:
  """Tokens that follow the prompt; `UserError` if a flag is out of range."""
  import jax
  import numpy as np

  from jaxheads.models import generate

  prompt = tokenizer.encode(options.prompt)
  if not len(prompt):
    if tokenizer.eot is None:
      raise UserError("`--prompt` must not be empty with this tokenizer")
    prompt = np.asarray([tokenizer.eot], np.int32)
  limit = model.config.max_seq_len
  if len(prompt) >= limit:
    raise UserError(
      f"`--prompt` has {len(prompt)} tokens and the model's context is "
      f"{limit}; shorten the prompt"
    )
  max_new_tokens = options.max_new_tokens
  if max_new_tokens is None:
    max_new_tokens = min(512, limit - len(prompt))
  try:
    stream = generate(
      model,
      prompt[None],
      max_new_tokens=max_new_tokens,
      temperature=options.temperature,
      top_p=options.top_p,
      key=jax.random.key(options.seed),
      stop_token=tokenizer.eot,
    )
  except ValueError as error:
    raise UserError(str(error)) from error
  return (int(token[0]) for token in stream)


def show(text: str) -> None:
  """Writes to the terminal at once, without letting the text steer it."""
  if sys.stdout.isatty():
    text = text.translate(_PICTURES)
  sys.stdout.write(text)
  sys.stdout.flush()


def sample(options: Options) -> None:
  """Loads the model and streams the prompt and its continuation."""
  from jaxheads.training.checkpoint import restore_model

  def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

  run = find_run(options)
  model, config, tokenizer, step = restore_model(
    run, step=options.step, say=note
  )
  note(
    f"{run}, step {step}: {config.num_params:,} parameters, "
    f"{config.active_heads} of {config.total_heads} heads active"
  )
  tokens = continuation(options, model, tokenizer)
  stream = TextStream(tokenizer.decode)
  try:
    show(options.prompt)
    for token in tokens:
      if token != tokenizer.eot:
        show(stream.push(token))
    show(stream.flush())
  finally:
    # Also after Ctrl-C: the shell's next line starts on a line of its own.
    show("\n")


@one_line_errors
def main() -> None:
  import tyro

  options = tyro.cli(
    Options,
    prog="sample.py",
    description="Continues a prompt with a trained mixture-of-head model.",
  )
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A terminal that is not UTF-8 gets "?" for what it cannot show.
    sys.stdout.reconfigure(errors="replace")
  try:
    sample(options)
  except BrokenPipeError:
    # The reader has left (`| head`): nothing more to say, and Python's own
    # flush at exit must not fail either.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
  main()
