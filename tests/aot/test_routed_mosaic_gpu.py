"""Routed attention's Mosaic GPU kernel compiles for the chips it is for.

This file is also the program that compiles: Mosaic GPU keeps one chip's kernels
a process.
"""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot
from pallas_kernels.head_attention import HeadContexts, Strided
from pallas_kernels.packing import pack
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import Tiling

pytestmark = pytest.mark.compile

KV_HEADS = 2
MISSING = 3  # Exit status without the compiler.


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape: head size, query heads a KV head, thousands of tokens, mask."""

  head_size: int
  groups: int
  kilotokens: int
  mask: str
  block_rows: int = 512
  has_segments: bool = False
  dtype: str = "bfloat16"
  direction: str = "forward"

  def __str__(self):
    return "-".join(str(x) for x in dataclasses.astuple(self))

  @property
  def sizes(self):
    """Tokens, heads, head size."""
    return self.kilotokens << 10, KV_HEADS * self.groups, self.head_size

  def pattern(self):
    # With "mixed", every second head sees all of the past.
    local, stride = {"window": (8, 0), "dense": (1, 1)}.get(self.mask, (8, 16))
    heads = self.sizes[1]
    rules = [
      Strided(local=local, stride=stride, residue=head % max(1, stride))
      for head in range(heads)
    ]
    if self.mask == "mixed":
      rules[::2] = [Strided(local=1, stride=1)] * (heads // 2)
    return HeadContexts(64, tuple(rules))

  def arguments(self):
    """Packed rows of half the heads, k, v, the packing, ids, the cotangent."""
    length, heads, size = self.sizes
    packing = jax.eval_shape(
      lambda active: pack(
        active, num_active=heads // 2, block_rows=self.block_rows
      ),
      jax.ShapeDtypeStruct((1, length, heads), bool),
    )
    dtype = jnp.dtype(self.dtype)
    q = jax.ShapeDtypeStruct((packing.num_rows, size), dtype)
    kv = jax.ShapeDtypeStruct((1, length, KV_HEADS, size), dtype)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return q, kv, kv, packing, ids, q

  def program(self, q, k, v, packing, ids, d_out):
    options = dict(
      pattern=self.pattern(),
      # As large as those of XLA: the kernel's are smaller.
      tiling=Tiling(block_q=self.block_rows, block_kv=512, block_edge=256),
      implementation="mosaic_gpu",
    )
    if self.has_segments:
      options |= dict(q_segment_ids=ids, kv_segment_ids=ids)

    def attention(q, k, v):
      return routed_attention(q, k, v, packing, **options)

    if self.direction == "forward":
      return attention(q, k, v)
    return jax.vjp(attention, q, k, v)[1](d_out)


# Every head size, at 2K tokens.
ALWAYS = (
  Case(64, 8, 2, "s2"),
  Case(128, 4, 2, "mixed", has_segments=True, dtype="float16"),
  Case(256, 1, 2, "window"),
)
LATER = (
  Case(128, 1, 2, "dense"),
  Case(64, 8, 128, "s2"),
  Case(128, 4, 32, "dense"),
  Case(128, 8, 128, "s2", has_segments=True),
  Case(256, 4, 32, "s2", dtype="float16"),
  Case(64, 4, 32, "mixed", block_rows=128, has_segments=True),
  Case(128, 4, 32, "s2", direction="both"),
)
CHIPS = ("sm_90", "sm_100")


def compiled(chip, *cases):
  """What the compiler says about each case, in a process of its own."""
  result = subprocess.run(
    [sys.executable, __file__, chip, *map(repr, cases)],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
  )
  if result.returncode == MISSING:
    if os.environ.get("JAXHEADS_REQUIRE_COMPILERS"):
      raise AssertionError(result.stderr)
    pytest.skip(result.stderr)
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout)


def check(case, report):
  launches = 2 if case.mask == "mixed" else 1
  names = [name.partition(" ")[0] for name in report["kernels"]]
  assert names[:launches] == ["routed_attention_forward"] * launches
  assert (len(names) > launches) == (case.direction == "both")
  length, heads, size = case.sizes
  rows = length * heads // 2 + case.block_rows * heads
  # The outputs of all launches but one, and a few numbers a row.
  allowed = ((launches - 1) * size * 2 + launches * 16) * rows + (1 << 20)
  if case.direction == "both":
    # Rows and gradients in float32, keys padded and across.
    allowed = 16 * (rows + 2 * length * KV_HEADS) * size + (64 << 20)
  assert report["temp_bytes"] <= allowed
  assert length < 4096 or length**2 > allowed


@pytest.mark.parametrize("chip", CHIPS)
def test_forward_compiles(chip):
  for case, report in zip(ALWAYS, compiled(chip, *ALWAYS), strict=True):
    check(case, report)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("chip", "case"),
  [
    *((chip, case) for chip in CHIPS for case in LATER),
    # Blocks of one warp group: the rows of one of the chip's products.
    ("sm_90", Case(128, 4, 2, "s2", block_rows=64)),
    ("sm_100", Case(128, 4, 2, "s2", block_rows=128)),
  ],
  ids=str,
)
def test_other_shapes_compile(chip, case):
  (report,) = compiled(chip, case)
  check(case, report)


def main(chip, *cases):
  """Prints a JSON list of the reports."""
  reports = []
  for text in cases:
    case = eval(text)
    try:
      report = aot.compile_for(chip, case.program, *case.arguments())
    except aot.CompilerMissing as error:
      print(error, file=sys.stderr)
      return MISSING
    reports.append({"kernels": report.kernels, "temp_bytes": report.temp_bytes})
  print(json.dumps(reports))
  return 0


if __name__ == "__main__":
  sys.exit(main(*sys.argv[1:]))
