"""What the code of an edge leaves out and masks, against the dense mask."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from pallas_kernels.head_attention import HeadContexts, Strided, Tiling
from pallas_kernels.head_attention.mosaic_tpu import edges, plan
from pallas_kernels.head_attention.mosaic_tpu.items import (
  EDGE,
  FAR,
  Call,
  read_step,
)
from pallas_kernels.head_attention.mosaic_tpu.tile import Overlap, codes
from pallas_kernels.head_attention.schedule import split_heads

OVERLAP = Overlap(chunk=16, ahead=1, edge_chunk=8)


@st.composite
def layouts(draw):
  stride = draw(st.integers(0, 5))
  residues = draw(st.permutations(range(max(stride, 1))))
  local = draw(st.integers(1, 4))
  rules = tuple(
    Strided(local=local, stride=stride, residue=residue) for residue in residues
  )
  block = draw(st.sampled_from([4, 16, 64]))
  (run,) = split_heads(HeadContexts(block, rules))
  return plan.Layout(
    run=run,
    block=block,
    is_causal=True,
    tiling=Tiling(
      block_q=draw(st.sampled_from([16, 32, 64])),
      block_kv=draw(st.sampled_from([16, 32, 64])),
    ),
    q_length=draw(st.integers(1, 200)),
    kv_length=draw(st.integers(1, 200)),
    q_offset=draw(st.integers(0, 90)),
    groups=1,
  )


def positions(layout, step, chunk):
  """Of the queries and the keys of a chunk."""
  tiling = layout.tiling
  query = int(step.q_tile) * tiling.block_q + chunk.start
  query += np.arange(chunk.size) + layout.q_offset
  keys = chunk.first_key + np.arange(chunk.keys)
  return query, keys


def visible(layout, residue, query, key):
  """The formula: bool [keys, queries]."""
  i, j = query[None] // layout.block, key[:, None] // layout.block
  rule = Strided(
    local=layout.run.local, stride=layout.run.stride, residue=residue
  )
  return rule.keep(i, j) & (key[:, None] <= query[None])


def near_mask(layout, code, chunk, seen):
  """What a chunk's segments let through, of what is seen of the window."""
  if code.edge is None:
    return np.ones_like(seen) if not code.kind & EDGE else seen
  let = []
  for segment in code.edge.segments(layout.tiling.block_kv, chunk):
    rows = slice(
      segment.first - chunk.first_key,
      segment.first - chunk.first_key + segment.size,
    )
    masked = segment.causal or segment.window or segment.tail
    let.append(seen[rows] if masked else np.ones_like(seen[rows]))
  return np.concatenate(let)


@hypothesis.settings(max_examples=60)
@hypothesis.given(layout=layouts())
def test_each_visible_pair_is_computed_once_and_no_other(layout):
  tiling, run = layout.tiling, layout.run
  counts = np.zeros((run.stop, layout.q_length, layout.kv_length), int)
  for call in plan.forward_plan(layout).calls:
    for head in range(run.stop):
      residue = run.residues[head]
      for item in range(call.items):
        step = read_step(call.tables, head, item, 0, 1)
        running = [
          code
          for code in codes(layout, call)
          if code.runs(layout, call.tables, item, step)
        ]
        assert len(running) <= 1
        for code in running:
          for chunk in code.chunks(layout, OVERLAP):
            query, key = positions(layout, step, chunk)
            if code.kind & FAR:
              first = int(step.far_tile) * layout.far_blocks
              block = first + key // layout.block
              key = (block * layout.stride + residue) * layout.block
              key += np.arange(key.size) % layout.block
              seen = visible(layout, residue, query, key)
              seen &= query[None] // layout.block >= (
                key[:, None] // layout.block + run.local
              )
              let = seen if code.kind & EDGE else np.ones_like(seen)
            else:
              key = key + int(step.near_tile) * tiling.block_kv
              seen = visible(layout, residue, query, key)
              if layout.window is not None:
                seen &= query[None] // layout.block < (
                  key[:, None] // layout.block + run.local
                )
              seen &= key[:, None] < layout.kv_length
              let = near_mask(layout, code, chunk, seen)
            if not code.kind & EDGE:
              assert (key < layout.kv_length).all()
            k, q = np.nonzero(let)
            q = query[q] - layout.q_offset
            real = (q < layout.q_length) & (key[k] < layout.kv_length)
            np.add.at(counts[head], (q[real], key[k][real]), 1)
  query = np.arange(layout.q_length) + layout.q_offset
  for head in range(run.stop):
    expected = visible(
      layout, run.residues[head], query, np.arange(layout.kv_length)
    )
    np.testing.assert_array_equal(counts[head], expected.T.astype(int))


def test_a_window_of_a_tile_computes_little_more_than_it_holds():
  edge = edges.Edge(offset=0, phase=0, keys=512, block=64, local=8)
  chunks = edge.chunks(512, 512, 128)
  assert [chunk.keys for chunk in chunks] == [128, 256, 384, 512]
  later = edge._replace(offset=512).chunks(512, 512, 128)
  assert [(chunk.first_key, chunk.keys) for chunk in later] == [
    (64, 448),
    (192, 320),
    (320, 192),
    (448, 64),
  ]


@pytest.mark.parametrize("word", range(16))
def test_packed_halves_take_the_one_code_that_holds_them(word):
  (run,) = split_heads(HeadContexts(16, (Strided(local=2, stride=4),)))
  layout = plan.Layout(
    run=run,
    block=16,
    is_causal=True,
    tiling=Tiling(block_q=256, block_kv=64),
    q_length=256,
    kv_length=64,
    q_offset=0,
    groups=1,
    packed=True,
  )
  # Positions of a half that sees none, the first, the second or both halves.
  bounds = {0: (1000, -1), 1: (0, 20), 2: (60, 70), 3: (0, 70)}
  pairs = [bounds[word & 3], bounds[word >> 2]]
  (call,) = plan.forward_plan(dataclasses.replace(layout, packed=False)).calls
  tables = call.tables._replace(
    firsts=np.asarray([first for first, _ in pairs]),
    lasts=np.asarray([last for _, last in pairs]),
  )
  step = read_step(tables, 0, 0, 0, 1)._replace(flags=EDGE, near_tile=0)
  call = Call(tables, rows=1, members=1, kinds=(0, EDGE))
  running = [
    code for code in codes(layout, call) if code.runs(layout, tables, 0, step)
  ]
  assert len(running) == bool(word)
  for code in running:
    assert code.halves.word & word == word
    # The corners that it leaves out are all that there are.
    assert code.halves.word == word or code.halves == edges.EVERYTHING
    logits = sum(
      chunk.size * chunk.keys for chunk in code.chunks(layout, OVERLAP)
    )
    assert logits == 128 * 32 * code.halves.word.bit_count()
