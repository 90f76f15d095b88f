"""What comes of a training does not depend on the mesh."""

import jax
import numpy as np
import pytest

from jaxheads.models import DecoderLM, ModelConfig
from tests.sharding import runs

AXES = ("data", "fsdp", "context", "heads")
ALONE = [{axis: n} for axis in AXES for n in (2, 4, 8) if (axis, n) != ("heads", 8)]
TOGETHER = [
  dict(data=2, fsdp=2, context=2, heads=1),
  dict(data=1, fsdp=2, context=2, heads=2),
]


@pytest.mark.parametrize("axes", [*ALONE, *TOGETHER], ids=str)
@pytest.mark.parametrize("execution", ["dense", "dispatch"])
def test_all(axes, execution):
  config = runs.config(execution=execution)
  one, other = runs.gradients(config), runs.gradients(config, **axes)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=2e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path)
    )
