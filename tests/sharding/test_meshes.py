"""What comes of a training does not depend on the mesh."""

import jax
import numpy as np
import pytest

from tests.sharding import runs

AXES = {"data": (2, 4, 8), "fsdp": (2, 4, 8), "context": (2, 4, 8)}
AXES["heads"] = (2, 4, 8)
QUICK = dict(data=1, fsdp=2, context=2, heads=2)
OTHERS = [
  *({axis: n} for axis, sizes in AXES.items() for n in sizes),
  dict(data=2, fsdp=2, context=2, heads=1),
  dict(context=4, heads=2),
]
MESHES = [
  QUICK,
  *(pytest.param(axes, marks=pytest.mark.exhaustive) for axes in OTHERS),
]


def assert_close(one, other, **tolerance):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(one),
    jax.tree.leaves(other),
    strict=True,
  ):
    name = jax.tree_util.keystr(path)
    np.testing.assert_allclose(a, b, err_msg=name, **tolerance)


def config_for(axes, **changes):
  """As many key-value heads as devices ask for."""
  if axes.get("heads") == 8:
    changes |= dict(num_kv_heads=8, contexts=(None, None, *[runs.EIGHT] * 2))
  return runs.config(**changes)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize(
  "execution",
  ["dispatch", pytest.param("dense", marks=pytest.mark.exhaustive)],
)
def test_gradients_are_those_of_one_device(axes, execution):
  config = config_for(axes, execution=execution)
  one, other = runs.gradients(config), runs.gradients(config, **axes)
  assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_the_loss_curve_is_that_of_one_device(axes):
  config = config_for(axes)
  one, other = runs.trained(config), runs.trained(config, **axes)
  for a, b in zip(one[0], other[0], strict=True):
    for name in ("loss", "aux_loss", "grad_norm"):
      np.testing.assert_allclose(a[name], b[name], rtol=2e-5, err_msg=name)
  np.testing.assert_allclose(one[2], other[2], rtol=2e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize("axes", [QUICK, OTHERS[-2]], ids=str)
def test_accumulation_leaves_the_scale_of_the_loss(axes):
  config = runs.config()
  one = runs.trained(config)[0][0]
  parts = runs.trained(config, accumulate=2, **axes)[0][0]
  np.testing.assert_allclose(one["loss"], parts["loss"], rtol=1e-5)
  # The statistics of a part differ, their scale does not.
  np.testing.assert_allclose(one["aux_loss"], parts["aux_loss"], rtol=0.1)
