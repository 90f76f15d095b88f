"""What programs that tests start are given."""

import os
import re


def one_device():
  """Variables: the tests' way of compiling, without their eight devices."""
  flags = re.sub(r"\S*device_count=\d+", "", os.environ["XLA_FLAGS"])
  return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
