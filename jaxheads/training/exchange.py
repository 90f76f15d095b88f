"""What devices that share sequences send each other for attention."""

from typing import NamedTuple

import jax.numpy as jnp

from jaxheads import s2
from jaxheads.models import ModelConfig
from jaxheads.models.config import Run
from jaxheads.moh import explain_execution
from jaxheads.sharding import MeshShape
from jaxheads.sharding.chunks import balanced_order
from jaxheads.sharding.context import Road, choose_road
from jaxheads.sharding.volume import Sent, Sizes, all_to_all, exchange, ring
from jaxheads.training import console


class Layers(NamedTuple):
  """Consecutive layers that are alike.

  Attributes:
    num_layers: How many.
    road: How they come to the keys of their heads.
    sent: By each device along `context`, for one of them; forward twice where
      layers are recomputed.
    by_ring: What ring attention would send.
  """

  num_layers: int
  road: Road
  sent: Sent
  by_ring: Sent


def of_model(
  config: ModelConfig, shape: MeshShape, *, batch_size: int, seq_len: int
) -> list[Layers]:
  """The layers of a model on a mesh with several devices along `context`.

  Raises:
    UserError: Sequences or heads do not split over the mesh.
  """
  balanced_order(seq_len, shape.context)
  sizes = Sizes(
    batch=batch_size // (shape.data * shape.fsdp),
    length=seq_len,
    num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    value_bytes=jnp.dtype(config.dtype).itemsize,
    devices=shape.context,
    shards=shape.heads,
  )
  return [_layers(config, run, sizes) for run in config.runs]


def _layers(config: ModelConfig, run: Run, sizes: Sizes) -> Layers:
  pattern = s2.dense(config.num_heads) if run.context is None else run.context
  road = choose_road(
    pattern,
    length=sizes.length,
    num_kv_heads=sizes.num_kv_heads,
    devices=sizes.devices,
    shards=sizes.shards,
    needs_all_tokens=_is_dispatched(config, run, sizes.length),
  )
  sent = exchange(sizes, pattern) if road == "exchange" else all_to_all(sizes)
  sent, by_ring = (
    Sent((2 if config.remat else 1) * one.forward, one.backward)
    for one in (sent, ring(sizes))
  )
  return Layers(run.num_layers, road, sent, by_ring)


def _is_dispatched(config: ModelConfig, run: Run, seq_len: int) -> bool:
  """Whether only the heads that tokens picked are computed."""
  if run.plan is None:
    return False
  choice = explain_execution(
    seq_len,
    execution=config.execution,
    has_pattern=run.context is not None,
    all_heads_for="routing" if run.plan.learns_from_all_heads else None,
  )
  return choice.execution == "dispatch"


def describe(layers: list[Layers]) -> str:
  """In one line, for the log."""
  kinds = {
    "exchange": "exchange halos and residues",
    "all_to_all": "exchange tokens for heads",
  }
  told = []
  total = sum(one.num_layers for one in layers)
  for road, what in kinds.items():
    mine = [one for one in layers if one.road == road]
    if mine:
      number = sum(one.num_layers for one in mine)
      sent, by_ring = (
        console.quantity(sum(one.num_layers * by(one).most for one in mine))
        for by in (lambda one: one.sent, lambda one: one.by_ring)
      )
      told.append(
        f"{number} of {total} layers {what}: {sent}B a device and step (ring "
        f"attention: {by_ring}B)"
      )
  return "; ".join(told)
