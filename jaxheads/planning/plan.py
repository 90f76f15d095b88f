"""A plan: a real program, compiled for a slice of chips that is not here."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Literal

import jax

from jaxheads import flops
from jaxheads.errors import UserError
from jaxheads.models import ModelConfig
from jaxheads.planning import counts, hlo, memory, programs
from jaxheads.planning.chips import Topology
from jaxheads.planning.collectives import (
  Collective,
  by_kind_and_axes,
  collectives,
)
from jaxheads.planning.roofline import Roofline, roofline
from jaxheads.sharding import MeshShape, check_heads, make_mesh
from jaxheads.training import OptimizerOptions, exchange
from pallas_kernels import platform
from pallas_kernels.aot import DoesNotCompile
from pallas_kernels.aot.compile import short_reason

What = Literal["train", "prefill", "decode"]

# A tile of the backward kernel takes five products, of the forward kernel two.
_BACKWARD = 2.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a program needs that fits.

  Attributes:
    memory: Bytes of one device.
    collectives: What devices exchange.
    model_flops: That the model asks for, exactly, on all devices together:
      heads that a token does not use count nothing, and nothing is computed
      twice. `jaxheads.flops`.
    matmul_flops: Of the compiled program's matrix products, on one device.
    kernel_flops: Of its attention kernels, on one device: all heads over all
      keys they see, forward as often as it runs.
    xla_flops: What XLA itself says of one device: bodies of loops once, no
      kernels.
    hbm_bytes: Read and written by one device, at the least.
    kernels: Kernels written by hand, and how often one device runs each.
    unknown_loops: Loops that count once because nobody knows their turns.
    roofline: Seconds at the least.
    compile_seconds: Time to trace and compile.
  """

  memory: memory.Memory
  collectives: tuple[Collective, ...]
  model_flops: float
  matmul_flops: float
  kernel_flops: float
  xla_flops: float
  hbm_bytes: float
  kernels: Mapping[str, int]
  unknown_loops: tuple[str, ...]
  roofline: Roofline
  compile_seconds: float

  @property
  def sent_bytes(self) -> dict[tuple[str, str], float]:
    """By kind of exchange and mesh axes, of one device."""
    return by_kind_and_axes(self.collectives)


def check(
  config: ModelConfig,
  shape: MeshShape,
  *,
  batch_size: int,
  seq_len: int,
  accumulate: int = 1,
) -> None:
  """`UserError` unless the mesh splits heads, sequences and tokens evenly."""
  check_heads(config.num_heads, config.num_kv_heads, shape.heads)
  parts = shape.data * shape.fsdp * accumulate
  if batch_size % parts:
    nearest = max(1, round(batch_size / parts)) * parts
    raise UserError(
      f"`--batch` must be a multiple of data x fsdp"
      f"{' x accumulate' if accumulate > 1 else ''} = {parts}, got "
      f"{batch_size}; the nearest is {nearest}"
    )
  if shape.context > 1:
    exchange.of_model(config, shape, batch_size=batch_size, seq_len=seq_len)


