"""FLOPs and traffic of programs in which they are known by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxheads.planning import counts, hlo

N = 64


def product_in_loop(turns):
  def run(x, w):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=turns)[0]

  x = jax.ShapeDtypeStruct((N, 2 * N), jnp.float32)
  w = jax.ShapeDtypeStruct((2 * N, 2 * N), jnp.float32)
  return jax.jit(run).lower(x, w).compile()


def test_products_count_in_every_turn_of_a_loop():
  once = 2 * N * (2 * N) * (2 * N)
  for turns in (3, 9):
    program = hlo.parse(product_in_loop(turns).as_text())
    assert counts.matmul_flops(program) == turns * once


def test_xla_itself_counts_the_body_of_a_loop_once():
  # What the plan says beside XLA's figure; when this fails, that can go.
  few, many = (product_in_loop(turns).cost_analysis() for turns in (3, 9))
  assert few["flops"] == many["flops"]


CONVOLUTION = """\
HloModule jit_f, num_partitions=1

ENTRY %main (x: bf16[{left}], w: bf16[{right}]) -> bf16[{out}] {{
  %x = bf16[{left}]{{1,0}} parameter(0)
  %w = bf16[{right}]{{1,0}} parameter(1)
  ROOT %conv = bf16[{out}]{{1,0}} convolution(%x, %w), {attributes}
}}
"""


@pytest.mark.parametrize(
  ("left", "right", "out", "attributes", "flops"),
  [
    # As TPUs write x @ w and x.T @ w.
    ("8,32", "32,16", "8,16", "dim_labels=bf_io->bf", 2 * 8 * 32 * 16),
    ("32,8", "32,16", "8,16", "dim_labels=fb_io->bf", 2 * 8 * 32 * 16),
    # A sum over 4 heads of 32 x 16 products, as a window over the heads.
    (
      "4,8,32",
      "4,32,16",
      "1,8,16",
      "window={size=4}, dim_labels=0bf_0io->0bf",
      2 * 4 * 8 * 32 * 16,
    ),
    # One product for each of 4 heads: the others meet padding only.
    (
      "4,8,32",
      "4,32,16",
      "4,8,16",
      "window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
      2 * 4 * 8 * 32 * 16,
    ),
    # Three positions meet two neighbours each; those at the edges one.
    (
      "3,8,32",
      "3,32,16",
      "3,8,16",
      "window={size=3 pad=1_1}, dim_labels=0bf_0io->0bf",
      2 * 7 * 8 * 32 * 16,
    ),
  ],
)
def test_products_that_are_written_as_convolutions(
  left, right, out, attributes, flops
):
  text = CONVOLUTION.format(
    left=left, right=right, out=out, attributes=attributes
  )
  assert counts.matmul_flops(hlo.parse(text)) == flops


MOVES = """\
HloModule jit_f, num_partitions=1

%slice_of_one (stack: f32[10,100], at: s32[]) -> f32[1,100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,100]{1,0} dynamic-slice(%stack, %at, %zero), \
dynamic_slice_sizes={1,100}
  ROOT %negate = f32[1,100]{1,0} negate(%one)
}

%write_of_one (stack: f32[10,100], at: s32[], one: f32[1,100]) -> f32[10,100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  %one = f32[1,100]{1,0} parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[10,100]{1,0} dynamic-update-slice(%stack, %one, %at, %zero)
}

ENTRY %main (stack: f32[10,100], at: s32[]) -> f32[10,100] {
  %stack = f32[10,100]{1,0} parameter(0)
  %at = s32[]{:S(6)} parameter(1)
  %read = f32[1,100]{1,0:T(8,128)S(1)} fusion(%stack, %at), kind=kLoop, \
calls=%slice_of_one
  %free = f32[100]{0:S(1)} bitcast(%read)
  %kernel.1 = f32[1,100]{1,0} custom-call(%read), \
custom_call_target="tpu_custom_call"
  %kernel.2.clone = f32[1,100]{1,0} custom-call(%read), \
custom_call_target="tpu_custom_call"
  ROOT %written = f32[10,100]{1,0} fusion(%stack, %at, %kernel.1), kind=kLoop, \
calls=%write_of_one
}
"""


def test_of_slices_only_the_slice_moves_and_fast_memory_is_free():
  program = hlo.parse(MOVES)
  row = 4 * 100
  # Read of a row; two kernels' results; the last fusion reads a row and writes
  # it into its place.
  assert counts.hbm_bytes(program) == row + 2 * row + 2 * row


def test_kernels_are_counted_by_name():
  assert counts.kernels(hlo.parse(MOVES)) == {"kernel": 2}
