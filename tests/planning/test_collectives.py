"""Collectives of programs in which they are known by hand."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxheads.planning import hlo
from jaxheads.planning.collectives import (
  by_kind_and_axes,
  collectives,
  replica_groups,
)

ROWS, WIDTH = 16, 32  # Of what a device holds, in float32.
SIZE = 4 * ROWS * WIDTH
SHAPE = {"data": 2, "fsdp": 4}


def compiled(body):
  """Text of `body`, run on what each of 2 x 4 devices holds."""
  mesh = jax.make_mesh(
    tuple(SHAPE.values()), tuple(SHAPE), axis_types=(AxisType.Auto,) * 2
  )
  rows = PartitionSpec(("data", "fsdp"))
  x = jax.ShapeDtypeStruct(
    (8 * ROWS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, rows)
  )
  run = jax.shard_map(
    body, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False
  )
  return jax.jit(run).lower(x).compile().as_text()


def sent(text):
  found = collectives(hlo.parse(text), SHAPE)
  return by_kind_and_axes(found)


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_a_sum_is_sent_around_twice(axis):
  n = SHAPE[axis]
  text = compiled(lambda x: jax.lax.psum(x, axis))
  assert sent(text) == {("all-reduce", axis): 2 * (n - 1) / n * SIZE}


def test_a_sum_over_both_axes_is_over_both():
  text = compiled(lambda x: jax.lax.psum(x, ("data", "fsdp")))
  assert sent(text) == {("all-reduce", "data+fsdp"): 2 * 7 / 8 * SIZE}


def gather_in_loop(x):
  def turn(x, _):
    whole = jax.lax.all_gather(x, "fsdp", tiled=True)
    return x + whole.reshape(4, *x.shape).max(0), None

  return jax.lax.scan(turn, x, length=5)[0]


def test_a_gather_in_a_loop_counts_in_every_turn():
  (gather,) = collectives(hlo.parse(compiled(gather_in_loop)), SHAPE)
  assert (gather.kind, gather.axes, gather.group_size) == (
    "all-gather",
    "fsdp",
    4,
  )
  assert gather.operand == f"f32[{ROWS},{WIDTH}]"
  assert (gather.operand_bytes, gather.times) == (SIZE, 5)
  # Each of the others gets this device's part.
  assert gather.total_bytes == 5 * 3 * SIZE


def test_loops_in_loops_multiply():
  def body(x):
    return jax.lax.fori_loop(
      0, 3, lambda _, x: gather_in_loop(x) * jax.lax.pmax(x, "data"), x
    )

  assert sent(compiled(body)) == {
    ("all-gather", "fsdp"): 3 * 5 * 3 * SIZE,
    ("all-reduce", "data"): 3 * SIZE,
  }


@pytest.mark.parametrize(("start", "stop", "turns"), [(0, 7, 7), (3, 5, 2)])
def test_turns_are_read_from_the_test_of_a_loop(start, stop, turns):
  def turn(_, x):
    return x + jax.lax.ppermute(x, "fsdp", [(n, (n + 1) % 4) for n in range(4)])

  text = compiled(lambda x: jax.lax.fori_loop(start, stop, turn, x))
  # TPUs do not say it.
  bare = re.sub(r'"known_trip_count":\{[^}]*\}', "", text)
  assert bare != text
  for told in (text, bare):
    program = hlo.parse(told)
    assert not program.unknown_loops
    assert sent(told) == {("collective-permute", "fsdp"): turns * SIZE}


def test_a_loop_whose_turns_nobody_knows_is_named_and_counts_once():
  def body(x):
    def turn(x):
      return x * 0.5 * jax.lax.psum(jnp.ones(()), "fsdp")

    return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, turn, x)

  program = hlo.parse(compiled(body))
  assert len(program.unknown_loops) == 1


def test_a_permute_to_oneself_sends_nothing():
  text = compiled(
    lambda x: jax.lax.ppermute(x, "fsdp", [(n, n) for n in range(4)])
  )
  assert sent(text) == {}


def test_sums_of_parts_and_exchanges_keep_their_own_part():
  def body(x):
    part = jax.lax.psum_scatter(x, "fsdp", tiled=True)
    turned = jax.lax.all_to_all(x, "data", 0, 0, tiled=True)
    return jnp.concatenate([part, turned])

  # The CPU's exchange takes a tuple of parts.
  assert sent(compiled(body)) == {
    ("reduce-scatter", "fsdp"): 3 / 4 * SIZE,
    ("all-to-all", "data"): 1 / 2 * SIZE,
  }


def test_of_branches_one_counts():
  def body(x):
    return jax.lax.cond(
      jax.lax.axis_index("data") == 0,
      lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:ROWS],
      lambda x: x,
      x,
    )

  assert sent(compiled(body)) == {("all-gather", "fsdp"): 3 * SIZE}


@pytest.mark.parametrize(
  ("written", "groups"),
  [
    ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
    ("{}", ((0, 1, 2, 3),)),
    ("[2,2]<=[4]", ((0, 1), (2, 3))),
    ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
    ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", ((0, 1), (2, 3))),
    ("mesh['a'=2,'b'=1,'c'=2] {'a','c'}", ((0, 1, 2, 3),)),
  ],
)
def test_groups_of_devices_are_read_in_all_forms(written, groups):
  text = f"channel_id=1, replica_groups={written}, dimensions={{0}}"
  assert replica_groups(text, 4) == groups


def test_groups_in_an_unknown_form_are_refused():
  with pytest.raises(ValueError, match="replica groups"):
    replica_groups("replica_groups=mesh['a'=4] {'a':(1)2}", 4)


# What the TPU compiler wrote for a product with a weight that is split over
# "fsdp", and its gradient; shortened. The gather goes on beside a product: it
# is in two fusions, of which the first starts it.
TPU = """\
HloModule jit_f, is_scheduled=true, num_partitions=16

