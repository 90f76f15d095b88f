"""Asking a model: what counts as an answer, and the heat map."""

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from flax import nnx

from jaxheads.data import (
  EVALUATION_SEED,
  NEEDLE_VOCAB_SIZE,
  NeedleTask,
  Stage,
)
from jaxheads.sharding import MeshShape, make_mesh
from jaxheads.training.retrieval import Retrieval, plot_retrieval
from jaxheads.training.step import TrainState

TASK = NeedleTask(needles=3, questions=2)


class Finder(nnx.Module):
  """Knows how to read: the answer is what stands after the key it asks for.

  Needles that start after `reach` are overlooked, and their last symbol is
  then wrong.
  """

  def __init__(self, reach: int):
    self.reach = nnx.Variable(jnp.int32(reach))

  def __call__(self, tokens, *, deterministic):
    def row(tokens):
      at = tokens.shape[0] - 8  # QRY of the last question.
      matches = (
        (tokens == 2)
        & (jnp.roll(tokens, -1) == tokens[at + 1])
        & (jnp.roll(tokens, -2) == tokens[at + 2])
      )
      start = jnp.argmax(matches)
      values = jax.lax.dynamic_slice(tokens, (start + 4,), (4,))
      wrong = 73 + (values[3] - 73 + 1) % 64
      last = jnp.where(start <= self.reach[...], values[3], wrong)
      values = values.at[3].set(last)
      answer = jnp.concatenate([values, jnp.array([5])])
      logits = jnp.zeros((tokens.shape[0], NEEDLE_VOCAB_SIZE))
      return logits.at[-5:].set(
        20.0 * jax.nn.one_hot(answer, NEEDLE_VOCAB_SIZE)
      )

    return jax.vmap(row)(tokens)


def retrieval(reach):
  graphdef, rest = nnx.split(Finder(reach))
  mesh = make_mesh(MeshShape(data=8))
  state = TrainState(jnp.int32(3), {}, nnx.to_pure_dict(rest), None)
  asked = Retrieval(
    graphdef,
    tokens_per_batch=800,
    mesh=mesh,
    samples=20,
    stage_at=lambda step: Stage(TASK, 50 + step, 1),
  )
  return asked, state


def test_exact_answers_are_counted():
  reach = 40
  asked, state = retrieval(reach)
  starts = [
    NeedleTask(needles=3).draw(90, seed=EVALUATION_SEED, index=index).start
    for index in range(21)
  ]
  expected = np.mean([start <= reach for start in starts])
  assert 0 < expected < 1
  found = asked.ask(state, TASK, 90, samples=21)
  assert found.exact == pytest.approx(expected)
  # One of five tokens is wrong by 20 nats where the answer is.
  assert found.loss == pytest.approx(20 * (1 - expected) / 5, rel=1e-3)


def test_sweep_finds_the_depth_where_the_model_ends():
  asked, state = retrieval(48)
  accuracy = asked.sweep(state, TASK, (60, 90), (0.0, 0.5, 1.0), samples=3)
  np.testing.assert_array_equal(accuracy, [[1, 1, 1], [1, 1, 0]])


def test_validation_asks_at_the_length_of_the_last_step():
  asked, state = retrieval(1000)
  found = asked(state, should_stop=lambda: False)
  assert (found.length, found.exact) == (52, 1.0)
  assert "100 % exact answers at 52 tokens" in str(found)
  assert found.scalars() == {"exact_match": 1.0, "prompt_tokens": 52}
  assert asked(state, should_stop=lambda: True) is None


def test_heat_map_has_a_panel_a_model_and_refuses_other_shapes(tmp_path):
  lengths, depths = (256, 512, 1024), (0.0, 0.5, 1.0)
  good, bad = np.ones((3, 3)), np.zeros((3, 3))
  path = tmp_path / "needle.png"
  plot_retrieval({"one": good}, lengths, depths, path)
  single = matplotlib.image.imread(path)
  plot_retrieval(
    {"one": good, "two": bad}, lengths, depths, path, trained_length=512
  )
  both = matplotlib.image.imread(path)
  assert both.shape[1] > 1.5 * single.shape[1]
  with pytest.raises(ValueError, match="`accuracies.'one'.` must have shape"):
    plot_retrieval({"one": good[:2]}, lengths, depths, path)
