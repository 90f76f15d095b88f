"""Named training runs: the defaults that `--preset` picks."""

from jaxheads.errors import UserError
from jaxheads.training import configfile
from jaxheads.training.config import (
  CheckpointOptions,
  EvaluationOptions,
  OptimizerOptions,
  TrainConfig,
)
from jaxheads.training.model_options import ModelOptions, S2Options

# Two CPU cores, about five minutes, compile included.
# Small batches: at equal tokens they learn more than larger ones here.
TINY = TrainConfig()

# A few seconds: tests, and a first look at whether everything is installed.
SMOKE = TrainConfig(
  seq_len=32,
  batch_size=8,
  steps=20,
  model=ModelOptions(
    num_layers=1,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
  ),
  optimizer=OptimizerOptions(warmup_steps=2),
  evaluation=EvaluationOptions(every=5, batches=2, sample_tokens=16),
  checkpoint=CheckpointOptions(every=5),
)

# The same size at four times the length, where the past is worth sharding:
# four key-value heads own a quarter of it each, and the middle layer sees all.
TINY_S2 = TrainConfig(
  seq_len=1024,
  batch_size=2,
  steps=500,
  model=ModelOptions(
    router="none",
    max_seq_len=1024,
    s2=S2Options(stride=4, block_size=32, local_blocks=4, dense_layers=(1,)),
  ),
)

# As `SMOKE`, with one sharded layer and one dense one.
SMOKE_S2 = configfile.override(
  SMOKE,
  {
    "model": {
      "router": "none",
      "num_layers": 2,
      "s2": {"stride": 2, "block_size": 4, "local_blocks": 1},
    }
  },
)

# MoH paper, appendix B.3 (arXiv 2410.11842): 4 M tokens a step, 100 B tokens,
# weight decay 0.1, clip 1.0, balance weight 0.01. Adam's betas are not
# published; these are the usual ones for language models. The texts and the
# 65,536-word tokenizer are the reader's to bring.
_PAPER = TrainConfig(
  seq_len=2048,
  batch_size=2048,
  steps=24_000,
  log_every=10,
  model=ModelOptions(preset="llm-s", dtype="bfloat16", remat=True),
  optimizer=OptimizerOptions(learning_rate=3e-4, warmup_steps=2000),
  evaluation=EvaluationOptions(every=500, batches=16),
  checkpoint=CheckpointOptions(every=500, keep=3),
)
LLM_S = _PAPER
LLM_B = configfile.override(
  _PAPER,
  {
    "model": {"preset": "llm-b"},
    "optimizer": {"learning_rate": 5e-4, "warmup_steps": 500},
  },
)

# The same paper, appendix B.4, second stage: a LLaMA 3 8B that has learned the
# new vocabulary goes on with routed heads, 16 M tokens a step, 100 B tokens.
# Here it starts from scratch: this library reads no LLaMA weights.
MOH_LLAMA3_8B = TrainConfig(
  seq_len=8192,
  batch_size=2048,
  steps=6_000,
  log_every=10,
  model=ModelOptions(preset="moh-llama3-8b", router="query_norm", shared=(16,)),
  optimizer=OptimizerOptions(
    learning_rate=2e-5, warmup_steps=50, final_fraction=0.05
  ),
  evaluation=EvaluationOptions(every=500, batches=16),
  checkpoint=CheckpointOptions(every=500, keep=3),
)
MOH_LLAMA3_70B = configfile.override(
  MOH_LLAMA3_8B,
  {"model": {"preset": "moh-llama3-70b", "shared": [32]}},
)

PRESETS = {
  "tiny": TINY,
  "smoke": SMOKE,
  "tiny-s2": TINY_S2,
  "smoke-s2": SMOKE_S2,
  "llm-s": LLM_S,
  "llm-b": LLM_B,
  "moh-llama3-8b": MOH_LLAMA3_8B,
  "moh-llama3-70b": MOH_LLAMA3_70B,
}


def get(name: str) -> TrainConfig:
  """The preset called `name`; `UserError` with the nearest name otherwise."""
  if name not in PRESETS:
    raise UserError(
      f"`--preset` has no {name!r}{configfile.nearest(name, PRESETS)}; "
      f"choose from {', '.join(PRESETS)}"
    )
  return PRESETS[name]
