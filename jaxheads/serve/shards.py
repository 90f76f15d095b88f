"""What the devices that share the heads of an engine do, each by itself.

Each device holds the pages and rows of its own KV heads, and knows no others.
What touches pages runs on every device by itself; the rest of the model is
written for whole arrays.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxheads.errors import UserError
from jaxheads.sharding import axis_size, check_heads, spec

PAGES = spec("pages")
# Of rows, [K, ...], [B, K, ...] and [R, B, K, ...].
ROWS = spec("kv_heads")
ROWS_OF_SLOTS = spec(None, "kv_heads")
EVERY_ROW = spec(None, None, "kv_heads")
# Of tokens, [T, K, H], and of query heads, [B, T, N, ...].
TOKENS = spec(None, "kv_heads")
QUERIES = spec(None, None, "heads")
EVERYWHERE = spec()


def check_mesh(mesh: Mesh, num_heads: int, num_kv_heads: int) -> int:
  """How many devices share the heads of an engine.

  Raises:
    ValueError: Other axes than `heads` have several devices, or the heads
      cannot be shared evenly.
  """
  for axis, size in mesh.shape.items():
    if axis != "heads" and size > 1:
      raise ValueError(
        f"`mesh` must have one device along {axis!r}, got {size}: an engine "
        "shares its heads only. `jaxheads.serve.replicas` serves with several."
      )
  heads = mesh.shape.get("heads", 1)
  try:
    check_heads(num_heads, num_kv_heads, heads)
  except UserError as error:
    raise ValueError(str(error)) from error
  return heads


def over_heads(
  run: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
  """`run` on every device, of what is there, if a mesh with heads is set."""
  if axis_size("heads") == 1:
    return run
  return jax.shard_map(
    run, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def first_head(local: int) -> Any:
  """Inside of `over_heads`: the first of this device's `local` KV heads."""
  if axis_size("heads") == 1:
    return 0
  return jax.lax.axis_index("heads") * local
