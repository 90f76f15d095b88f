"""A plan's own counts against what is known of the model."""

import dataclasses
import re

import pytest

from jaxheads import flops
from jaxheads.planning import chips, plan
from jaxheads.sharding import MeshShape, make_mesh
from jaxheads.training import ModelOptions, OptimizerOptions

CONFIG = ModelOptions(
  preset="tiny",
  router="none",
  num_layers=3,
  embed_dim=256,
  mlp_dim=512,
  num_heads=4,
  num_kv_heads=2,
  head_dim=128,
  max_seq_len=512,
  dtype="bfloat16",
).build(512)


def made(config, **axes):
  found = plan.make_plan(
    config,
    chips.find("v5e:2x2"),
    MeshShape(**axes),
    what="train",
    batch_size=8,
    seq_len=512,
    options=OptimizerOptions(),
  )
  assert isinstance(found, plan.Plan)
  return found


@pytest.mark.compile
def test_a_step_of_a_small_model_counts_what_it_must():
  config = CONFIG
  found = made(config, fsdp=4)
  assert not found.unknown_loops
  # Forward and backward of every product, without attention's own.
  cost = flops.prefill(config, 512)
  products = cost.total_flops - cost.flops["attention"]
  expected = 3 * products * 8 * 512 / 4
  assert found.matmul_flops == pytest.approx(expected, rel=0.02)
  assert found.kernels == {
    "head_attention_forward": 3,
    "head_attention_backward": 3,
  }
  # XLA counts the body of the loop over layers once.
  assert found.xla_flops < found.matmul_flops
  # Gradients are added up over the devices, layer by layer: no exchange holds
  # the matrices of all three.
  assert sum(found.sent_bytes.values()) > config.num_params
  operands = " ".join(each.operand for each in found.collectives)
  assert not re.search(r"\[3,\d+,\d+", operands)
  assert found.memory.arguments["parameters"] == pytest.approx(
    4 * config.num_params / 4, rel=0.01
  )


@pytest.mark.compile
@pytest.mark.exhaustive
def test_recomputation_and_layers_add_their_own():
  config = CONFIG
  plain = made(config, data=4)
  again = made(dataclasses.replace(config, remat=True), data=4)
  assert again.kernels["head_attention_forward"] == 6
  assert again.matmul_flops > 1.2 * plain.matmul_flops


@pytest.mark.compile
def test_a_mesh_may_split_dimensions_of_the_network():
  devices = list(chips.find("v5p:4x4x4").devices)
  mesh = make_mesh(MeshShape(fsdp=8, context=8), devices)
  assert set(mesh.devices.flat) == set(devices)
