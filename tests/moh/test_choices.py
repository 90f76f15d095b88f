"""What is chosen for a caller is visible, explained, and can be forced."""

import logging

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxheads import s2
from jaxheads.moh import MoHConfig, explain_execution, moh_attention
from jaxheads.nn import HeadAttention
from pallas_kernels import notices, platform

N, D = 4, 8
PLAN = MoHConfig(num_heads=N, num_shared=1, top_k=2)


@pytest.fixture
def lines(caplog):
  """What was logged, as text; nothing was told before."""
  notices._tell.cache_clear()
  caplog.set_level(logging.INFO, "jaxheads")
  return lambda: [
    record.getMessage()
    for record in caplog.records
    if record.name == "jaxheads"
  ]


def trace(length, *, calls=1, moh=PLAN, **options):
  """Runs nothing: choices are made while tracing."""

  @jax.make_jaxpr
  def layer(x):
    module = HeadAttention(
      N, D, moh=moh, decode=False, rngs=nnx.Rngs(0), **options
    )
    return module(x, is_causal=True, deterministic=False)

  for _ in range(calls):
    layer(jnp.zeros((2, length, D)))


def test_a_choice_is_logged_once_with_its_reason_and_the_way_to_force_it(lines):
  trace(300, calls=2)
  execution, implementation = lines()
  assert execution == (
    "HeadAttention on cpu, 2 x 300 queries and 300 keys: execution 'dispatch', "
    "because from 256 queries on it is the faster one on a CPU. `execution=` "
    "takes the other one."
  )
  assert implementation.startswith(
    "routed_attention on cpu: implementation 'xla', because 'mosaic_tpu' does "
    "not cover this: it needs a TPU"
  )
  assert implementation.endswith("`implementation=` takes another one.")
  trace(20)
  (short,) = lines()[2:]
  assert "2 x 20 queries" in short
  assert "execution 'dense', because below 256" in short


def test_what_was_asked_for_is_not_logged(lines):
  trace(300, execution="dispatch", implementation="xla")
  trace(300, execution="dense")
  assert lines() == []


def test_dispatch_that_was_asked_for_and_cannot_be_had_is_logged(lines):
  trace(20, execution="dispatch", dropout_rate=0.1)
  (line,) = lines()
  assert "execution 'dense', because `dropout_rate` above 0" in line
  assert line.endswith("'dispatch' was asked for.")


def test_a_choice_made_while_nobody_listens_is_told_later(lines, caplog):
  caplog.set_level(logging.WARNING, "jaxheads")
  trace(20)
  assert lines() == []
  caplog.set_level(logging.INFO, "jaxheads")
  trace(20)
  assert len(lines()) == 1


def test_moh_attention_and_attention_tell_theirs(lines):
  x, k = jnp.zeros((1, 20, D)), jnp.zeros((1, 30, N, 2))
  weights = {"w_q": jnp.zeros((D, N, 2)), "w_o": jnp.zeros((N, 2, D))}
  jax.make_jaxpr(
    lambda: moh_attention(x, k, k, routing=None, num_active=N, **weights)
  )()
  (line,) = lines()
  assert line.startswith("moh_attention on cpu, 1 x 20 queries and 30 keys: ")
  pattern = s2.strided(N, block_size=4, local_blocks=2, vertical_stride=2)
  trace(20, moh=None, pattern=pattern)
  (line,) = lines()[1:]
  assert line.startswith("head_attention on cpu: implementation 'xla', because")


def test_explanations_name_the_length_and_the_platform():
  assert explain_execution(255).execution == "dense"
  assert explain_execution(256).execution == "dispatch"
  assert explain_execution(2047, has_pattern=True).execution == "dense"
  assert explain_execution(2048, has_pattern=True).execution == "dispatch"
  forced = explain_execution(1, execution="dispatch")
  assert forced == ("dispatch", "it was asked for")
  with platform.compiling_for("tpu"):
    chosen = explain_execution(4096)
  assert chosen == ("dense", "which one is faster was measured on CPUs only")
