"""One line for what JAX prints on many when a process of a job is lost.

JAX's coordination service notices a lost process and aborts all others from
C++, where no Python can catch it, with a stack trace. `filter_stderr` puts a
process of its own before standard error: it runs this file, which therefore
imports nothing but the standard library, and outlives the one it listens to.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from typing import TextIO

# Written by a process that tells its end itself.
_LEAVING = "jaxheads: this process tells its end itself\n"
_ENTRY = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ ([\w.]+):\d+\] ")
_ABOUT_PROCESSES = (
  "client.h",
  "coordination_service.cc",
  "coordination_service_agent.cc",
  "coordination_service_rpc_handler.cc",
  "preemption_sync_manager.cc",
)
_FATAL = "JAX distributed service detected fatal errors"
_NEXT = "what is saved is intact: continue with `--resume`"


def filter_stderr(
  *, process_id: int, coordinator: str, patience_s: int
) -> None:
  """From here on, native code's words about processes are held back.

  All else that native code writes goes through at once. Python's own standard
  error stays as it was.

  Args:
    process_id: This process's.
    coordinator: Address of process 0.
    patience_s: How long processes wait for each other at the start.
  """
  screen = os.dup(2)
  reader, writer = os.pipe()
  subprocess.Popen(
    [
      *(sys.executable, "-I", "-S", __file__),
      *(str(process_id), coordinator, str(patience_s)),
    ],
    stdin=reader,
    stdout=subprocess.DEVNULL,
    stderr=screen,
    start_new_session=True,  # Ctrl-C must not end it before its source.
  )
  os.dup2(writer, 2)
  os.close(reader)
  os.close(writer)
  sys.stderr = os.fdopen(screen, "w", buffering=1, errors="backslashreplace")


def leave_quietly() -> None:
  """Nothing about processes is printed any more: the caller tells its end."""
  os.write(2, _LEAVING.encode())


def explain(
  text: str, *, process_id: int, coordinator: str, patience_s: int
) -> str:
  """What a person reads instead of JAX's last words."""
  missing = re.search(r"timed out task names:\s*\n((?:.*\d+\s*\n)+)", text)
  gone = re.search(r"stopped sending heartbeats\):\s*\n((?:.*\d+\s*\n)+)", text)
  if "newer incarnation" in text or "ALREADY_EXISTS" in text:
    return (
      f"process {process_id} was started twice: every process needs its own "
      "`--process-id`"
    )
  if missing:
    return (
      f"{_name(missing[1])} did not start within {patience_s} s; start as "
      "many processes as `--num-processes` says, each with its own "
      "`--process-id`"
    )
  if "RegisterTask" in text:
    return (
      f"process 0 did not answer at {coordinator} within {patience_s} s; "
      "start it, or correct `--coordinator`"
    )
  if gone:
    return f"{_name(gone[1])} ended without a word; {_NEXT}"
  if "Failed to send RPC to coordination service" in text:
    return f"process 0 ended without a word; {_NEXT}"
  status = " ".join(text.partition("absl::Status:")[2].split()) or text
  return f"the processes lost each other ({status[:200]}); {_NEXT}"


def _name(listed: str) -> str:
  """Such as "processes 1 and 3"."""
  ids = sorted({int(line.split(":")[-1]) for line in listed.split()})
  *first, last = map(str, ids)
  return (
    f"processes {', '.join(first)} and {last}" if first else (f"process {last}")
  )


def _pass_on(lines: Iterable[str], screen: TextIO) -> str | None:
  """Writes all that is not about processes; returns JAX's last words."""
  held = False
  last_words: list[str] = []
  for line in lines:
    if line == _LEAVING:
      return None
    entry = _ENTRY.match(line)
    if entry:
      held = entry[1] in _ABOUT_PROCESSES
      if _FATAL in line:
        last_words.append("")
    if not held:
      screen.write(line)
      screen.flush()
    elif last_words:
      last_words[-1] += line
  return last_words[0] if last_words else None


def _main() -> None:
  process_id, coordinator, patience_s = sys.argv[1:]
  lines = os.fdopen(0, encoding="utf-8", errors="backslashreplace")
  last_words = _pass_on(lines, sys.stderr)
  if last_words is not None:
    told = explain(
      last_words,
      process_id=int(process_id),
      coordinator=coordinator,
      patience_s=int(patience_s),
    )
    sys.stderr.write(f"error: {told}\n")
  for _ in lines:  # Nobody may be stopped by a full pipe.
    pass


if __name__ == "__main__":
  _main()
