"""Checkpoints: the one file that knows Orbax.

A step is written in the background and appears under its final name only when
whole. With it goes a manifest with the checksum of every file, because storage
that returns other bytes than were written must be noticed: what fails the
check is never loaded, the newest older step is.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from jaxheads.data import load_tokenizer
from jaxheads.errors import UserError
from jaxheads.models import DecoderLM, ModelConfig
from jaxheads.models.reorder import is_moved, reorder, source_path
from jaxheads.training import distributed
from jaxheads.training.run_folder import RunFolder, write_json
from jaxheads.training.step import TrainState

_ARRAYS = ("params", "rest", "opt_state")
_ITEMS = (*_ARRAYS, "record")
_MANIFEST = "manifest.json"
_TMP_SUFFIX = ".orbax-checkpoint-tmp"


class BadCheckpoint(Exception):
  """One saved step cannot be used; the message says why, in a few words."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """One saved step, read back.

  Attributes:
    state: The training state as it was after `step` steps.
    record: What `save` was given besides the arrays.
  """

  step: int
  state: TrainState
  record: dict[str, Any]


class Checkpointer:
  """Writes the steps of one run; all processes of a job call it alike.

  Args:
    directory: Made if missing. Remains of interrupted saves are removed.
    keep: Newest steps to keep; the one of lowest validation loss stays too.
  """

  def __init__(self, directory: pathlib.Path, *, keep: int) -> None:
    self._directory = directory.absolute()
    self._keep = keep
    self._pending: tuple[int, float | None] | None = None
    self._failed = False
    with _storage_errors(self._directory):
      self._directory.mkdir(parents=True, exist_ok=True)
      self._remove_partial()
      distributed.everyone(None)  # Nobody looks before that is done.
      self._manager = ocp.CheckpointManager(
        self._directory,
        item_names=_ITEMS,
        options=ocp.CheckpointManagerOptions(
          async_options=ocp.AsyncOptions(
            post_finalization_callback=self._write_manifest
          ),
        ),
      )

  def save(
    self,
    step: int,
    state: TrainState,
    *,
    record: dict[str, Any],
    validation_loss: float | None = None,
  ) -> None:
    """Starts to save; returns once the arrays are copied from the devices.

    Args:
      step: Steps done; no step is saved twice.
      state: May be donated as soon as this returns.
      record: JSON-able: the data position, the model config and the like.
      validation_loss: Ranks the step; None keeps it only while it is new.
    Raises:
      UserError: This save or the one before it could not be written. Steps
        saved earlier are intact.
    """
    self.wait()
    self._pending = (step, validation_loss)
    arrays = {
      name: ocp.args.PyTreeSave(flat)
      for name in _ARRAYS
      if (flat := _flatten(getattr(state, name)))  # Orbax takes no empty item.
    }
    with self._note_failure():
      self._manager.save(
        step,
        args=ocp.args.Composite(record=ocp.args.JsonSave(record), **arrays),
        force=True,
      )

  def wait(self) -> None:
    """Returns when the last save is on disk, and removes what is superseded."""
    with self._note_failure():
      self._manager.wait_until_finished()
      if self._pending is not None:
        self._pending = None
        if jax.process_index() == 0:
          for step in _superseded(self._directory, self._keep):
            self._remove(step)

  def close(self) -> None:
    """Waits, then ends the background threads."""
    try:
      self.wait()
    finally:
      try:
        self._manager.close()
      except Exception:
        if not self._failed:
          raise  # A failed save was told already; Orbax repeats it here.
      if self._failed:
        self._remove_partial()

  def _remove(self, step: int) -> None:
    """By one process alone: Orbax would wait for all, also for dead ones."""
    doomed = self._directory / f"{step}{_TMP_SUFFIX}"
    os.replace(self._directory / str(step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)

  def _remove_partial(self) -> None:
    """Saves that were cut short are of no use, but take up room."""
    if jax.process_index() == 0:
      for partial in self._directory.glob(f"*{_TMP_SUFFIX}"):
        shutil.rmtree(partial, ignore_errors=True)

  @contextlib.contextmanager
  def _note_failure(self) -> Iterator[None]:
    try:
      with _storage_errors(self._directory):
        yield
    except BaseException:
      self._failed = True
      self._pending = None
      raise

  def _write_manifest(self) -> None:
    """Runs in the saving thread when all is written, before the rename.

    Orbax calls it in process 0 only, after all processes have written.
    """
    if self._pending is None:
      return
    step, validation_loss = self._pending
    folder = self._directory / f"{step}{_TMP_SUFFIX}"
    files = {
      str(file.relative_to(folder)): _checksum(file)
      for item in _ITEMS
      for file in sorted((folder / item).rglob("*"))
      if file.is_file()
    }
    write_json(
      folder / _MANIFEST,
      {"step": step, "validation_loss": validation_loss, "files": files},
    )


def saved_steps(directory: pathlib.Path) -> list[int]:
  """Steps that were saved whole, oldest first."""
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in directory.iterdir()
    if path.name.isdigit() and path.is_dir()
  )


def newest_run(runs: pathlib.Path) -> pathlib.Path | None:
  """The run in `runs` that began last, of those with a checkpoint."""
  found = [
    path.parent
    for path in runs.glob("*/config.json")
    if saved_steps(RunFolder(path.parent).checkpoints)
  ]
  # Folder names end in the time of their start.
  return max(found, key=lambda path: path.name.partition("-")[2], default=None)


def best_step(directory: pathlib.Path) -> int | None:
  """The saved step of lowest validation loss, if any was validated."""
  ranked = [
    (manifest["validation_loss"], step)
    for step in saved_steps(directory)
    if (manifest := _read_manifest(directory / str(step))) is not None
    and manifest.get("validation_loss") is not None
  ]
  return min(ranked)[1] if ranked else None


def restore_newest(
  directory: pathlib.Path,
  like: TrainState,
  *,
  model_config: ModelConfig,
  say: Callable[[str], None],
) -> Restored | None:
  """The newest step that can be read; None if nothing was ever saved.

  Steps that cannot be read are told to `say` and moved to `damaged/` beside
  `directory`, so that training can write them anew.

  Args:
    like: Shapes, dtypes and shardings to restore to.
    model_config: The model that `like` belongs to. It may store its heads in
      another order than the one that was saved.
  Raises:
    UserError: Steps were saved and none can be read, or they belong to another
      model.
  """
  directory = directory.absolute()
  bad: list[tuple[int, str]] = []
  for step in reversed(distributed.from_first(lambda: saved_steps(directory))):
    restored, reason = _restore_together(
      directory / str(step), like, model_config
    )
    if restored is None:
      bad.append((step, reason))
      continue
    for bad_step, reason in bad:
      say(
        f"checkpoint {bad_step} cannot be used ({reason}); it was moved to "
        f"{directory.parent / 'damaged'}, continuing from step {step}"
      )
      _set_aside(directory / str(bad_step))
    return restored
  if bad:
    raise UserError(
      f"none of the checkpoints in {directory} can be used (step {bad[0][0]}: "
      f"{bad[0][1]}); start a new run with another `--out`"
    )
  return None


def restore_model(
  run_dir: str | pathlib.Path,
  *,
  step: int | Literal["best"] | None = None,
  say: Callable[[str], None] = print,
) -> tuple[DecoderLM, ModelConfig, Any, int]:
  """The trained model of a run, for sampling and serving.

  Args:
    run_dir: Folder of a run, with config.json and checkpoints/.
    step: A saved step, or "best" for the one of lowest validation loss. None
      takes the newest that can be read.
    say: Told, in one line each, about steps that had to be skipped.
  Returns:
    The model on the default device, its heads in their own order; its config,
    the tokenizer it was trained with, and the step.
  Raises:
    UserError: There is no run or no checkpoint, or the one asked for is
      missing or damaged.
  """
  run = RunFolder(pathlib.Path(run_dir))
  if not run.path.is_dir():
    raise UserError(f"there is no folder {str(run.path)!r}")
  train_config, model_config = run.read_config()
  model_config = dataclasses.replace(model_config, head_orders=())
  directory = run.checkpoints.absolute()
  steps = saved_steps(directory)
  if not steps:
    raise UserError(
      f"{str(run.path)!r} holds no checkpoint yet; train it further with "
      f"`--resume {run.path}`"
    )
  if step == "best":
    step = best_step(directory)
  if step is None:
    candidates = steps[::-1]
  elif step in steps:
    candidates = [step]
  else:
    raise UserError(
      f"`step` must be one of the saved steps {', '.join(map(str, steps))}, "
      f"got {step}"
    )
  tokenizer = load_tokenizer(train_config.tokenizer)
  parts: Any = nnx.split(
    nnx.eval_shape(lambda: DecoderLM(model_config, rngs=nnx.Rngs(0))),
    nnx.Param,
    ...,
  )
  graphdef, params, rest = parts
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  like = {
    "params": _place(nnx.to_pure_dict(params), sharding),
    "rest": _place(nnx.to_pure_dict(rest), sharding),
  }
  reason = ""
  for candidate in candidates:
    folder = directory / str(candidate)
    try:
      _check_files(folder)
      _, saved_config = _check_model(folder, model_config)
      arrays = _restore_arrays(folder, like, saved_config, model_config)
    except BadCheckpoint as error:
      reason = reason or f"step {candidate}: {error}"
      if candidate != candidates[-1]:
        say(f"checkpoint {candidate} cannot be used ({error}); trying an older")
      continue
    model = nnx.merge(graphdef, arrays["params"], arrays["rest"])
    return model, model_config, tokenizer, candidate
  raise UserError(
    f"no checkpoint in {directory} can be used ({reason}); choose another of "
    f"the steps {', '.join(map(str, steps))}, or train again"
  )


def _restore_together(
  folder: pathlib.Path, like: TrainState, model_config: ModelConfig
) -> tuple[Restored | None, str]:
  """The step, or None and why one of the processes cannot use it."""
  # One process reads all files; each of the others only its parts.
  reason = distributed.from_first(lambda: _damage(folder))
  restored = None
  if not reason:
    try:
      restored = _restore(folder, like, model_config)
    except BadCheckpoint as error:
      reason = str(error)
  reason = next(filter(None, distributed.everyone(reason)), "")
  return (None if reason else restored), reason


def _damage(folder: pathlib.Path) -> str:
  """What `_check_files` finds, or ""."""
  try:
    _check_files(folder)
  except BadCheckpoint as error:
    return str(error)
  return ""


def _restore(
  folder: pathlib.Path, like: TrainState, model_config: ModelConfig
) -> Restored:
  record, saved_config = _check_model(folder, model_config)
  arrays = _restore_arrays(
    folder,
    {name: getattr(like, name) for name in _ARRAYS},
    saved_config,
    model_config,
  )
  step = int(folder.name)
  counter = jax.device_put(
    jnp.asarray(step, like.step.dtype), like.step.sharding
  )
  return Restored(
    step=step, state=TrainState(step=counter, **arrays), record=record
  )


def _check_files(folder: pathlib.Path) -> None:
  """`BadCheckpoint` unless every file has the bytes that were written."""
  manifest = _read_manifest(folder)
  if manifest is None:
    raise BadCheckpoint(f"{_MANIFEST} is missing or damaged")
  for name, expected in manifest["files"].items():
    try:
      found = _checksum(folder / name)
    except FileNotFoundError:
      raise BadCheckpoint(f"{name} is missing") from None
    except OSError as error:
      raise BadCheckpoint(f"{name}: {error.strerror}") from None
    if found != expected:
      kind = "truncated" if found["bytes"] < expected["bytes"] else "damaged"
      raise BadCheckpoint(f"{name} is {kind}")


def _check_model(
  folder: pathlib.Path, model_config: ModelConfig
) -> tuple[dict[str, Any], ModelConfig]:
  """The record, and the model it is of.

  Raises:
    UserError: That is another model than `model_config`.
    BadCheckpoint: The record cannot be read.
  """
  try:
    record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(
      folder / "record"
    )
    # Filled up with the defaults of fields that it was written without.
    saved_config = ModelConfig.from_dict(record["model"])
  except Exception as error:
    raise BadCheckpoint(_one_line(error)) from error
  saved, expected = _json(saved_config), _json(model_config)
  # How a model is computed may change between runs, what it is may not.
  free = {"execution", "implementation", "remat", "dtype", "head_orders"}
  differing = [
    f"`{name}` differs"
    if len(f"{saved[name]}{value}") > 200
    else f"`{name}` is {saved[name]} there and {value} here"
    for name, value in expected.items()
    if name not in free and saved[name] != value
  ]
  if differing:
    raise UserError(
      f"the checkpoint {folder} is of another model: {'; '.join(differing)}; "
      "resume without model flags, or start a new run"
    )
  return record, saved_config


def _json(config: ModelConfig) -> dict[str, Any]:
  return json.loads(json.dumps(config.to_dict()))


def _restore_arrays(
  folder: pathlib.Path,
  like: dict[str, Any],
  saved: ModelConfig,
  wanted: ModelConfig,
) -> dict[str, Any]:
  """The trees saved as these items, with the structure and shardings of `like`.

  Args:
    saved: The model of which the items were saved.
    wanted: The model of `like`, which may store its heads in another order.
  Raises:
    BadCheckpoint: They cannot be read, or hold other arrays than `like`.
  """
  flat = _joined({name: _flatten(tree) for name, tree in like.items()})
  before = _as_saved(flat, saved, wanted)
  arrays = _joined(
    {name: _restore_item(folder, name, _of_item(before, name)) for name in like}
  )
  arrays = _moved(arrays, flat, saved, wanted)
  return {
    name: _unflatten(tree, _of_item(arrays, name))
    for name, tree in like.items()
  }


def _as_saved(
  flat: dict[str, Any], saved: ModelConfig, wanted: ModelConfig
) -> dict[str, Any]:
  """What to read so that `_moved` makes `flat` of it: shapes and shardings."""
  if saved.head_orders == wanted.head_orders:
    return flat
  shapes = jax.eval_shape(
    functools.partial(reorder, before=wanted, after=saved), flat
  )
  return {
    path: jax.ShapeDtypeStruct(
      shape.shape,
      shape.dtype,
      sharding=flat[source_path(path, wanted, saved)].sharding,
    )
    for path, shape in shapes.items()
  }


def _moved(
  arrays: dict[str, Any],
  like: dict[str, Any],
  saved: ModelConfig,
  wanted: ModelConfig,
) -> dict[str, Any]:
  """The arrays, heads at the places where `wanted` has them."""
  moving = {k: v for k, v in arrays.items() if is_moved(k, wanted, saved)}
  if not moving:
    return arrays
  staying = {k: v for k, v in arrays.items() if k not in moving}
  move = jax.jit(
    functools.partial(reorder, before=saved, after=wanted),
    donate_argnums=0,
    out_shardings={
      path: array.sharding
      for path, array in like.items()
      if is_moved(path, saved, wanted)
    },
  )
  with warnings.catch_warnings():
    # Where layers go to other stacks, the old ones have other shapes.
    warnings.filterwarnings("ignore", message="Some donated buffers")
    return staying | move(moving)


def _restore_item(
  folder: pathlib.Path, name: str, flat: dict[str, Any]
) -> dict[str, Any]:
  """The arrays of one item, by path."""
  if not flat and not (folder / name).exists():
    return {}
  handler = ocp.PyTreeCheckpointer()
  try:
    saved = handler.metadata(folder / name).item_metadata.tree
    if set(saved) != set(flat):
      other = sorted(set(saved) ^ set(flat))[0]
      raise BadCheckpoint(f"{name} holds other arrays, for example {other!r}")
    for key, array in flat.items():
      if tuple(saved[key].shape) != tuple(array.shape):
        raise BadCheckpoint(
          f"{name} {key!r} has shape {tuple(saved[key].shape)}, expected "
          f"{tuple(array.shape)}"
        )
    arrays = handler.restore(
      folder / name,
      args=ocp.args.PyTreeRestore(
        item=flat,
        restore_args={
          key: ocp.ArrayRestoreArgs(
            sharding=array.sharding,
            dtype=array.dtype,
            global_shape=array.shape,
          )
          for key, array in flat.items()
        },
      ),
    )
  except BadCheckpoint:
    raise
  except Exception as error:
    raise BadCheckpoint(_one_line(error)) from error
  return arrays


def _joined(items: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """Arrays of all items by one path, which begins with the item's name."""
  return {
    f"{name}/{path}": array
    for name, arrays in items.items()
    for path, array in arrays.items()
  }


