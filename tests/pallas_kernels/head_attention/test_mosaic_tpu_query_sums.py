"""Sums in HBM that the backward kernel comes back to, step after step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.head_attention.mosaic_tpu.items import (
  Worklist,
  make_calls,
)
from pallas_kernels.head_attention.mosaic_tpu.query_sums import (
  Position,
  QuerySums,
)
from pallas_kernels.head_attention.schedule import Visits

SIZE, BLOCK_Q = 8, 16
RACES = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


def make_call(q_tiles, rows, members):
  """A call whose rows visit these query tiles, with heads of their own."""
  visits = Visits(
    np.asarray(q_tiles, np.int32),
    *(np.zeros(len(q_tiles), dtype) for dtype in (np.int32, bool, bool)),
  )
  heads = np.arange(rows * members).reshape(rows, members)
  nothing = np.zeros(len(q_tiles), int)
  (call,) = make_calls(
    Worklist(visits, nothing, nothing),
    rows=rows,
    heads=heads,
    kv_heads=heads,
    residues=heads,
  )
  return call


def kernel(tables, before_ref, sums_ref, *scratch, call):
  """Adds a number of its own at every step, in two parts."""
  del before_ref
  at = Position.here(tables, call)
  sums = QuerySums(sums_ref, *scratch)
  sums.begin(at)
  value = jnp.left_shift(1, at.number) * (1 + at.batch + at.row)
  half = BLOCK_Q // 2
  for part in range(2):
    values = jnp.full((SIZE, half), value * (1 + part), jnp.float32)
    sums.add(at, pl.ds(part * half, half), values)
  sums.end(at)


def add_up(call, batch, tiles, interpret):
  heads = call.rows * call.members
  start = np.random.default_rng(0).integers(
    0, 9, (batch, heads, SIZE, tiles * BLOCK_Q)
  )
  start = start.astype(np.float32)
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  got = pl.pallas_call(
    lambda *refs: kernel(*refs, call=call),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(batch, call.rows, call.items, call.members),
      in_specs=(anywhere,),
      out_specs=anywhere,
      scratch_shapes=QuerySums.scratch(SIZE, BLOCK_Q),
    ),
    out_shape=jax.ShapeDtypeStruct(start.shape, jnp.float32),
    input_output_aliases={len(call.tables): 0},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")
    ),
    interpret=interpret,
  )(call.tables, start)
  return start, np.asarray(got)


def expected(start, q_tiles, call):
  sums = start.copy()
  for batch in range(start.shape[0]):
    for row in range(call.rows):
      for item, tile in enumerate(q_tiles):
        for member in range(call.members):
          value = (1 << (item * call.members + member)) * (1 + batch + row)
          columns = sums[batch, row * call.members + member][
            :, tile * BLOCK_Q : (tile + 1) * BLOCK_Q
          ]
          columns[:, : BLOCK_Q // 2] += value
          columns[:, BLOCK_Q // 2 :] += 2 * value
  return sums


MODES = {
  "late copies": {},
  "early copies": {"dma_execution_mode": "eager"},
  "two cores": {"num_cores_or_threads": 2},
}
STEPS = {
  "one step": ([0], 1, 1),
  "after one step": ([0, 0, 0, 0, 0], 2, 1),
  "after two steps": ([0, 1, 0, 1, 0], 2, 1),
  "after three steps": ([0, 1, 2, 0, 1, 2, 0], 2, 1),
  "causal": ([3, 2, 1, 0, 3, 2, 1, 3, 2, 3], 1, 1),
  "mixed": ([0, 0, 1, 1, 1, 0, 2, 0, 0, 1, 2, 2], 1, 1),
  "two members": ([0, 0, 0, 1, 0], 2, 2),
  "three members": ([1, 1, 0, 1], 2, 3),
}


def steps():
  """Copies early and late in every case; cores share rows in three of them."""
  for name, case in STEPS.items():
    for mode, changes in MODES.items():
      shared = ("after three steps", "mixed", "three members")
      later = mode == "two cores" and name not in shared
      marks = [pytest.mark.exhaustive] if later else []
      yield pytest.param(*case, changes, id=f"{name}-{mode}", marks=marks)


@pytest.mark.parametrize(
  ("q_tiles", "rows", "members", "changes"), list(steps())
)
def test_every_step_is_added_once(q_tiles, rows, members, changes, capsys):
  call = make_call(q_tiles, rows, members)
  interpret = dataclasses.replace(RACES, **changes)
  start, got = add_up(call, 2, max(q_tiles) + 2, interpret)
  np.testing.assert_array_equal(got, expected(start, q_tiles, call))
  assert "RACE" not in capsys.readouterr().out
