"""Named model sizes: a tiny one for a CPU, those of the MoH paper, a 70B."""

import dataclasses
from typing import Any

from jaxheads.models.config import ModelConfig
from jaxheads.moh import MoHConfig

_PRESETS: dict[str, dict[str, Any]] = {
  # Bytes of source text, a few minutes on a laptop's CPU.
  "tiny": dict(
    vocab_size=257,
    num_layers=3,
    embed_dim=192,
    mlp_dim=512,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    max_seq_len=256,
    tie_embeddings=True,
  ),
  # LLM-S and LLM-B: MoH, https://arxiv.org/abs/2410.11842, appendix B.3. The
  # vocabulary is not stated there; 65,536 with untied tables gives the
  # published parameter counts (186 M; 881 M dense, 882 M MoH).
  "llm-s": dict(
    vocab_size=65_536,
    num_layers=12,
    embed_dim=768,
    mlp_dim=2048,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    max_seq_len=2048,
    dtype="bfloat16",
  ),
  "llm-b": dict(
    vocab_size=65_536,
    num_layers=24,
    embed_dim=1536,
    mlp_dim=4096,
    num_heads=16,
    num_kv_heads=16,
    head_dim=96,
    max_seq_len=2048,
    dtype="bfloat16",
    remat=True,
  ),
  # The same, appendix B.4: LLaMA 3 8B (https://arxiv.org/abs/2407.21783) with
  # a larger vocabulary.
  "moh-llama3-8b": dict(
    vocab_size=160_896,
    num_layers=32,
    embed_dim=4096,
    mlp_dim=14_336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=8192,
    rope_theta=5e5,
    dtype="bfloat16",
    remat=True,
  ),
  # LLaMA 3 70B, routed as the one above. Nobody has published it: it is here
  # to be planned for.
  "moh-llama3-70b": dict(
    vocab_size=128_256,
    num_layers=80,
    embed_dim=8192,
    mlp_dim=28_672,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_seq_len=8192,
    rope_theta=5e5,
    dtype="bfloat16",
    remat=True,
  ),
}
# Presets whose head plans are not `MoHConfig.from_fraction`'s: continued from a
# trained model by the router without parameters, half of the heads shared.
_BY_QUERY_NORM = frozenset({"moh-llama3-8b", "moh-llama3-70b"})
_PLAN_FIELDS = frozenset(
  field.name for field in dataclasses.fields(MoHConfig)
) - {"num_heads", "num_shared", "top_k"}


def names() -> tuple[str, ...]:
  """The presets that `get` knows."""
  return tuple(_PRESETS)


def get(
  name: str,
  *,
  vocab_size: int | None = None,
  active: float = 0.75,
  shared: int | None = None,
  **overrides: Any,
) -> ModelConfig:
  """The preset `name`, every layer with the same head plan.

  Args:
    name: One of `names()`.
    vocab_size: `None` means the preset's own, for "tiny" 257 (bytes and a
      separator).
    active: Fraction of the heads that each token uses, as in
      `MoHConfig.from_fraction`.
    shared: Heads per layer that are always on; `None` as in `from_fraction`,
      for the LLaMA presets half of all heads if more are active.
    **overrides: Fields of `ModelConfig`; and `router`, `gates`,
      `straight_through` and `group_size` of every layer's plan. With
      `head_plans` given, none of the plan's arguments is read.
  Raises:
    ValueError: An unknown name or field, or a plan that is impossible.
  """
  if name not in _PRESETS:
    raise ValueError(
      f"`name` must be one of {', '.join(map(repr, _PRESETS))}; got {name!r}."
    )
  plan_fields = {
    key: overrides.pop(key) for key in sorted(_PLAN_FIELDS & set(overrides))
  }
  known = {field.name for field in dataclasses.fields(ModelConfig)}
  for key in overrides:
    if key not in known:
      raise ValueError(
        f"`{key}` is no field of ModelConfig, nor of a head plan; known are "
        f"{', '.join(sorted(known | _PLAN_FIELDS))}."
      )
  fields = {**_PRESETS[name], **overrides}
  if vocab_size is not None:
    fields["vocab_size"] = vocab_size
  if "head_plans" not in fields:
    if name in _BY_QUERY_NORM:
      plan_fields = {"router": "query_norm", **plan_fields}
      half = fields["num_heads"] // 2
      if shared is None and active * fields["num_heads"] > half:
        shared = half
    plan = MoHConfig.from_fraction(
      fields["num_heads"], active, shared=shared, **plan_fields
    )
    fields["head_plans"] = (plan,) * fields["num_layers"]
  return ModelConfig(**fields)
