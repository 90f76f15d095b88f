"""What a decoder model costs by the token: FLOPs and bytes, term by term.

Two FLOPs a multiply-accumulate. Left out: embedding lookup, norms, softmax,
activations. Heads that a token does not use, and keys that a head does not
see, cost nothing: that is what the kernels aim at, and what the dense
execution does not reach.

Source:
  MoH, https://arxiv.org/abs/2410.11842: the terms of its layer.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxheads.moh import MoHConfig, router_size
from jaxheads.s2 import Pattern

if TYPE_CHECKING:
  from jaxheads.models import ModelConfig

Terms = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one token.

  Attributes:
    flops: By term, summed over the layers: "query", "key_value", "attention",
      "output", "router", "mlp", and "vocabulary" (the scores of the next
      token, once).
    memory_bytes: By term: "weights", "kv_read", "kv_write". Traffic, not
      capacity: a cache keeps the keys of heads that are not read.
  """

  flops: Terms
  memory_bytes: Terms

  @property
  def total_flops(self) -> float:
    """All terms."""
    return sum(self.flops.values())

  @property
  def layer_flops(self) -> float:
    """All terms but the vocabulary."""
    return self.total_flops - self.flops["vocabulary"]

  @property
  def total_bytes(self) -> float:
    """All terms."""
    return sum(self.memory_bytes.values())


def prefill(
  config: "ModelConfig", seq_len: int, *, bytes_per_number: int = 2
) -> Cost:
  """Forward cost of one token, averaged over a causal sequence.

  A token sees (seq_len + 1) / 2 keys on average, in layers with a context its
  visible share of them. A training step takes three times the FLOPs.

  Args:
    config: The model.
    seq_len: Tokens of the sequence, at least 1. Weights are read once for all
      of them, and so are keys and values: nothing is read twice.
    bytes_per_number: Of weights and keys.
  """
  _check_length("seq_len", seq_len)
  visible = [
    density * (seq_len + 1) / 2 for density in config.densities(seq_len)
  ]
  weights = _weights(config) * bytes_per_number
  written = _cache_numbers(config) * bytes_per_number
  return Cost(
    _flops(config, visible),
    {
      "weights": weights / seq_len,
      "kv_read": written,
      "kv_write": written,
    },
  )


def decode(
  config: "ModelConfig",
  context_len: int,
  *,
  batch_size: int = 1,
  bytes_per_number: int = 2,
) -> Cost:
  """Cost of the next token of each of `batch_size` sequences.

  A KV head is read if one of its query heads is active; routing that picks
  heads one by one, uniformly, leaves few of a group unread. Its visible share
  of the context is read in layers with a context. All weights are read, once
  for the batch.

  Args:
    config: The model.
    context_len: Tokens so far, with the new one; at least 1.
    batch_size: Sequences that share a step.
    bytes_per_number: Of weights and keys.
  """
  _check_length("context_len", context_len)
  _check_length("batch_size", batch_size)
  visible = [
    float(context_len) if context is None else _visible(context, context_len)
    for context in config.contexts
  ]
  per_key = 2 * config.num_kv_heads * config.head_dim * bytes_per_number
  read = sum(
    per_key
    * keys
    * kv_read_fraction(plan, config.num_heads, config.num_kv_heads)
    for plan, keys in zip(config.head_plans, visible, strict=True)
  )
  return Cost(
    _flops(config, visible),
    {
      "weights": _weights(config) * bytes_per_number / batch_size,
      "kv_read": read,
      "kv_write": _cache_numbers(config) * bytes_per_number,
    },
  )


def kv_read_fraction(
  plan: MoHConfig | None, num_heads: int, num_kv_heads: int
) -> float:
  """KV heads that a decoding token reads, of all; expected.

  Args:
    plan: Which heads are shared and picked; None is all of them. Picks are
      taken as uniform.
    num_heads, num_kv_heads: Of the layer.

  Source:
    https://arxiv.org/abs/2410.11842 says nothing of it: counted here. A group
    without a shared head is unread with probability C(E - G, K) / C(E, K) for
    K picks of E heads, G of them in the group.
  """
  if plan is None or not plan.top_k:
    return 1.0
  groups = num_heads // num_kv_heads
  # In units of what is picked together.
  size = plan.group_size
  routed, picks = plan.num_routed // size, plan.top_k // size
  read = 0.0
  for kv_head in range(num_kv_heads):
    first, last = kv_head * groups, (kv_head + 1) * groups
    if first < plan.num_shared:
      read += 1
      continue
    units = (last - 1) // size - first // size + 1
    unread = math.comb(routed - units, picks) / math.comb(routed, picks)
    read += 1 - unread
  return read / num_kv_heads


def _flops(config: "ModelConfig", visible: list[float]) -> Terms:
  """By term, of a token that sees so many keys in each layer."""
  D, N, K, H = (
    config.embed_dim,
    config.num_heads,
    config.num_kv_heads,
    config.head_dim,
  )
  terms = dict.fromkeys(
    ("query", "key_value", "attention", "output", "router", "mlp"), 0.0
  )
  for plan, keys in zip(config.head_plans, visible, strict=True):
    active = N if plan is None else plan.num_active
    by_query = plan is not None and plan.router == "query_norm" and plan.top_k
    # The query-norm router ranks heads by their queries: it needs them all.
    terms["query"] += 2 * D * (N if by_query else active) * H
    terms["key_value"] += 4 * D * K * H
    terms["attention"] += 4 * active * H * keys
    terms["output"] += 2 * active * H * D
    terms["mlp"] += 6 * D * config.mlp_dim
    if plan is not None:
      terms["router"] += 2 * router_size(plan, D)
      terms["router"] += 2 * plan.num_routed * H if by_query else 0
  return terms | {"vocabulary": 2.0 * D * config.vocab_size}


def _visible(context: Pattern, length: int) -> float:
  """Keys that the last of so many tokens sees, on average over the heads."""
  before = context.visible_pairs(length - 1) if length > 1 else 0
  return (context.visible_pairs(length) - before) / context.num_heads


def _weights(config: "ModelConfig") -> int:
  """Numbers that are read: all but the table that tokens are looked up in."""
  if config.tie_embeddings:
    return config.num_params
  return config.num_params - config.vocab_size * config.embed_dim


def _cache_numbers(config: "ModelConfig") -> int:
  """Numbers of a token's keys and values, in all layers."""
  return 2 * config.num_layers * config.num_kv_heads * config.head_dim


def _check_length(name: str, length: int) -> None:
  if length < 1:
    raise ValueError(f"`{name}` must be at least 1, got {length}.")
