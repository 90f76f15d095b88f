"""Serves a model that `train_moh.py` has trained, over HTTP.

python experiments/serve.py              the newest run in runs/; without any,
                                         trains a small one first
python experiments/serve.py --run runs/NAME --port 9000
python experiments/serve.py --policy snapkv --budget 0.5
python experiments/serve.py --mesh data=2,heads=4
python experiments/serve.py --help       every flag

The API is OpenAI's (`/v1/completions`, `/v1/chat/completions`); the page at `/`
shows what each head keeps. SIGTERM or Ctrl-C finishes what runs and ends.
"""

import dataclasses
import pathlib
import sys
from typing import Any, Literal

from jaxheads.errors import UserError, one_line_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What to serve, where, and in how much memory."""

  run: pathlib.Path | None = None
  """Folder of a run. Default: the newest one in `--runs` with a checkpoint."""
  runs: pathlib.Path = pathlib.Path("runs")
  """Where to look for the newest run, and to train one if there is none."""
  step: int | Literal["best"] | None = None
  """Saved step, or "best" for the lowest validation loss. Default: newest."""
  preset: str = "tiny"
  """What to train if there is no run: tiny (minutes) or smoke (seconds)."""
  host: str = "127.0.0.1"
  """Address to listen at; 0.0.0.0 is every one of this machine."""
  port: int = 8000
  """Port to listen at; 0 takes a free one."""
  policy: str = "task_kv"
  """What heads keep of a prompt: full, streaming, snapkv, task_kv, ..."""
  budget: float = 1.0
  """Fraction of the cache that prompts keep; requests may say otherwise."""
  mesh: str | None = None
  """How devices share the work, such as data=2,heads=4: data are replicas of
  the model, each with its own cache; the devices along heads share the heads of
  one. Default: all devices along data."""
  max_batch: int = 8
  """Sequences that run at once; in each replica."""
  max_waiting: int = 256
  """Requests that wait for them; more get 429."""
  max_length: int | None = None
  """Tokens of prompt and answer. Default: the model's context."""
  pages: int | None = None
  """Pages of the cache; of each replica. Default: room for `--max-batch` full
  caches."""
  page_size: int | None = None
  """Tokens of a page. Default: what suits the machine and the model."""
  chunk: int | None = None
  """Tokens of a prompt to read between two tokens of the others."""
  warm_up: bool = False
  """Compile every program before the first request instead of when needed."""
  body_bytes: int = 1 << 20
  """Size of a request's body; more gets 413."""
  answers: int = 32
  """Answers of one request: prompts times `n`."""
  request_seconds: float = 600.0
  """Time of one request."""
  grace_seconds: float = 30.0
  """Time that running requests have after SIGTERM."""


def note(line: str) -> None:
  """Says what happens."""
  print(line, file=sys.stderr, flush=True)


def find_run(options: Options) -> pathlib.Path:
  """The folder to load, trained first if there is none."""
  from jaxheads.training import newest_run, parse, run_job

  run = options.run or newest_run(options.runs)
  if run is None:
    note(
      f"{options.runs} holds no run with a checkpoint: training the "
      f"{options.preset} preset first"
    )
    request = parse(
      [
        *("--preset", options.preset),
        *("--out", str(default_out(options.runs))),
      ]
    )
    run_job(request)
    run = request.run.path
  return run


def default_out(runs: pathlib.Path) -> pathlib.Path:
  """A folder for a new run."""
  from jaxheads.training import run_folder

  return run_folder.default_path(runs)


