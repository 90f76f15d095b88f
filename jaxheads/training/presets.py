"""Named training runs: the defaults that `--preset` picks."""

from jaxheads.errors import UserError
from jaxheads.training import configfile
from jaxheads.training.config import (
  CheckpointOptions,
  EvaluationOptions,
  ModelOptions,
  OptimizerOptions,
  TrainConfig,
)

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

PRESETS = {"tiny": TINY, "smoke": SMOKE, "llm-s": LLM_S, "llm-b": LLM_B}


def get(name: str) -> TrainConfig:
  """The preset called `name`; `UserError` with the nearest name otherwise."""
  if name not in PRESETS:
    raise UserError(
      f"`--preset` has no {name!r}{configfile.nearest(name, PRESETS)}; "
      f"choose from {', '.join(PRESETS)}"
    )
  return PRESETS[name]
