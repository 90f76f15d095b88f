"""Public door of the routed projections."""

from jaxtyping import Array, Float

from pallas_kernels import _dispatch, platform
from pallas_kernels.packing import Packing
from pallas_kernels.routed_projection import dense, reference, xla
from pallas_kernels.shapes import check_shape

_PROJECT_IN = {
  "reference": reference.project_in,
  "xla": xla.project_in,
  "dense": dense.project_in,
}
_PROJECT_OUT = {
  "reference": reference.project_out,
  "xla": xla.project_out,
  "dense": dense.project_out,
}


def _best() -> str:
  return "xla" if platform.current() == "cpu" else "dense"


def project_in(
  x: Float[Array, "B T D"],
  w: Float[Array, "D N H"],
  packing: Packing,
  *,
  implementation: str | None = None,
) -> Float[Array, "rows H"]:
  """Row (token, head) = x[token] @ w[:, head]; unused rows are 0.

  Args:
    x: Layer input.
    w: Projection of every head.
    packing: Which row is which (token, head).
    implementation: "reference", "xla" (active pairs only), "dense" (all heads,
      then the active pairs) or `None` for the best: "xla" on CPUs, "dense" on
      accelerators.

  Returns:
    Rows in x's dtype, summed in float32.

  Raises:
    ValueError: Shapes disagree, or no such implementation.
  """
  batch, length, heads = packing.row_of.shape
  sizes = {"B": batch, "T": length, "N": heads}
  check_shape("x", x, "B T D", sizes)
  check_shape("w", w, "D N H", sizes)
  run = _dispatch.select(_PROJECT_IN, implementation, default=_best())
  return run(x, w, packing)


def project_out(
  rows: Float[Array, "rows H"],
  w: Float[Array, "N H Dout"],
  packing: Packing,
  *,
  implementation: str | None = None,
) -> Float[Array, "B T Dout"]:
  """Each token's sum, over its active heads, of row @ w[head].

  Args:
    rows: One row for each active (token, head); unused rows do not count.
    w: Projection of every head.
    packing: Which row is which (token, head).
    implementation: "reference", "xla" (active pairs only), "dense" (all heads,
      then the active pairs) or `None` for the best: "xla" on CPUs, "dense" on
      accelerators.

  Returns:
    Sums in rows' dtype, accumulated in float32 in the order of heads: the
    result repeats bit for bit.

  Raises:
    ValueError: Shapes disagree, or no such implementation.
  """
  sizes = {"rows": packing.num_rows, "N": packing.num_heads}
  check_shape("rows", rows, "rows H", sizes)
  check_shape("w", w, "N H Dout", sizes)
  run = _dispatch.select(_PROJECT_OUT, implementation, default=_best())
  return run(rows, w, packing)
