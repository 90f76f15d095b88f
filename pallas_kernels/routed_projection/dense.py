"""Routed projections through all heads: one large product, then a choice.

What accelerators do best. A row of the sparse product reads its token's D
numbers for 2 D H operations: fewer than their memory allows for heads of up to
some 256 entries, and several times the memory, as each token has as many rows
as active heads.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.packing import Packing, gather_rows, scatter_rows


def project_in(
  x: Float[Array, "B T D"], w: Float[Array, "D N H"], packing: Packing
) -> Float[Array, "rows H"]:
  """See `pallas_kernels.routed_projection.project_in`."""
  return gather_rows(jnp.einsum("btd,dnh->btnh", x, w), packing)


def project_out(
  rows: Float[Array, "rows H"], w: Float[Array, "N H Dout"], packing: Packing
) -> Float[Array, "B T Dout"]:
  """See `pallas_kernels.routed_projection.project_out`."""
  return jnp.einsum("btnh,nhd->btd", scatter_rows(rows, packing), w)
