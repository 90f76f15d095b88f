"""Rows of uneven length in a pool, and attention over them in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import platform
from pallas_kernels.paged_attention import (
  PageTable,
  mosaic_tpu,
  paged_attention,
  triton,
  xla,
)

FORWARD = 1e-5
IMPLEMENTATIONS = ("reference", "xla", "mosaic_tpu", "triton")


def small_turns(monkeypatch):
  """Several turns and steps at lengths that take no time."""
  monkeypatch.setattr(xla, "_TOKENS", 48)
  monkeypatch.setattr(xla, "_STEP", 16)
  monkeypatch.setattr(mosaic_tpu, "_TOKENS", 16)
  monkeypatch.setattr(mosaic_tpu, "_LEAST_TOKENS", 8)
  monkeypatch.setattr(triton, "_TOKENS", 16)


def draw(seed, lengths, *, Q=3, H=8, page=8, slack=2, dtype=jnp.float32):
  """A pool with pages of every row scattered in it, and NaN in the rest."""
  rng = np.random.default_rng(seed)
  counts = [-(-length // page) for length in lengths]
  total = sum(counts)
  order = rng.permutation(total + slack)
  pool = np.full((2, total + slack, page, H), np.nan)
  rows, pages, at = [], [], 0
  for length, count in zip(lengths, counts, strict=True):
    mine = order[at : at + count]
    keys = rng.normal(size=(2, count * page, H))
    keys[:, length:] = np.nan
    pool[:, mine] = keys.reshape(2, count, page, H)
    rows.append(keys[:, :length])
    pages.extend(mine)
    at += count
  starts = np.cumsum([0, *counts[:-1]])
  # Entries that no row uses lead nowhere.
  table = PageTable(
    jnp.asarray([*pages, 10**6], jnp.int32),
    jnp.asarray(starts, jnp.int32),
    jnp.asarray(lengths, jnp.int32),
  )
  q = rng.normal(size=(len(lengths), Q, H))
  arrays = (jnp.asarray(x, dtype) for x in (q, *pool))
  return tuple(arrays), table, rows


def expected(q, rows, seen=None, scale=None):
  """By the definition, row by row, in float64."""
  q = np.asarray(q, np.float64)
  out = np.zeros(q.shape)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  for r, (k, v) in enumerate(rows):
    for i in range(q.shape[1]):
      n = len(k) if seen is None else min(len(k), int(seen[r, i]))
      if n < 1:
        continue
      logits = scale * k[:n] @ q[r, i]
      weights = np.exp(logits - logits.max())
      out[r, i] = weights @ v[:n] / weights.sum()
  return out


def run(implementation, arrays, table, interpret=True, **options):
  with platform.interpreting(interpret):
    return jax.jit(
      lambda arrays, table, seen: paged_attention(
        *arrays,
        table,
        **options | {"seen": seen},
        implementation=implementation,
      )
    )(arrays, table, options.get("seen"))
