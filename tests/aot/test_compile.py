"""Attention compiles for every chip it is promised for, in linear memory.

With the chips' real compilers, on a machine that has none of the chips. The
shapes are a covering set: every chip meets every head size, group, length,
dtype and kind of mask, not every combination.
"""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

from jaxheads.moh import MoHConfig
from jaxheads.nn import MoHAttention
from pallas_kernels import aot
from pallas_kernels.head_attention import (
  HeadContexts,
  Strided,
  Table,
  Tiling,
  head_attention,
)
from pallas_kernels.packing import gather_rows, pack
from pallas_kernels.paged_attention import PageTable, paged_attention
from pallas_kernels.routed_attention import routed_attention
from pallas_kernels.routed_attention.tiling import default_tiling

pytestmark = pytest.mark.compile

MIB = 1 << 20
KV_HEADS = 2


def compile_for(chip, fn, *args):
  """As `aot.compile_for`; without the compiler, skips or, in CI, fails."""
  try:
    return aot.compile_for(chip, fn, *args)
  except aot.CompilerMissing as error:
    if os.environ.get("JAXHEADS_REQUIRE_COMPILERS"):
      raise
    pytest.skip(str(error))


@dataclasses.dataclass(frozen=True)
class Case:
  """A shape: head size, query heads a KV head, tokens, dtype, mask."""

  head_size: int
  groups: int
  length: int
  dtype: str
  mask: str
  block: int = 64

  def __str__(self):
    length = f"{self.length >> 10}K" if self.length < MIB else "1M"
    dtype = {"bfloat16": "bf16", "float32": "f32"}[self.dtype]
    return f"H{self.head_size}-G{self.groups}-{length}-{dtype}-{self.mask}"

  @property
  def heads(self):
    return KV_HEADS * self.groups

  def pattern(self):
    if self.mask == "table":
      blocks = self.length // self.block
      rng = np.random.default_rng(0)
      rules = [
        Table.from_mask(rng.random((blocks, blocks)) < 0.3)
        for _ in range(self.heads)
      ]
    else:
      local, stride, sinks = {
        "s2": (8, 16, 0),
        "window": (8, 0, 0),
        "dense": (1, 1, 0),
        "sinks": (8, 16, 2),
      }[self.mask]
      rules = [
        Strided(
          local=local,
          stride=stride,
          residue=head % max(1, stride),
          sinks=sinks,
        )
        for head in range(self.heads)
      ]
    return HeadContexts(self.block, tuple(rules))

  def arguments(self):
    """q, k, v and the cotangent."""
    q, kv = (
      jax.ShapeDtypeStruct(
        (1, self.length, heads, self.head_size), jnp.dtype(self.dtype)
      )
      for heads in (self.heads, KV_HEADS)
    )
    return q, kv, kv, q

  def program(self, implementation):
    """Forward and backward."""
    pattern = self.pattern()

    def attention(q, k, v):
      return head_attention(
        q, k, v, pattern=pattern, implementation=implementation
      )

    def both(q, k, v, d_out):
      return jax.vjp(attention, q, k, v)[1](d_out)

    return both

  @property
  def operand_bytes(self):
    """q, k, v, d_out and the gradients, with heads as wide as a chip's lane.

    TPUs keep 128 columns of whatever they hold.
    """
    columns = -(-self.head_size // 128) * 128
    arrays = 3 * self.heads + 4 * KV_HEADS
    size = jnp.dtype(self.dtype).itemsize
    return arrays * self.length * columns * size


K = 1 << 10
FIRST = (
  Case(64, 8, 128 * K, "bfloat16", "s2"),
  Case(96, 1, 2 * K, "float32", "table"),
  Case(128, 4, 32 * K, "bfloat16", "dense"),
  Case(256, 4, 32 * K, "float32", "window"),
)
SECOND = (
  Case(64, 1, 2 * K, "float32", "table"),
  Case(96, 4, 32 * K, "bfloat16", "window"),
  Case(128, 8, 128 * K, "bfloat16", "s2"),
  Case(256, 1, 32 * K, "bfloat16", "dense"),
)
THIRD = (
  Case(96, 8, 128 * K, "bfloat16", "window"),
  Case(128, 1, 2 * K, "bfloat16", "table"),
  Case(64, 4, 32 * K, "float32", "s2"),
  Case(256, 1, 2 * K, "bfloat16", "dense"),
)
# Small blocks: whatever has an entry for every head and pair of blocks would be
# larger than all that is allowed.
LONGEST = Case(128, 4, MIB, "bfloat16", "s2", block=16)
LONGEST_WINDOW = dataclasses.replace(LONGEST, mask="window")
GRID = [
  (chip, implementation, case)
  for implementation, chips in (
    (
      "mosaic_tpu",
      {
        "v4": FIRST,
        "v5e": (*SECOND, LONGEST, LONGEST_WINDOW),
        "v5p": THIRD,
        "v6e": FIRST,
        "tpu7x": SECOND,
      },
    ),
    ("triton", {"sm_80": SECOND, "sm_90": (*FIRST, LONGEST), "sm_100": THIRD}),
  )
  for chip, cases in chips.items()
  for case in cases
]


def test_the_set_covers_what_is_promised():
  values = {
    field: {getattr(case, field) for _, _, case in GRID}
    for field in ("head_size", "groups", "length", "dtype", "mask")
  }
  assert values == {
    "head_size": {64, 96, 128, 256},
    "groups": {1, 4, 8},
    "length": {2 * K, 32 * K, 128 * K, MIB},
    "dtype": {"bfloat16", "float32"},
    "mask": {"s2", "dense", "window", "table"},
  }
  promised = {name for name in aot.CHIP_NAMES if name != "7x"}
  assert {chip for chip, _, _ in GRID} == promised


def grid():
  """Two shapes a chip always, and a longest; the rest on request.

  The TPU compiler takes a minute for the million tokens of the shards, whose
  lists are long, and seconds for those of a window.
  """
  seen = {}
  for chip, implementation, case in GRID:
    seen[chip] = seen.get(chip, 0) + 1
    longest = LONGEST if implementation == "triton" else LONGEST_WINDOW
    later = seen[chip] > 2 and case is not longest
    marks = [pytest.mark.exhaustive] if later else []
    name = f"{chip}-{implementation}-{case}"
    yield pytest.param(chip, implementation, case, marks=marks, id=name)


@pytest.mark.parametrize(("chip", "implementation", "case"), list(grid()))
def test_forward_and_backward_compile(chip, implementation, case):
  report = compile_for(chip, case.program(implementation), *case.arguments())
  assert report.kernels, "plain XLA, not a kernel"
  # What is copied into another layout, partial sums in float32, and the code
  # with its tables of visits.
  allowed = 2 * case.operand_bytes + 16 * MIB
  assert report.temp_bytes + report.code_bytes <= allowed
  if case.length == MIB:
    assert case.heads * (case.length // case.block) ** 2 > allowed


# Packed rows of half the heads: a chip, the shape, and whether always.
ROUTED = (
  ("v4", Case(64, 8, 2 * K, "float32", "window"), True),
  ("v5e", Case(128, 4, 2 * K, "bfloat16", "s2"), True),
  ("v5p", Case(96, 1, 2 * K, "bfloat16", "window"), True),
  ("v6e", Case(128, 1, 2 * K, "bfloat16", "dense"), True),
  ("tpu7x", Case(256, 4, 2 * K, "bfloat16", "s2"), True),
  ("sm_80", Case(64, 1, 2 * K, "bfloat16", "dense"), True),
  ("sm_90", Case(128, 4, 2 * K, "bfloat16", "s2"), True),
  ("sm_100", Case(96, 1, 2 * K, "bfloat16", "window"), True),
  ("v5e", Case(128, 4, 2 * K, "bfloat16", "table", block=16), True),
  ("v4", Case(128, 4, 32 * K, "bfloat16", "dense"), False),
  ("v5e", Case(128, 4, 32 * K, "bfloat16", "s2"), False),
  ("v5e", Case(64, 1, 128 * K, "bfloat16", "dense"), False),
  ("v5p", Case(256, 4, 32 * K, "bfloat16", "s2"), False),
  ("v6e", Case(128, 8, 128 * K, "bfloat16", "s2"), False),
  ("tpu7x", Case(128, 1, 128 * K, "bfloat16", "dense"), False),
  ("sm_80", Case(64, 8, 32 * K, "float32", "s2"), False),
  ("sm_90", Case(256, 4, 32 * K, "bfloat16", "s2"), False),
  ("sm_100", Case(128, 4, 32 * K, "bfloat16", "dense"), False),
  ("sm_80", Case(128, 8, 128 * K, "bfloat16", "s2"), False),
  ("sm_90", Case(128, 8, 128 * K, "bfloat16", "s2", block=16), False),
  ("sm_100", Case(64, 1, 128 * K, "bfloat16", "dense"), False),
  ("v4", Case(64, 8, 2 * K, "float32", "s2"), False),
  ("v4", Case(64, 8, 2 * K, "float32", "table"), False),
  ("v5e", Case(128, 4, 32 * K, "bfloat16", "sinks"), False),
  ("v4", Case(128, 4, 128 * K, "bfloat16", "sinks"), False),
  ("v5p", Case(128, 4, 32 * K, "bfloat16", "table"), False),
  ("v6e", Case(96, 1, 128 * K, "bfloat16", "table"), False),
  ("tpu7x", Case(256, 4, 32 * K, "bfloat16", "table", block=16), False),
)


def routed_grid():
  for chip, case, always in ROUTED:
    marks = [] if always else [pytest.mark.exhaustive]
    yield pytest.param(chip, case, marks=marks, id=f"{chip}-{case}")


@pytest.mark.parametrize(("chip", "case"), list(routed_grid()))
def test_routed_attention_compiles(chip, case):
  implementation = "triton" if chip.startswith("sm_") else "mosaic_tpu"
  q, k, v, d_out = case.arguments()
  active = jax.ShapeDtypeStruct(q.shape[:3], bool)

  def program(q, k, v, d_out, active):
    tiling = default_tiling(case.length, case.length, 0.5)
    packing = pack(
      active, num_active=case.heads // 2, block_rows=tiling.block_q
    )

    def attention(rows, k, v):
      return routed_attention(
        rows,
        k,
        v,
        packing,
        pattern=case.pattern(),
        tiling=tiling,
        implementation=implementation,
      )

    rows = gather_rows(q, packing)
    out, pullback = jax.vjp(attention, rows, k, v)
    return out, pullback(gather_rows(d_out, packing))

  report = compile_for(chip, program, q, k, v, d_out, active)
  kernels = [name.partition(" ")[0] for name in report.kernels]
  if implementation == "triton":
    # Rows of the gathered operands, far sums in float32 and small tables.
    allowed = case.operand_bytes + 4 * MIB
    assert kernels == [
      "routed_attention_forward",
      "routed_attention_dq",
      *["routed_attention_far_dkv"] * (case.mask == "s2"),
      "routed_attention_near_dkv",
    ]
    # No head has room for a matrix of its tokens.
    assert case.length < 32 * K or allowed < case.length**2 * 2
  else:
    # Rows of the gathered operands, sums in float32 and padding: no more than
    # all heads would take.
    blocks = -(-case.length // 512)
    allowed = 3 * case.operand_bytes + 64 * case.heads * blocks**2 + 32 * MIB
    assert kernels == [
      "head_attention_forward",
      *["head_attention_backward"] * (2 if case.mask in ("s2", "sinks") else 1),
    ]
  assert report.temp_bytes + report.code_bytes <= allowed


@pytest.mark.parametrize("execution", ["dense", "dispatch"])
@pytest.mark.parametrize(
  "chip",
  [
    "sm_90",
    pytest.param("v5e", marks=pytest.mark.exhaustive),
    pytest.param("v6e", marks=pytest.mark.exhaustive),
  ],
)
def test_a_routed_layer_keeps_no_attention_weights(chip, execution):
  heads, size, length = 16, 64, 16 * K
  layer = MoHAttention(
    heads,
    heads * size,
    moh=MoHConfig.from_fraction(heads, 0.5),
    rope_theta=10_000.0,
    dtype=jnp.bfloat16,
    execution=execution,
    decode=False,
    rngs=nnx.Rngs(0),
  )
  graph, state = nnx.split(layer)

  def loss(state, x):
    out = nnx.merge(graph, state, copy=True)(x, is_causal=True)
    return jnp.mean(out.astype(jnp.float32) ** 2)

  x = jax.ShapeDtypeStruct((1, length, heads * size), jnp.bfloat16)
  grad = jax.grad(loss, argnums=(0, 1), allow_int=True)
  report = compile_for(chip, grad, state, x)
  assert len(report.kernels) >= 2
  # A few float32 arrays of all heads: less than the weights of one.
  allowed = 12 * length * heads * size * 4
  assert report.temp_bytes <= allowed < 2 * length**2 * 4


# Of a step of decoding: sequences x KV heads, query heads a KV head, head size,
# tokens, page, dtype.
DECODE = (
  ("v4", 64, 4, 128, 32 * K, 256, "bfloat16"),
  ("v5e", 64, 8, 64, 8 * K, 256, "bfloat16"),
  ("v5p", 16, 1, 256, 2 * K, 64, "float32"),
  ("v6e", 8, 8, 128, 128 * K, 128, "bfloat16"),
  ("tpu7x", 128, 4, 96, 2 * K, 16, "bfloat16"),
  ("sm_80", 64, 4, 128, 32 * K, 64, "bfloat16"),
  ("sm_90", 8, 8, 96, 128 * K, 256, "bfloat16"),
  ("sm_100", 16, 1, 64, 2 * K, 16, "float32"),
)

# The same with quantised pages: their dtype, and whether always.
QUANTISED = (
  (("v5e", 64, 8, 128, 8 * K, 128, "bfloat16"), "int8", True),
  (("tpu7x", 64, 4, 128, 8 * K, 128, "bfloat16"), "float8_e4m3fn", True),
  (("sm_90", 64, 4, 128, 8 * K, 64, "bfloat16"), "float8_e4m3fn", True),
  (("v4", 64, 4, 128, 2 * K, 32, "bfloat16"), "int8", False),
  (("v5e", 16, 1, 256, 2 * K, 96, "float32"), "float8_e5m2", False),
  (("v5p", 16, 4, 64, 2 * K, 64, "bfloat16"), "float8_e4m3fn", False),
  (("v6e", 64, 8, 128, 32 * K, 256, "bfloat16"), "float8_e4m3fn", False),
  (("tpu7x", 64, 1, 128, 8 * K, 32, "float32"), "int8", False),
  (("sm_80", 64, 8, 128, 32 * K, 64, "bfloat16"), "int8", False),
  (("sm_80", 16, 4, 96, 2 * K, 64, "float32"), "float8_e5m2", False),
  (("sm_90", 16, 1, 64, 2 * K, 16, "float32"), "int8", False),
  (("sm_100", 64, 4, 128, 8 * K, 64, "bfloat16"), "float8_e4m3fn", False),
)


def decode_grid():
  for case in DECODE:
    yield pytest.param(*case, None, id="-".join(map(str, case)))
  for case, dtype, always in QUANTISED:
    marks = [] if always else [pytest.mark.exhaustive]
    name = "-".join(map(str, (*case, dtype)))
    yield pytest.param(*case, dtype, id=name, marks=marks)


def decode_program(case, page_dtype, implementation):
  """A step of decoding, and its arguments."""
  _, rows, groups, head_size, length, page, dtype = case

  def program(q, k, v, lengths, scales):
    k_scales, v_scales = scales or (None, None)
    table = PageTable.contiguous(lengths, pages_per_row=length // page)
    return paged_attention(
      q,
      k,
      v,
      table,
      k_scales=k_scales,
      v_scales=v_scales,
      implementation=implementation,
    )

  def shape(*sizes, dtype=dtype):
    return jax.ShapeDtypeStruct(sizes, dtype)

  count = rows * (length // page)
  pool = shape(count, page, head_size, dtype=page_dtype or dtype)
  return program, (
    shape(rows, groups, head_size),
    pool,
    pool,
    shape(rows, dtype=jnp.int32),
    (shape(count, dtype=jnp.float32),) * 2 if page_dtype else (),
  )


@pytest.mark.parametrize(
  ("chip", "rows", "groups", "head_size", "length", "page", "dtype", "pages"),
  list(decode_grid()),
)
def test_paged_attention_compiles(
  chip, rows, groups, head_size, length, page, dtype, pages
):
  implementation = "triton" if chip.startswith("sm") else "mosaic_tpu"
  case = (chip, rows, groups, head_size, length, page, dtype)
  program, arguments = decode_program(case, pages, implementation)
  report = compile_for(chip, program, *arguments)
  (kernel,) = report.kernels
  assert kernel.startswith("paged_attention")
  # On GPUs every 512 tokens of a row leave a part that is merged.
  parts = rows * (length // 512 + 1) * groups * head_size * 4
  if head_size % 128 == 0 or implementation == "triton":
    # The pool is read where it lies; TPUs may pad narrower heads first.
    assert report.temp_bytes + report.code_bytes < parts + 4 * MIB


def test_pages_that_a_gpu_cannot_convert_are_refused():
  # Triton's compiler would take the process down.
  case = ("sm_80", 8, 4, 64, 512, 64, "bfloat16")
  program, arguments = decode_program(case, "float8_e4m3fn", "triton")
  with pytest.raises(NotImplementedError, match=r"8\.9, this is 8\.0; use"):
    compile_for("sm_80", program, *arguments)
  program, arguments = decode_program(case, "float8_e4m3fn", None)
  assert not compile_for("sm_80", program, *arguments).kernels  # By XLA.


def command_line(*flags):
  """Runs the program; its exit status and its text."""
  # What conftest.py sets for the tests, the program sets itself.
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ("JAX_PLATFORMS", "XLA_FLAGS")
  }
  result = subprocess.run(
    [sys.executable, "-m", "pallas_kernels.aot", *map(str, flags)],
    capture_output=True,
    text=True,
    env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )
  if result.returncode == 3:
    if os.environ.get("JAXHEADS_REQUIRE_COMPILERS"):
      raise AssertionError(result.stderr)
    pytest.skip(result.stderr)
  return result


# Head size, query heads a KV head, dtype, stride (1 is dense), direction; the
# first three always, the others on request.
MOSAIC_GPU = (
  (64, 8, "bfloat16", 16, "forward"),
  (128, 4, "float16", 1, "forward"),
  (256, 1, "bfloat16", 16, "forward"),
  (64, 1, "float16", 1, "forward"),
  (128, 1, "bfloat16", 1, "forward"),
  (128, 8, "bfloat16", 16, "both"),
  (256, 4, "float16", 0, "both"),
)


def mosaic_gpu_grid():
  for chip in ("sm_90", "sm_100"):
    for number, case in enumerate(MOSAIC_GPU):
      marks = [pytest.mark.exhaustive] if number > 2 else []
      name = "-".join(map(str, (chip, *case)))
      yield pytest.param(chip, *case, marks=marks, id=name)


@pytest.mark.parametrize(
  ("chip", "head_size", "groups", "dtype", "stride", "direction"),
  list(mosaic_gpu_grid()),
)
def test_mosaic_gpu_compiles(chip, head_size, groups, dtype, stride, direction):
  # A process of its own: Mosaic GPU keeps one chip's kernels a process.
  result = command_line(
    *("--chip", chip, "--implementation", "mosaic_gpu"),
    *("--seq-len", 32 * K, "--heads", KV_HEADS * groups),
    *("--kv-heads", KV_HEADS, "--head-dim", head_size),
    *("--dtype", dtype, "--local", 8, "--stride", stride),
    *(["--backward"] if direction == "both" else []),
  )
  assert result.returncode == 0, result.stdout + result.stderr
  assert re.search(r"^implementation +mosaic_gpu$", result.stdout, re.M)


def test_mosaic_gpu_is_not_compiled_for_another_chip():
  x = jax.ShapeDtypeStruct((256,), jnp.float32)

  @functools.partial(plgpu.kernel, out_type=x)
  def program(x_ref, out_ref):
    out_ref[...] = x_ref[...] + 1

  assert compile_for("sm_90", program, x).kernels
  # JAX would return the Hopper kernel, without a word.
  with pytest.raises(RuntimeError, match=r"one chip in a process.* sm_90"):
    compile_for("sm_100", program, x)


def test_the_command_line_reports():
  result = command_line(
    *("--chip", "v5e", "--seq-len", 8 * K, "--heads", 4, "--kv-heads", 2),
    *("--head-dim", 64, "--dtype", "float32", "--backward"),
  )
  assert result.returncode == 0, result.stdout + result.stderr
  facts = dict(
    re.split(r" {2,}", line, maxsplit=1) for line in result.stdout.splitlines()
  )
  assert facts["compiles"] == "yes, forward and backward"
  assert facts["implementation"] == "mosaic_tpu"
  assert "head_attention" in facts["kernels"]
  # q, k, v and the cotangent of the output.
  assert facts["arguments"] == "24.0 MiB"
  assert re.fullmatch(r"[\d.]+ (bytes|[KMG]iB)", facts["temporary"])
  assert re.fullmatch(r"[\d.]+ s", facts["compile time"])


def test_the_command_line_says_why_not():
  result = command_line(
    *("--chip", "v5e", "--implementation", "mosaic_tpu"),
    *("--seq-len", 16 * K, "--heads", 2, "--block-q", 8 * K),
    *("--block-kv", 8 * K),
  )
  assert result.returncode == 1, result.stdout + result.stderr
  assert re.fullmatch(
    r"v5e: does not compile: .*(VMEM|vector memory).*\n", result.stdout
  )


def with_scratch(rows):
  """A kernel that asks for so many rows of VMEM, 512 bytes each."""

  def kernel(x_ref, out_ref, scratch_ref):
    scratch_ref[:8] = x_ref[...] * 2
    out_ref[...] = scratch_ref[:8] + 1

  x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
  return pl.pallas_call(
    kernel,
    out_shape=x,
    scratch_shapes=[pltpu.VMEM((rows, 128), jnp.float32)],
    name="scratch",
  ), x


def test_a_tile_that_vmem_cannot_hold_is_reported():
  fits, x = with_scratch(1 << 10)
  report = compile_for("v5e", fits, x)
  assert report.argument_bytes == report.output_bytes == 4 * x.size
  assert report.kernels == ("scratch ()",)
  for chip, rows, there in (("v4", 1 << 16, 16), ("v5e", 1 << 19, 128)):
    too_large, x = with_scratch(rows)
    with pytest.raises(
      aot.DoesNotCompile, match=rf"^VMEM exceeded: .* {there * MIB}\."
    ):
      compile_for(chip, too_large, x)


def test_a_table_that_smem_cannot_hold_is_reported():
  def kernel(table_ref, x_ref, out_ref):
    out_ref[...] = x_ref[...] + table_ref[0]

  def whole(i, table_ref):
    return 0, 0

  program = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((8, 128), jnp.int32),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(1,),
      in_specs=[pl.BlockSpec((8, 128), whole)],
      out_specs=pl.BlockSpec((8, 128), whole),
    ),
  )
  with pytest.raises(aot.DoesNotCompile, match=r"^SMEM exceeded: .* 1048576"):
    compile_for(
      "v5e",
      program,
      jax.ShapeDtypeStruct((1 << 19,), jnp.int32),
      jax.ShapeDtypeStruct((8, 128), jnp.int32),
    )


def test_a_tile_that_shared_memory_cannot_hold_is_reported():
  case = Case(128, 1, 4 * K, "bfloat16", "dense")

  def attention(q, k, v, _):
    return head_attention(
      q,
      k,
      v,
      pattern=case.pattern(),
      tiling=Tiling(block_q=512, block_kv=512),
      implementation="triton",
    )

  # The implementation may know without asking the compiler.
  with pytest.raises(
    (aot.DoesNotCompile, NotImplementedError), match="shared memory"
  ):
    compile_for("sm_80", attention, *case.arguments())


def test_what_does_not_fit_into_device_memory_is_reported():
  def square(x):
    return jnp.sort(x @ x.T)

  with pytest.raises(aot.DoesNotCompile, match=r"^HBM exceeded: .* 15\.75G"):
    compile_for("v5e", square, jax.ShapeDtypeStruct((1 << 18, 8), jnp.float32))
