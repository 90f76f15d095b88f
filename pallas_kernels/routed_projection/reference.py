"""Routed projections by the definition: all heads, then pick."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.packing import Packing, gather_rows, scatter_rows


def project_in(
  x: Float[Array, "B T D"], w: Float[Array, "D N H"], packing: Packing
) -> Float[Array, "rows H"]:
  """Projects for every head, then keeps the active pairs."""
  full = jnp.einsum(
    "btd,dnh->btnh", x.astype(jnp.float32), w.astype(jnp.float32)
  )
  return gather_rows(full, packing).astype(x.dtype)


def project_out(
  rows: Float[Array, "rows H"], w: Float[Array, "N H Dout"], packing: Packing
) -> Float[Array, "B T Dout"]:
  """Fills inactive pairs with 0, then projects every head."""
  full = scatter_rows(rows.astype(jnp.float32), packing)
  out = jnp.einsum("btnh,nhd->btd", full, w.astype(jnp.float32))
  return out.astype(rows.dtype)
