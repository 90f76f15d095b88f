import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxheads import s2
from jaxheads.errors import UserError
from jaxheads.training import checkpoint
from jaxheads.training.checkpoint import Checkpointer, restore_newest
from jaxheads.training.step import TrainState
from tests.training import small

MODEL = small.config().model.build(257)


def state_of(step: int) -> TrainState:
  """Recognisable values; a random key and a whole number among them."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = TrainState(
    step=jnp.asarray(step, jnp.int32),
    params={"stacks": {0: {"kernel": jnp.full((8, 4), float(step))}}},
    rest={"rngs": {"key": jax.random.key(step)}},
    opt_state=(jnp.asarray(step, jnp.int32), {"mu": jnp.full((4,), -1.0)}),
  )
  return jax.device_put(state, sharding)


def save(directory, losses, *, keep=10, **kwargs):
  """Saves steps 1, 2, ... with these validation losses."""
  checkpointer = Checkpointer(directory, keep=keep)
  for step, loss in enumerate(losses, start=1):
    checkpointer.save(
      step,
      state_of(step),
      record={"model": MODEL.to_dict(), "data": {"next": 10 * step}, **kwargs},
      validation_loss=loss,
    )
  checkpointer.close()


def restore(directory, said=None, *, model=MODEL):
  said = [] if said is None else said
  return restore_newest(
    directory, state_of(0), model_config=model, say=said.append
  )


def assert_step(restored, step):
  assert restored.step == step
  assert restored.record["data"] == {"next": 10 * step}
  for a, b in zip(
    jax.tree.leaves(restored.state),
    jax.tree.leaves(state_of(step)),
    strict=True,
  ):
    assert a.dtype == b.dtype
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)


def test_everything_comes_back(tmp_path):
  save(tmp_path / "c", [2.0, 1.0])
  assert_step(restore(tmp_path / "c"), 2)


def test_nothing_saved_yet(tmp_path):
  assert restore(tmp_path / "c") is None


def test_newest_and_best_are_kept_also_after_a_restart(tmp_path):
  directory = tmp_path / "c"
  save(directory, [3.0, 1.0, 2.0, None, 2.5], keep=2)
  assert checkpoint.saved_steps(directory) == [2, 4, 5]
  checkpointer = Checkpointer(directory, keep=2)
  checkpointer.save(
    6, state_of(6), record={"model": MODEL.to_dict(), "data": {}}
  )
  checkpointer.close()
  assert checkpoint.saved_steps(directory) == [2, 5, 6]
  assert checkpoint.best_step(directory) == 2


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
  bump = jax.jit(
    lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0
  )
  checkpointer = Checkpointer(tmp_path / "c", keep=1)
  params = {"w": jnp.zeros((512, 512))}
  state = dataclasses.replace(state_of(1), params=params)
  checkpointer.save(1, state, record={"model": MODEL.to_dict()})
  for _ in range(3):
    params = bump(params)
  checkpointer.close()
  like = dataclasses.replace(state_of(0), params=params)
  restored = restore_newest(tmp_path / "c", like, model_config=MODEL, say=print)
  np.testing.assert_array_equal(restored.state.params["w"], 0.0)


def largest_file(folder):
  files = [path for path in folder.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


def remove(path):
  path.unlink()


@pytest.mark.parametrize("item", ["params", "opt_state", "record"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, remove])
def test_damage_is_noticed_and_the_older_step_used(tmp_path, item, damage):
  directory = tmp_path / "c"
  save(directory, [2.0, 1.0])
  damage(largest_file(directory / "2" / item))
  said = []
  assert_step(restore(directory, said), 1)
  (message,) = said
  assert "checkpoint 2 cannot be used" in message
  assert "continuing from step 1" in message
  assert checkpoint.saved_steps(directory) == [1]
  assert (tmp_path / "damaged" / "2").is_dir()


def test_a_step_without_its_manifest_is_not_trusted(tmp_path):
  directory = tmp_path / "c"
  save(directory, [2.0, 1.0])
  (directory / "2" / "manifest.json").unlink()
  assert_step(restore(directory), 1)


def test_only_damaged_steps_are_an_error_not_a_new_start(tmp_path):
  directory = tmp_path / "c"
  save(directory, [2.0])
  truncate(largest_file(directory / "1" / "params"))
  with pytest.raises(UserError, match="none of the checkpoints.*truncated"):
    restore(directory)
  assert checkpoint.saved_steps(directory) == [1]


def test_another_model_is_named_field_by_field(tmp_path):
  save(tmp_path / "c", [2.0])
  other = dataclasses.replace(MODEL, mlp_dim=100)
  with pytest.raises(
    UserError, match="another model: `mlp_dim` is 64 there and 100 here"
  ):
    restore(tmp_path / "c", model=other)


def test_execution_may_change_between_runs(tmp_path):
  save(tmp_path / "c", [2.0])
  other = dataclasses.replace(MODEL, execution="dense", remat=True)
  assert_step(restore(tmp_path / "c", model=other), 1)


def test_remains_of_an_interrupted_save_are_removed(tmp_path):
  directory = tmp_path / "c"
  save(directory, [2.0])
  (directory / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
  Checkpointer(directory, keep=1).close()
  assert [path.name for path in directory.iterdir()] == ["1"]
  assert_step(restore(directory), 1)


def test_a_full_disk_leaves_the_earlier_steps(tmp_path, monkeypatch):
  directory = tmp_path / "c"
  checkpointer = Checkpointer(directory, keep=1)
  record = {"model": MODEL.to_dict(), "data": {"next": 10}}
  checkpointer.save(1, state_of(1), record=record)
  checkpointer.wait()

  def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(checkpoint, "write_json", full)
  checkpointer.save(2, state_of(2), record=record)
  with pytest.raises(
    UserError, match="no space left on the disk; earlier.*--resume"
  ):
    checkpointer.wait()
  checkpointer.close()
  assert [path.name for path in directory.iterdir()] == ["1"]
  assert_step(restore(directory), 1)


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "c").write_text("a file is in the way")
  with pytest.raises((UserError, FileExistsError)):
    Checkpointer(tmp_path / "c", keep=1)


def test_the_manifest_names_every_array_file(tmp_path):
  save(tmp_path / "c", [2.0])
  folder = tmp_path / "c" / "1"
  manifest = json.loads((folder / "manifest.json").read_text())
  assert manifest["step"] == 1
  for item in ("params", "rest", "opt_state", "record"):
    data = {
      str(path.relative_to(folder))
      for path in (folder / item).rglob("*")
      if path.is_file() and path.name != "commit_success.txt"
    }
    assert data
    assert data <= set(manifest["files"])


def test_a_checkpoint_from_before_contexts_is_of_the_same_model(tmp_path):
  directory = tmp_path / "c"
  fields = MODEL.to_dict()
  del fields["contexts"]
  checkpointer = Checkpointer(directory, keep=1)
  checkpointer.save(
    1, state_of(1), record={"model": fields, "data": {"next": 10}}
  )
  checkpointer.close()
  assert_step(restore(directory), 1)


def test_other_contexts_are_another_model(tmp_path):
  save(tmp_path / "c", [2.0])
  other = dataclasses.replace(
    MODEL,
    contexts=(s2.dense(MODEL.num_heads, block_size=4),) * MODEL.num_layers,
  )
  with pytest.raises(UserError, match="another model: `contexts`"):
    restore(tmp_path / "c", model=other)
