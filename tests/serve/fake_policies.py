"""Policies of which the scheduler sees all, and the device nothing."""

import dataclasses

import numpy as np

from jaxheads.kvcache import Plan


@dataclasses.dataclass(frozen=True)
class Uneven:
  """Random lengths and rings, in [0, N], by the prompt's length."""

  seed: int
  window: int
  rings: bool = True
  knows_lengths = places_early = True
  knows_heads = False

  def plan(self, length, budget, shape):
    rng = np.random.default_rng([self.seed, length, int(1e6 * budget)])
    most = max(1, int(np.ceil(budget * length)))
    lengths = rng.integers(0, most + 1, shape)
    lengths = -np.sort(-lengths, axis=1)
    lengths[rng.random(shape[0]) < 0.3, 0] = length
    rings = rng.integers(0, lengths + 1) if self.rings else 0 * lengths
    rings[rng.random(shape) < 0.5] = 0
    return Plan(lengths.astype(np.int32), rings.astype(np.int32), {})

  def drops(self, position, page_size, shape):
    return None


@dataclasses.dataclass(frozen=True)
class Late(Uneven):
  """Tells bounds; `found` is what the device will find."""

  knows_lengths = places_early = False

  def found(self, plan, length):
    rng = np.random.default_rng([self.seed, length, 1])
    low = plan.rings.max(axis=1, keepdims=True)  # No ring outgrows its row.
    low = np.minimum(low, plan.lengths)
    lengths = rng.integers(np.maximum(low, plan.rings), plan.lengths + 1)
    return (-np.sort(-lengths, axis=1)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Full:
  """Everything, as the full cache does."""

  window: int = 1
  knows_lengths = places_early = True
  knows_heads = True

  def plan(self, length, budget, shape):
    lengths = np.full(shape, length, np.int32)
    return Plan(lengths, np.zeros(shape, np.int32), {})

  def drops(self, position, page_size, shape):
    return None


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Row j keeps `sinks` first pages and some newest: S2's own shape."""

  page_size: int
  window: int = 1
  sinks: int = 1
  knows_lengths = places_early = True
  knows_heads = True  # Row j is head j's.

  def _most(self, shape):
    """Full pages that a row keeps when a token begins a page, [R, K]."""
    local = np.arange(shape[1] - 1, -1, -1) + np.arange(shape[0])[:, None]
    return self.sinks + local

  def plan(self, length, budget, shape):
    full, rest = divmod(length, self.page_size)
    most = self._most(shape) + (rest == 0)  # Dropped by the next token.
    lengths = np.minimum(full, most) * self.page_size + rest
    return Plan(lengths.astype(np.int32), np.zeros(shape, np.int32), {})

  def drops(self, position, page_size, shape):
    assert position % page_size == 0
    goes = position // page_size > self._most(shape)
    return np.where(goes, self.sinks, -1).astype(np.int32)
