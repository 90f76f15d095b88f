"""Mistakes of the person at the keyboard, told in one line."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
  """A mistake the user can mend; the message names the argument and the fix.

  Libraries raise it, scripts print it: see `one_line_errors`.
  """


def one_line_errors(main: Callable[[], None]) -> Callable[[], None]:
  """Makes a script's `main` print user mistakes as one line, without traceback.

  `UserError` exits with status 2, Ctrl-C with 130 (the shell's convention).
  Anything else is our own defect and keeps its traceback.
  """

  @functools.wraps(main)
  def wrapped() -> None:
    try:
      main()
    except UserError as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(2)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(130)

  return wrapped