def policy_settings(name: str, context: int, theta: float) -> dict[str, Any]:
  """Settings of a policy that suit a model's context.

  Published settings are for thousands of tokens. Shorter contexts get them
  scaled, so that there is something to choose from: at 1,024 tokens a window
  of 16, 4 sinks, 32 recent tokens and 64 that describe a head.
  """
  recent = min(256, max(16, context // 32))
  window = {"window": min(32, recent // 2), "kernel": 5 if recent < 128 else 7}
  expected = {
    "window": min(128, max(16, context // 8)),
    "future": min(512, max(16, context // 4)),
    "theta": theta,
  }
  sinks = min(16, max(4, context // 256))
  settings: dict[str, dict[str, Any]] = {
    "task_kv": {**window, "sinks": sinks, "recent": recent, "top": 2 * recent},
    "snapkv": window,
    "pyramid": window,
    "ada_snapkv": window,
    "ada_pyramid": window,
    "expected": expected,
    "ada_expected": expected,
  }
  return settings.get(name, {})


def mesh_shape(text: str | None, num_devices: int) -> Any:
  """What `--mesh` says; devices that it does not name are replicas."""
  from jaxheads.sharding import parse_mesh

  shape = parse_mesh(text, num_devices)
  named = text or ""
  if "data" not in named and "fsdp" not in named:
    shape = dataclasses.replace(shape, data=shape.fsdp, fsdp=1)
  why = {
    "fsdp": "every turn reads all parameters, and would gather them",
    "context": "a turn has one token of each sequence, nothing to split",
  }
  for axis, reason in why.items():
    size = getattr(shape, axis)
    if size > 1:
      data = shape.data * shape.fsdp * shape.context
      raise UserError(
        f"`--mesh`: {axis} must be 1 to serve, got {size}"
        f"{'' if axis in named else ' (the devices that are left)'}: {reason}; "
        f"the nearest is `--mesh data={data},heads={shape.heads}`"
      )
  return shape


def make_engine(model: Any, options: Options, shape: Any) -> Any:
  """One engine, or several behind one queue."""
  from jaxheads.kvcache import make_policy
  from jaxheads.models import reordered
  from jaxheads.serve.engine import Engine, EngineConfig
  from jaxheads.serve.replicas import Replicas, split
  from jaxheads.sharding import check_heads, make_mesh, placement

  sizes = model.config
  check_heads(sizes.num_heads, sizes.num_kv_heads, shape.heads)
  length = options.max_length or sizes.max_seq_len
  if shape.heads > 1:
    placed = placement.place(sizes, shape.heads, length)
    note(placement.report(placed, shape.heads, length))
    model = reordered(model, placed)
  settings = policy_settings(options.policy, length, sizes.rope_theta)
  policy = make_policy(options.policy, **settings)
  several = shape.data > 1
  config = EngineConfig(
    max_batch=options.max_batch,
    max_length=options.max_length,
    # Replicas have their queue in common, and take what they have slots for.
    max_waiting=options.max_batch if several else options.max_waiting,
    num_pages=options.pages,
    page_size=options.page_size,
    chunk=options.chunk,
  )
  meshes = [None] if shape.size == 1 else split(make_mesh(shape))
  engines = [
    Engine(
      model, policy=policy, budget=options.budget, config=config, mesh=mesh
    )
    for mesh in meshes
  ]
  if not several:
    return engines[0]
  return Replicas(
    engines, capacity=options.max_batch, max_waiting=options.max_waiting
  )


def serve(options: Options) -> int:
  """Loads the model and serves it; the exit status."""
  try:
    from jaxheads.serve import http
  except ImportError as error:
    raise UserError(
      f"the server needs the package {error.name!r}, which is not installed; "
      "install it with: pip install 'jaxheads[serve]'"
    ) from None
  import jax

  from jaxheads.serve.replicas import Replicas
  from jaxheads.training import restore_model

  shape = mesh_shape(options.mesh, jax.device_count())
  run = find_run(options)
  model, config, tokenizer, step = restore_model(
    run, step=options.step, say=note
  )
  length = options.max_length or config.max_seq_len
  try:
    engine = make_engine(model, options, shape)
    limits = http.Limits(
      body_bytes=options.body_bytes,
      answers=options.answers,
      seconds=options.request_seconds,
    )
  except (TypeError, ValueError) as error:
    raise UserError(str(error)) from error
  note(
    f"{run}, step {step}: {config.num_params:,} parameters, policy "
    f"{options.policy}, budget {options.budget:g}, "
    f"{engine.stats().pages_total:,} pages, devices: {shape}"
  )
  if options.warm_up:
    note(f"{engine.warm_up()} programs compiled")
  served = http.Served(
    name=run.resolve().name,
    tokenizer=tokenizer,
    context=length,
    created=int((run / "config.json").stat().st_mtime),
    about={
      "policy": options.policy,
      "budget": options.budget,
      "num_layers": config.num_layers,
      "num_kv_heads": config.num_kv_heads,
    },
  )
  status = http.serve(
    engine,
    served,
    host=options.host,
    port=options.port,
    limits=limits,
    grace_s=options.grace_seconds,
    say=note,
  )
  if isinstance(engine, Replicas):
    engine.close()
  return status


@one_line_errors
def main() -> None:
  import tyro

  options = tyro.cli(
    Options, prog="serve.py", description="Serves a trained model over HTTP."
  )
  sys.exit(serve(options))


if __name__ == "__main__":
  main()