%start (param_0.148: bf16[1,512,512]) -> (bf16[1,512,512], bf16[1,512,1024]) {
  %param_0.148 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.27 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)} \
all-gather(%param_0.148), channel_id=13, \
replica_groups=[8,2]<=[2,8]T(1,0), dimensions={2}, \
backend_config={"flag_configs":[],\
"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.2 = (bf16[1,512,512]{2,1,0}, bf16[1,512,1024]{2,1,0}, \
/*index=2*/u32[]{:S(2)}) custom-call(%all-gather.27), \
custom_call_target="AsyncCollectiveStart"
}

%beside (param_0.152: bf16[1,512,512]) -> bf16[1,512,1024] {
  %param_0.152 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.29 = bf16[1,512,1024]{2,1,0:T(8,128)(2,1)S(1)} \
all-gather(%param_0.152), channel_id=13, \
replica_groups=[8,2]<=[2,8]T(1,0), dimensions={2}, \
backend_config={"flag_configs":[],\
"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%add.3.clone (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %add = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter.clone.1 (input.2: bf16[1024,512]) -> bf16[512,512] {
  %input.2 = bf16[1024,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.12 = bf16[1024,512]{1,0:T(8,128)(2,1)} all-reduce(%input.2), \
channel_id=15, replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},\
{6,14},{7,15}}, use_global_device_ids=true, to_apply=%add.3.clone
  %partition-id = u32[]{:T(128)} partition-id()
  %convert = s32[]{:T(128)} convert(%partition-id)
  %constant.269 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.73 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} \
dynamic-slice(%all-reduce.12, %convert, %constant.269), \
dynamic_slice_sizes={512,512}
}

%condition (wide.param.1: (s32[], bf16[1,512,512])) -> pred[] {
  %constant.100 = s32[]{:T(128)} constant(6)
  %wide.param.1 = (s32[]{:T(128)}, bf16[1,512,512]{2,1,0}) parameter(0)
  %gte.391 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  ROOT %lt.10 = pred[]{:T(512)} compare(%gte.391, %constant.100), direction=LT
}

%body (wide.param.4: (s32[], bf16[1,512,512])) -> (s32[], bf16[1,512,512]) {
  %constant.93 = s32[]{:T(128)} constant(1)
  %wide.param.4 = (s32[]{:T(128)}, bf16[1,512,512]{2,1,0}) parameter(0)
  %gte.534 = s32[]{:T(128)} get-tuple-element(%wide.param.4), index=0
  %gte.535 = bf16[1,512,512]{2,1,0} get-tuple-element(%wide.param.4), index=1
  %fusion.1 = (bf16[1,512,512]{2,1,0}, bf16[1,512,1024]{2,1,0}, \
/*index=2*/u32[]{:S(2)}) fusion(%gte.535), kind=kCustom, calls=%start
  %fusion.2 = bf16[1,512,1024]{2,1,0} fusion(%gte.535), kind=kLoop, \
calls=%beside
  %bitcast.1 = bf16[1024,512]{1,0} bitcast(%fusion.2)
  %fusion.79 = bf16[512,512]{1,0:T(8,128)(2,1)S(1)} fusion(%bitcast.1), \
kind=kCustom, calls=%all-reduce-scatter.clone.1
  %bitcast.2 = bf16[1,512,512]{2,1,0} bitcast(%fusion.79)
  %copy.23 = s32[]{:T(128)S(6)} copy(%gte.534)
  %add.78 = s32[]{:T(128)} add(%copy.23, %constant.93)
  ROOT %tuple.57 = (s32[]{:T(128)}, bf16[1,512,512]{2,1,0}) \
tuple(%add.78, %bitcast.2)
}

ENTRY %main.5_spmd (param.5: bf16[1,512,512]) -> bf16[1,512,512] {
  %constant.108 = s32[]{:T(128)} constant(0)
  %param.5 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} parameter(0), \
sharding={devices=[1,2,8]<=[16]}
  %copy.54 = s32[]{:T(128)} copy(%constant.108)
  %permute.1 = (bf16[1,512,512]{2,1,0}, bf16[1,512,512]{2,1,0}, u32[]) \
collective-permute-start(%param.5), channel_id=20, \
source_target_pairs={{0,1},{1,0},{2,3}}
  %permute.2 = bf16[1,512,512]{2,1,0} collective-permute-done(%permute.1)
  %tuple.67 = (s32[]{:T(128)}, bf16[1,512,512]{2,1,0}) \
tuple(%copy.54, %permute.2)
  %while.41 = (s32[]{:T(128)}, bf16[1,512,512]{2,1,0}) while(%tuple.67), \
condition=%condition, body=%body
  ROOT %gte.9 = bf16[1,512,512]{2,1,0} get-tuple-element(%while.41), index=1
}
"""


def test_what_a_tpu_does_beside_other_work_counts_once():
  program = hlo.parse(TPU)
  assert program.num_partitions == 16
  assert not program.unknown_loops
  half = 2 * 512 * 512
  found = by_kind_and_axes(collectives(program, {"fsdp": 2, "heads": 8}))
  assert found == {
    ("all-gather", "fsdp"): 6 * half,
    # A sum of which the device keeps a part.
    ("reduce-scatter", "fsdp"): 6 * half,
    ("collective-permute", "heads"): half,
  }


def test_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no compiled program"):
    hlo.parse("HloModule nothing")
