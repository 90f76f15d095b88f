"""A checkpoint written under one placement of heads goes on under another."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from jaxheads import s2
from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.moh import MoHConfig
from jaxheads.sharding import shardings
from jaxheads.training import OptimizerOptions, RunFolder, devices, optimizer
from jaxheads.training.checkpoint import (
  Checkpointer,
  restore_model,
  restore_newest,
)
from jaxheads.training.command_line import parse
from jaxheads.training.job import run_job
from jaxheads.training.metrics import read_metrics
from jaxheads.training.step import init_state, make_train_step
from tests.sharding import runs
from tests.training import small

ROUTED = MoHConfig(num_heads=8, num_shared=4, top_k=2)
SHARDED = s2.strided(
  8, block_size=4, local_blocks=2, vertical_stride=2, num_kv_heads=4
)
OWN = ModelConfig(
  vocab_size=runs.VOCAB,
  num_layers=3,
  embed_dim=8,
  mlp_dim=16,
  num_heads=8,
  num_kv_heads=4,
  head_dim=4,
  max_seq_len=runs.LENGTH,
  head_plans=(ROUTED, ROUTED, None),
  contexts=(None, None, SHARDED),
  execution="dense",
)
FIRST = dataclasses.replace(
  OWN,
  head_orders=((0, 1, 4, 5, 2, 3, 6, 7),) * 2 + ((2, 3, 6, 7, 4, 5, 0, 1),),
)
# The two routed layers are stored apart.
PARTED = dataclasses.replace(
  OWN, head_orders=((6, 7, 0, 1, 2, 3, 4, 5), None, None)
)


TRANSFORM = optimizer.build(OptimizerOptions(warmup_steps=0), 100)


def fresh(config, mesh):
  """A graph and its state."""
  return init_state(
    lambda rngs: DecoderLM(config, rngs=rngs), TRANSFORM, seed=0, mesh=mesh
  )


class Training:
  """A model on a mesh, step by step."""

  def __init__(self, config, **axes):
    self.config = config
    self.mesh = runs.mesh_of(**axes)
    with jax.set_mesh(self.mesh):
      graphdef, self.state = fresh(config, self.mesh)
      self.step = make_train_step(
        graphdef, TRANSFORM, aux_weight=0.1, like=self.state
      )

  def losses(self, first, last):
    found = []
    with jax.set_mesh(self.mesh):
      for number in range(first, last):
        batch = devices.put_batch(self.mesh, runs.batch(number))
        self.state, metrics = self.step(self.state, batch)
        found.append([float(metrics[k]) for k in ("loss", "aux_loss")])
    return found

  def save(self, directory, step):
    checkpointer = Checkpointer(directory, keep=1)
    record = {"model": self.config.to_dict(), "data": {}}
    checkpointer.save(step, self.state, record=record)
    checkpointer.close()

  def restore(self, directory):
    restored = restore_newest(
      directory, self.state, model_config=self.config, say=print
    )
    for leaf, like in zip(
      jax.tree.leaves(restored.state), jax.tree.leaves(self.state), strict=True
    ):
      assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
    self.state = restored.state


@pytest.fixture(scope="module")
def own():
  """A run in the heads' own order, and the losses of its four steps."""
  training = Training(OWN)
  return training, training.losses(0, 4)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run under `FIRST`, two steps of it saved: folder, losses, state."""
  run = RunFolder(tmp_path_factory.mktemp("run") / "run")
  run.create(small.config(), OWN)
  training = Training(FIRST, heads=2)
  losses = training.losses(0, 2)
  training.save(run.checkpoints, 2)
  return run, losses, training.state


def test_a_placement_changes_no_loss(own, saved):
  np.testing.assert_allclose(saved[1], own[1][:2], rtol=2e-5)


def test_training_goes_on_in_their_own_order(own, saved):
  training, losses = own
  training.restore(saved[0].checkpoints)
  np.testing.assert_allclose(training.losses(2, 4), losses[2:], rtol=2e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("config", "axes"),
  [
    (OWN, {"fsdp": 2}),
    (FIRST, {"heads": 4}),
    (PARTED, {"fsdp": 2, "heads": 2}),
  ],
  ids=["own", "same", "parted"],
)
def test_training_goes_on_under_any_placement(config, axes, own, saved):
  training = Training(config, **axes)
  training.restore(saved[0].checkpoints)
  np.testing.assert_allclose(training.losses(2, 4), own[1][2:], rtol=2e-5)


def test_a_model_for_serving_has_its_heads_in_their_own_order(own, saved):
  model, config, _, step = restore_model(saved[0].path)
  assert (config, step) == (OWN, 2)
  assert model.config == OWN
  own[0].restore(saved[0].checkpoints)
  for a, b in zip(
    jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))),
    jax.tree.leaves(own[0].state.params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


def attention(state, stack):
  """Of one stack, the parameters and what Adam keeps of them."""
  adam = state.opt_state[1][0]
  for tree in (state.params, adam.mu, adam.nu):
    yield jax.device_get(tree["stacks"][stack]["attention"])


def test_parameters_and_what_optimizers_keep_of_them_move(own, saved):
  own[0].restore(saved[0].checkpoints)
  for stack, groups in enumerate(((0, 2, 1, 3), (1, 3, 2, 0))):
    heads = [2 * group + index for group in groups for index in (0, 1)]
    for there, here in zip(
      attention(saved[2], stack), attention(own[0].state, stack), strict=True
    ):
      for name, order, axis in (
        ("query", heads, 2),
        ("key", groups, 2),
        ("value", groups, 2),
        ("out", heads, 1),
      ):
        expected = np.take(here[name]["kernel"], order, axis)
        np.testing.assert_array_equal(there[name]["kernel"], expected)
        assert not np.array_equal(there[name]["kernel"], here[name]["kernel"])
      if stack == 0:
        np.testing.assert_array_equal(
          there["router_routed"], here["router_routed"]
        )


def test_layers_that_are_alike_no_more_get_stacks_of_their_own(own, saved):
  own[0].restore(saved[0].checkpoints)
  mesh = runs.mesh_of(fsdp=2, heads=2)
  like = jax.eval_shape(lambda: fresh(PARTED, mesh)[1])
  like = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    like,
    shardings(like, mesh),
  )
  restored = restore_newest(
    saved[0].checkpoints, like, model_config=PARTED, say=print
  )
  for leaf, expected in zip(
    jax.tree.leaves(restored.state), jax.tree.leaves(like), strict=True
  ):
    assert leaf.shape == expected.shape
    assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)
  layers = zip(
    attention(restored.state, 0),
    attention(restored.state, 1),
    attention(own[0].state, 0),
    strict=True,
  )
  for first, second, both in layers:
    for name, axis in (("query", 1), ("out", 0)):
      kernel = both[name]["kernel"]
      expected = np.take(kernel[0], PARTED.head_orders[0], axis)
      np.testing.assert_array_equal(first[name]["kernel"], expected[None])
      np.testing.assert_array_equal(second[name]["kernel"], kernel[1:])
    router = np.concatenate([first["router_kind"], second["router_kind"]])
    np.testing.assert_array_equal(router, both["router_kind"])


@pytest.mark.exhaustive
def test_a_job_deals_the_heads_and_another_mesh_deals_them_anew(
  tmp_path, capsys
):
  flags = (
    "--preset smoke --steps 4 --checkpoint.every 2 --evaluation.every 4 "
    "--evaluation.sample-tokens 0 --model.num-heads 8 --model.num-kv-heads 4 "
    f"--model.shared 4 --model.top-k 2 --data {small.TEXT}"
  ).split()
  alone, moved = tmp_path / "alone", tmp_path / "moved"
  run_job(parse([*flags, "--out", str(alone)]))
  assert "placement" not in capsys.readouterr().out
  run_job(parse([*flags, "--out", str(moved), "--mesh", "heads=2"]))
  assert "placement  heads over 2 devices" in capsys.readouterr().out
  shutil.rmtree(moved / "checkpoints" / "4")
  run_job(parse(["--resume", str(moved), "--mesh", "heads=4"]))
  assert "MoH layers 1.33x -> 1.33x" in capsys.readouterr().out
  expected, found = (
    [
      record["loss"]
      for record in read_metrics(folder / "metrics.jsonl")
      if "loss" in record
    ]
    for folder in (alone, moved)
  )
  assert len(expected) == 4
  np.testing.assert_allclose(found, expected, rtol=2e-5)
