"""What an engine runs compiles for chips that are not here, by our kernels."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxheads.kvcache.names import make_policy
from jaxheads.kvcache.pages import Pages
from jaxheads.kvcache.policy import CacheShape
from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.serve import programs
from jaxheads.serve.layers import Prompt
from jaxheads.serve.programs import Drawing, Placement, Start, State, Step
from jaxheads.serve.request import SamplingParams
from jaxheads.serve.sampling import Sampling
from jaxheads.serve.state import Rows
from pallas_kernels import platform
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


def state_for(chip, dtype="bfloat16"):
  def make():
    return State(
      Pages.empty(1000, 128, 128, dtype),
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
