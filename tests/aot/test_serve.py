"""What an engine runs compiles for chips that are not here, by our kernels."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import topologies

from jaxheads.kvcache.by_shard import ByShard
from jaxheads.kvcache.names import make_policy
from jaxheads.kvcache.pages import Pages
from jaxheads.kvcache.policy import CacheShape
from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.serve import device, placement, programs
from jaxheads.serve.layers import Prompt
from jaxheads.serve.programs import Drawing, Placement, Start, State, Step
from jaxheads.serve.request import SamplingParams
from jaxheads.serve.sampling import Sampling
from jaxheads.serve.state import Rows
from jaxheads.sharding import MeshShape, make_mesh, shardings
from pallas_kernels import platform
from pallas_kernels.aot import targets
from tests.aot.test_compile import compile_for

pytestmark = pytest.mark.compile

LAYERS, HEADS, SLOTS, LENGTH = 2, 4, 4, 1024
SHAPE = CacheShape(LAYERS, HEADS)
CHIPS = [
  "v5e",
  "sm_90",
  *(
    pytest.param(chip, marks=pytest.mark.exhaustive)
    for chip in ("v4", "v5p", "v6e", "tpu7x", "sm_80", "sm_100")
  ),
]


def ints(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.fixture(scope="module")
def model():
  config = ModelConfig(
    vocab_size=256,
    num_layers=LAYERS,
    embed_dim=256,
    mlp_dim=512,
    num_heads=2 * HEADS,
    num_kv_heads=HEADS,
    head_dim=128,
    max_seq_len=LENGTH,
    head_plans=(None,) * LAYERS,
    dtype="bfloat16",
    param_dtype="bfloat16",
  )
  return nnx.split(nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0))))


def state_for(chip, dtype="bfloat16", num_pages=1000):
  def make():
    return State(
      Pages.empty(num_pages, 128, 128, dtype),
      Rows.empty(SHAPE, SLOTS, LENGTH, 128),
      Drawing.idle(SLOTS, 256),
    )

  with platform.compiling_for("gpu" if chip.startswith("sm") else "tpu"):
    return jax.eval_shape(make)


def compile_program(chip, model, run, state, *args, **static):
  graphdef, variables = model

  def merged(variables, state, *args):
    return run(nnx.merge(graphdef, variables), state, *args, **static)

  return compile_for(chip, merged, variables, state, *args)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_decoding_step(chip, model):
  told = Step(
    ints(SLOTS),
    ints(LAYERS, SLOTS, HEADS),
    ints(LAYERS, SLOTS, HEADS),
    ints(SLOTS),
  )
  state = state_for(chip)
  report = compile_program(
    chip, model, programs.step, state, told, entries=SLOTS * HEADS * 8
  )
  assert any("paged_attention" in kernel for kernel in report.kernels)
  # The pool is not copied.
  assert report.temp_bytes < state.pages.nbytes / 4


@pytest.mark.parametrize("chip", CHIPS)
def test_a_chunk_of_a_prompt(chip, model):
  state = state_for(chip)
  pages = ints(*SHAPE, LENGTH // 128)
  prompt = Prompt(ints(256), ints(), ints(), pages)
  report = compile_program(chip, model, programs.read_on, state, prompt)
  assert any("head_attention" in kernel for kernel in report.kernels)


@pytest.mark.parametrize("chip", CHIPS)
def test_a_whole_prompt(chip, model):
  policy = make_policy("task_kv")
  plan = policy.plan(LENGTH, 0.4, SHAPE)
  state = state_for(chip)
  report = compile_program(
    chip,
    model,
    functools.partial(programs.finish_prompt, policy=policy),
    state,
    Prompt(ints(LENGTH), ints(), ints(), None),
    Start(
      ints(),
      abstract(Sampling.of(SamplingParams())),
      jax.ShapeDtypeStruct((256,), bool),
    ),
    abstract(plan.layers),
    Placement(ints(), ints(*SHAPE, LENGTH // 128), ints(*SHAPE), ints()),
  )
  assert any("head_attention" in kernel for kernel in report.kernels)


# Four devices that share the heads, a KV head each.


def four(chip):
  """A mesh of four such chips."""
  target = targets.find(chip)
  compile_for(chip, lambda x: x, ints())  # Skips without the compiler.
  described = {}
  if target.platform == "gpu":
    text = (targets.GPU_TARGETS / target.target).read_text("utf-8")
    described = {"topology": "1x4x1", "target_config": text}
  topology = topologies.get_topology_desc(
    platform="cuda" if target.platform == "gpu" else "tpu",
    topology_name=target.topology,
    **described,
  )
  return make_mesh(MeshShape(heads=4), list(topology.devices))


def compile_for_four(chip, model, run, *args, **static):
  """The program and its text; checks what must hold of every one."""
  mesh = four(chip)

  def place(tree, where):
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding
      ),
      tree,
      where,
    )

  graphdef, variables = model
  variables = place(variables, shardings(variables, mesh))
  state = state_for(chip, num_pages=4000)
  args = abstract((state, *args))
  leaves, tree = device._sizes(
    (variables, *place(args, placement.shardings(args, mesh)))
  )
  with platform.compiling_for(targets.find(chip).platform):
    compiled = device._compile(
      run, graphdef, leaves, tree, tuple(static.items()), mesh
    )
  # Each chip has its part of the pool, which is not copied.
  pool = state.pages.nbytes / 4
  memory = compiled.memory_analysis()
  assert pool < memory.argument_size_in_bytes < 1.1 * pool
  assert memory.temp_size_in_bytes < pool / 4
  return compiled.as_text()


def exchanged(text):
  """Numbers in the arrays that go from chip to chip."""
  found = re.findall(
    r"= \(?\w+\[([\d,]+)\].* (?:all-|collective-|reduce-)", text
  )
  return [math.prod(map(int, dims.split(","))) for dims in found]


FOUR_CHIPS = [
  "v5e",
  *(
    pytest.param(chip, marks=pytest.mark.exhaustive)
    for chip in ("v5p", "v6e", "sm_90")
  ),
]


@pytest.mark.parametrize("chip", FOUR_CHIPS)
def test_a_decoding_step_of_four_chips(chip, model):
  told = Step(
    ints(SLOTS),
    ints(LAYERS, SLOTS, HEADS),
    ints(LAYERS, SLOTS, HEADS),
    ints(SLOTS),
  )
  text = compile_for_four(chip, model, programs.step, told, entries=SLOTS * 8)
  assert "paged_attention" in text
  # About tokens: no pages, no table of words.
  assert 0 < max(exchanged(text)) <= SLOTS * 256


@pytest.mark.exhaustive
@pytest.mark.parametrize("chip", ["v5e", "sm_90"])
def test_a_prompt_of_four_chips(chip, model):
  policy = ByShard(policy=make_policy("task_kv"), shards=4)
  plan = policy.plan(LENGTH, 0.4, SHAPE)
  rows = ints(*SHAPE, LENGTH // 128)
  text = compile_for_four(
    chip,
    model,
    programs.finish_prompt,
    Prompt(ints(256), ints(), ints(), rows),
    Start(
      ints(),
      abstract(Sampling.of(SamplingParams())),
      jax.ShapeDtypeStruct((256,), bool),
    ),
    abstract(plan.layers),
    Placement(ints(), rows, ints(*SHAPE), ints(), ints(*SHAPE)),
    policy=policy,
  )
  assert "head_attention" in text
  assert 0 < max(exchanged(text)) < 128 * 128 * 8
