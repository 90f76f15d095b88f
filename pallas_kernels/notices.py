"""What was chosen, why, and how to choose otherwise: one line each, once.

At level INFO to the logger "jaxheads"; `logging.basicConfig(level="INFO")`
shows it. Lines come while a program is traced.
"""

import functools
import logging

_LOGGER = logging.getLogger("jaxheads")


def tell_once(text: str) -> None:
  """Logs the line, unless it was logged before."""
  # Not counted while nobody listens.
  if _LOGGER.isEnabledFor(logging.INFO):
    _tell(text)


@functools.lru_cache(maxsize=1024)
def _tell(text: str) -> None:
  _LOGGER.info("%s", text)
