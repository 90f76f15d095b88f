import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxheads.errors import UserError
from jaxheads.models import DecoderLM
from jaxheads.sharding import MeshShape, make_mesh
from jaxheads.training import OptimizerOptions, devices, optimizer
from jaxheads.training.step import init_state, make_eval_step, make_train_step
from tests.training import small

BATCH, LENGTH, STEPS = 16, 16, 3


def batches(*, equal_rows: bool):
  """Random tokens; the last row is empty, as in a batch that is not full."""
  rng = np.random.default_rng(0)
  result = []
  for _ in range(STEPS):
    window = rng.integers(0, 257, (BATCH, LENGTH + 1), np.int32)
    if equal_rows:
      window = np.repeat(window[:1], BATCH, axis=0)
    mask = np.ones((BATCH, LENGTH), bool)
    mask[-1] = False
    result.append(
      {"tokens": window[:, :-1], "targets": window[:, 1:], "mask": mask}
    )
  return result


@functools.cache
def trained(num_devices, accumulate=1, aux_weight=0.01, **options):
  """By `equal_rows`: metrics of each step, last state, its validation loss."""
  model = dataclasses.replace(small.config().model, **options)
  model_config = model.build(257)
  mesh = make_mesh(MeshShape(data=num_devices), jax.devices()[:num_devices])
  transform = optimizer.build(OptimizerOptions(warmup_steps=0), 100)
  results = {}
  with jax.set_mesh(mesh):
    graphdef, fresh = init_state(
      lambda rngs: DecoderLM(model_config, rngs=rngs),
      transform,
      seed=0,
      mesh=mesh,
    )
    step = make_train_step(
      graphdef,
      transform,
      aux_weight=aux_weight,
      accumulate=accumulate,
      like=fresh,
    )
    evaluate = make_eval_step(graphdef)
    for equal_rows in (False, True):
      state = jax.tree.map(jax.numpy.copy, fresh)
      history = []
      for batch in batches(equal_rows=equal_rows):
        placed = devices.put_batch(mesh, batch)
        state, metrics = step(state, placed)
        history.append(jax.device_get(metrics))
      nats, count = evaluate(state.params, state.rest, placed)
      results[equal_rows] = history, state, float(nats / count)
    assert step._cache_size() == 1
  return results


def assert_same_run(one, other):
  for a, b in zip(one[0], other[0], strict=True):
    assert set(a) == {"loss", "aux_loss", "grad_norm"}
    for name in a:
      np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
  np.testing.assert_allclose(one[2], other[2], rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one():
  one, eight = trained(1)[False], trained(8)[False]
  assert_same_run(one, eight)
  for leaf in jax.tree.leaves(eight[1].params):
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 8


def test_accumulation_changes_nothing_where_parts_are_alike():
  # Equal rows give each part the balance statistics of the whole batch. The
  # parts have unequal numbers of valid tokens all the same.
  assert_same_run(trained(1)[True], trained(1, 2)[True])


@pytest.mark.slow
@pytest.mark.parametrize(
  "implementation",
  ["xla", pytest.param("reference", marks=pytest.mark.exhaustive)],
)
def test_dispatch_trains_as_dense_execution_does(implementation):
  dense = trained(1)[False]
  dispatched = trained(1, execution="dispatch", implementation=implementation)[
    False
  ]
  assert_same_run(dense, dispatched)


def test_accumulation_keeps_the_task_loss_of_any_batch():
  whole, parts = trained(1)[False][0][0], trained(1, 2)[False][0][0]
  np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-6)
  np.testing.assert_allclose(whole["aux_loss"], parts["aux_loss"], rtol=0.05)


def test_the_task_loss_falls_and_steps_are_counted():
  history, state, validation = trained(1)[True]
  assert int(state.step) == STEPS
  assert 0 < validation < history[0]["loss"]
  assert history[0]["aux_loss"] > 0


@pytest.mark.parametrize(
  ("batch_size", "accumulate", "nearest"), [(7, 1, 8), (18, 1, 16), (8, 2, 16)]
)
def test_batch_that_devices_cannot_share(batch_size, accumulate, nearest):
  mesh = make_mesh(MeshShape(data=8))
  with pytest.raises(
    UserError, match=f"8.*got {batch_size}; the nearest is {nearest}"
  ):
    devices.check_batch_size(batch_size, mesh, accumulate=accumulate)
