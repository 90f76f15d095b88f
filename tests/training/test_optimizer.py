import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxheads.models import DecoderLM
from jaxheads.training import OptimizerOptions, losses, optimizer
from tests.training import small


def test_schedule_rises_then_falls_to_its_end():
  options = OptimizerOptions(
    learning_rate=1.0, warmup_steps=4, final_fraction=0.1
  )
  rates = np.array([optimizer.schedule(options, 20)(t) for t in range(21)])
  assert 0 < rates[0] < rates[1] < rates[3] < rates[4] == 1.0
  assert (np.diff(rates[4:]) < 0).all()
  np.testing.assert_allclose(rates[20], 0.1, rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_shorter_than_its_warm_up_still_learns(steps):
  schedule = optimizer.schedule(OptimizerOptions(warmup_steps=50), steps)
  assert all(0 < schedule(step) <= 3e-3 for step in range(steps))


def test_weight_decay_reaches_matrices_only():
  model_config = small.config().model.build(257)
  model = nnx.eval_shape(lambda: DecoderLM(model_config, rngs=nnx.Rngs(0)))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  mask = optimizer.decay_mask(params)
  decayed, spared = set(), set()
  for path, decays in jax.tree_util.tree_leaves_with_path(mask):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    (decayed if decays else spared).add(name)
  assert spared == {
    "norm/scale",
    "stacks/0/attention_norm/scale",
    "stacks/0/mlp_norm/scale",
  }
  assert "embedding/embedding" in decayed
  assert any("router" in name for name in decayed)


def test_zero_gradients_only_decay():
  params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones((3, 2))}
  transform = optimizer.build(
    OptimizerOptions(learning_rate=0.5, warmup_steps=0, weight_decay=0.1), 10
  )
  updates, _ = transform.update(
    jax.tree.map(jnp.zeros_like, params), transform.init(params), params
  )
  np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates["scale"], 0.0)


def test_loss_is_the_mean_over_valid_tokens():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
  targets = rng.integers(0, 5, (2, 3)).astype(np.int32)
  mask = np.array([[True, True, False], [False, True, False]])
  expected = 0.0
  for row, column in ((0, 0), (0, 1), (1, 1)):
    scores = logits[row, column].astype(np.float64)
    log_sum = np.log(np.exp(scores).sum())
    expected += (log_sum - scores[targets[row, column]]) / 3
  loss = losses.loss_fn(jnp.array(logits), jnp.array(targets), jnp.array(mask))
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_loss_without_valid_tokens_is_zero():
  loss = losses.loss_fn(
    jnp.ones((1, 2, 3)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), bool)
  )
  assert loss == 0.0