def _of_item(arrays: dict[str, Any], name: str) -> dict[str, Any]:
  """The inverse of `_joined`, for one item."""
  prefix = f"{name}/"
  return {
    path.removeprefix(prefix): array
    for path, array in arrays.items()
    if path.startswith(prefix)
  }


def _flatten(tree: Any) -> dict[str, Any]:
  """Path to array; random keys as their raw data, which can be stored."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): _raw(leaf)
    for path, leaf in leaves
  }


def _unflatten(like: Any, flat: dict[str, Any]) -> Any:
  leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
  arrays = []
  for path, leaf in leaves:
    array = flat[jax.tree_util.keystr(path, simple=True, separator="/")]
    if _is_key(leaf):
      impl = jax.random.key_impl(leaf) if isinstance(leaf, jax.Array) else None
      array = jax.random.wrap_key_data(array, impl=impl)
    arrays.append(array)
  return jax.tree_util.tree_unflatten(treedef, arrays)


def _is_key(leaf: Any) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Any:
  if not _is_key(leaf):
    return leaf
  if isinstance(leaf, jax.Array):
    return jax.random.key_data(leaf)
  raw = jax.eval_shape(jax.random.key_data, leaf)
  return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=leaf.sharding)


def _place(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def _superseded(directory: pathlib.Path, keep: int) -> list[int]:
  steps = saved_steps(directory)
  kept = {*steps[-keep:], best_step(directory)}
  return [step for step in steps if step not in kept]


def _set_aside(folder: pathlib.Path) -> None:
  """Moves a bad step away; it may still be worth a look."""
  if jax.process_index() != 0:
    return
  target = folder.parent.parent / "damaged" / folder.name
  with _storage_errors(folder):
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    os.replace(folder, target)


def _read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
  try:
    manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  usable = isinstance(manifest, dict) and isinstance(
    manifest.get("files"), dict
  )
  return manifest if usable else None


def _checksum(path: pathlib.Path) -> dict[str, int]:
  crc = size = 0
  with path.open("rb") as file:
    while block := file.read(1 << 20):
      crc = zlib.crc32(block, crc)
      size += len(block)
  return {"bytes": size, "crc32": crc}


def _one_line(error: BaseException) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text if len(text) <= 160 else f"{text[:157]}..."


@contextlib.contextmanager
def _storage_errors(path: pathlib.Path) -> Iterator[None]:
  """Turns a full disk or a forbidden folder into a `UserError`."""
  try:
    yield
  except Exception as error:
    reason = storage_reason(error)
    if reason is None:
      raise
    raise UserError(
      f"the checkpoint could not be written to {path}: {reason}; earlier "
      "checkpoints are intact: make room, then continue with `--resume`"
    ) from error


_REASONS = {
  errno.ENOSPC: "no space left on the disk",
  errno.EDQUOT: "the disk quota is used up",
  errno.EFBIG: "the file size limit is reached",
  errno.EROFS: "the disk is read-only",
  errno.EACCES: "permission denied",
  errno.EPERM: "permission denied",
  errno.EIO: "the disk reports an error",
}


def storage_reason(error: BaseException | None) -> str | None:
  """What storage did wrong, if `error` or one of its causes says so."""
  seen: set[int] = set()
  while error is not None and id(error) not in seen:
    seen.add(id(error))
    if isinstance(error, OSError) and error.errno in _REASONS:
      return _REASONS[error.errno]
    # TensorStore raises ValueError with the system's words in its text.
    for number, reason in _REASONS.items():
      if os.strerror(number) in str(error):
        return reason
    error = error.__cause__ or error.__context__
  return None


def quiet_storage() -> None:
  """For scripts: storage errors reach the user once, in our words.

  Orbax and its threads also print each of them, with tracebacks, some of them
  after the error was told. For the rest of the process.
  """
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  thread_hook, lost_hook = threading.excepthook, sys.unraisablehook

  def in_thread(args: threading.ExceptHookArgs) -> None:
    if storage_reason(args.exc_value) is None:
      thread_hook(args)

  def in_storage(args: Any) -> None:
    # Late answers of TensorStore to a save that has failed already.
    if "Event loop is closed" not in str(args.exc_value):
      lost_hook(args)

  threading.excepthook, sys.unraisablehook = in_thread, in_storage