def make_plan(
  config: ModelConfig,
  topology: Topology,
  shape: MeshShape,
  *,
  what: What,
  batch_size: int,
  seq_len: int,
  options: OptimizerOptions,
) -> Plan | memory.TooLarge:
  """Compiles a program of the model for `topology`, and counts.

  Args:
    config: The model.
    topology: What it is to run on.
    shape: How its devices share the work.
    what: A training step, the reading of a prompt, or the next token.
    batch_size: Sequences, on all devices together.
    seq_len: Tokens of each; when decoding, slots of the cache.
    options: Of the training step.
  Raises:
    UserError: The sizes do not split.
    DoesNotCompile: For another reason than memory.
  """
  check(
    config,
    shape,
    batch_size=batch_size,
    seq_len=seq_len,
    accumulate=options.accumulate if what == "train" else 1,
  )
  mesh = make_mesh(shape, list(topology.devices))
  sizes = {"batch_size": batch_size, "seq_len": seq_len}
  start = time.perf_counter()
  with (
    platform.compiling_for("tpu"),
    # Tells kernels which chip it is, and the model how it is split.
    jax.sharding.use_abstract_mesh(mesh.abstract_mesh),
  ):
    if what == "train":
      planned = programs.train_step(config, mesh, options=options, **sizes)
    else:
      make = {"prefill": programs.prefill, "decode": programs.decode}[what]
      planned = make(config, mesh, **sizes)
    traced = planned.function.trace(*planned.arguments, **planned.keywords)
    try:
      compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    except RuntimeError as error:
      found = memory.too_large(str(error), planned.parts)
      if found is None:
        raise DoesNotCompile(short_reason(str(error))) from error
      return found
  seconds = time.perf_counter() - start
  program = hlo.parse(compiled.as_text())
  exchanged = collectives(program, dict(mesh.shape))
  kernels = counts.kernels(program)
  matmul_flops = counts.matmul_flops(program)
  kernel_flops = (
    _attention_flops(config, what, batch_size, seq_len) / shape.size
    if kernels
    else 0.0
  )
  model_flops = _model_flops(config, what, batch_size, seq_len)
  hbm_bytes = counts.hbm_bytes(program)
  return Plan(
    memory=memory.measure(compiled, planned.parts),
    collectives=exchanged,
    model_flops=model_flops,
    matmul_flops=matmul_flops,
    kernel_flops=kernel_flops,
    xla_flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
    hbm_bytes=hbm_bytes,
    kernels=kernels,
    unknown_loops=program.unknown_loops,
    roofline=roofline(
      topology,
      mesh,
      # Products with a single row are none for the compiler.
      flops=max(matmul_flops + kernel_flops, model_flops / shape.size),
      hbm_bytes=hbm_bytes,
      collectives=exchanged,
    ),
    compile_seconds=seconds,
  )


def _model_flops(
  config: ModelConfig, what: What, batch_size: int, seq_len: int
) -> float:
  if what == "decode":
    return flops.decode(config, seq_len).total_flops * batch_size
  forward = flops.prefill(config, seq_len).total_flops * batch_size * seq_len
  return 3 * forward if what == "train" else forward


def _attention_flops(
  config: ModelConfig, what: What, batch_size: int, seq_len: int
) -> float:
  """Of attention with all heads on, as it runs."""
  every = dataclasses.replace(config, head_plans=(None,) * config.num_layers)
  if what == "decode":
    return flops.decode(every, seq_len).flops["attention"] * batch_size
  forward = flops.prefill(every, seq_len).flops["attention"]
  forward *= batch_size * seq_len
  if what == "prefill":
    return forward
  return forward * ((2 if config.remat else 1) + _BACKWARD)


def to_dict(plan: Plan | memory.TooLarge) -> dict[str, Any]:
  """A dict of JSON types."""
  if isinstance(plan, memory.TooLarge):
    return {
      "fits": False,
      "needed_bytes": round(plan.used),
      "limit_bytes": round(plan.limit),
      "argument_bytes": dict(plan.arguments),
    }
  return {
    "fits": True,
    "memory_bytes": {
      "total": plan.memory.total,
      **plan.memory.by_category(),
      "(heap of temporaries)": plan.memory.heap,
    },
    "sent_bytes": {
      f"{kind} over {axes}": round(sent)
      for (kind, axes), sent in plan.sent_bytes.items()
    },
    "collectives": [
      {
        **dataclasses.asdict(collective),
        "sent_bytes": round(collective.sent_bytes),
      }
      for collective in sorted(
        plan.collectives, key=lambda each: -each.total_bytes
      )
    ],
    "flops": {
      "model": plan.model_flops,
      "matmul_per_device": plan.matmul_flops,
      "kernels_per_device": plan.kernel_flops,
      "xla_per_device": plan.xla_flops,
    },
    "hbm_bytes_moved": round(plan.hbm_bytes),
    "kernels": dict(plan.kernels),
    "unknown_loops": list(plan.unknown_loops),
    "roofline_s": {
      **dataclasses.asdict(plan.roofline),
      "bound": plan.roofline.bound,
    },
    "compile_s": round(plan.compile_seconds, 1),
  }
