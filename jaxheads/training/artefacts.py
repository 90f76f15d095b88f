"""What a finished run leaves behind: figures, a sample, its final figures."""

import itertools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxheads import flops
from jaxheads.data import Tokenizer
from jaxheads.models import DecoderLM, ModelConfig, generate
from jaxheads.training import figures
from jaxheads.training.config import EvaluationOptions, TrainConfig
from jaxheads.training.evaluation import Evaluator, head_load
from jaxheads.training.metrics import read_metrics
from jaxheads.training.run_folder import RunFolder, write_json

# Enough tokens for a smooth map; the figure must not take long.
_LOAD_BATCHES = 8


def label(model_config: ModelConfig) -> str:
  """What tables and figures call a model, such as "MoH 75 %" or "dense".

  "S2" has a context in every layer, "S2 hybrid" in some.
  """
  parts = []
  if any(model_config.head_plans):
    share = 100 * model_config.active_heads / model_config.total_heads
    parts.append(f"MoH {share:.3g} %")
  if any(model_config.contexts):
    parts.append("S2" if all(model_config.contexts) else "S2 hybrid")
  return " + ".join(parts) or "dense"


def write_all(
  run: RunFolder,
  model: nnx.Module,
  config: TrainConfig,
  model_config: ModelConfig,
  evaluator: Evaluator,
  tokenizer: Tokenizer,
) -> dict[str, Any]:
  """Figures, sample and summary.json; returns what is in the last."""
  draw_losses(run)
  draw_contexts(run, model_config, seq_len=config.seq_len)
  if hasattr(model, "head_activity"):
    draw_head_load(run, model, model_config, evaluator, tokenizer)
  if isinstance(model, DecoderLM):
    write_sample(run, model, tokenizer, config.evaluation, seed=config.seed)
  summary = summarise(run, model_config, seq_len=config.seq_len)
  write_json(run.summary_file, summary)
  return summary


def draw_losses(run: RunFolder) -> None:
  """figures/loss.png, with the dense run's curves if there is one."""
  runs = {}
  for folder in (run, run.baseline):
    if folder.metrics_file.exists() and folder.holds_run:
      _, model_config = folder.read_config()
      runs[label(model_config)] = read_metrics(folder.metrics_file)
  figures.plot_losses(runs, run.figures / "loss.png")


def draw_contexts(
  run: RunFolder, model_config: ModelConfig, *, seq_len: int
) -> bool:
  """figures/contexts.png: what each head sees; False where all see all.

  Of several patterns, the first layer's; `Pattern.plot` draws the others.
  """
  patterns = [context for context in model_config.contexts if context]
  if not patterns:
    return False
  figures.save(patterns[0].plot(seq_len), run.figures / "contexts.png")
  return True


def draw_head_load(
  run: RunFolder,
  model: nnx.Module,
  model_config: ModelConfig,
  evaluator: Evaluator,
  tokenizer: Tokenizer,
) -> bool:
  """figures/head_load.png; False where no head is routed."""
  plans = model_config.head_plans
  if not any(plan is not None and plan.routes for plan in plans):
    return False
  batches = list(itertools.islice(evaluator.batches(), _LOAD_BATCHES))
  load, names = head_load(model, batches, tokenizer)
  figures.plot_head_load(
    load,
    names,
    run.figures / "head_load.png",
    num_shared=[
      model_config.num_heads if plan is None else plan.num_shared
      for plan in plans
    ],
  )
  return True


def write_sample(
  run: RunFolder,
  model: DecoderLM,
  tokenizer: Tokenizer,
  options: EvaluationOptions,
  *,
  seed: int,
) -> str:
  """sample.txt: the prompt and how the model continues it."""
  prompt = tokenizer.encode(options.prompt)
  room = model.config.max_seq_len - len(prompt)
  num_tokens = min(options.sample_tokens, room)
  if not len(prompt) or num_tokens < 1:
    return ""
  tokens = [
    int(token[0])
    for token in generate(
      model,
      jnp.asarray(prompt)[None],
      max_new_tokens=num_tokens,
      temperature=0.8,
      top_p=0.95,
      key=jax.random.key(seed),
      stop_token=tokenizer.eot,
    )
  ]
  text = options.prompt + tokenizer.decode(tokens)
  run.sample_file.write_text(text + "\n", encoding="utf-8")
  return text


def costs(model_config: ModelConfig, *, seq_len: int) -> dict[str, float]:
  """What a token costs, and how much less than in plain multi-head attention.

  Forward FLOPs are of a sequence of `seq_len` tokens, on average; bytes of keys
  and values are read by the token after so many, and written by each. Heads
  that are off and keys that are hidden count as free, see `jaxheads.flops`.
  """
  bytes_per_number = jnp.dtype(model_config.dtype).itemsize

  def of(model: ModelConfig) -> tuple[float, flops.Terms]:
    decoded = flops.decode(model, seq_len, bytes_per_number=bytes_per_number)
    return flops.prefill(model, seq_len).total_flops, decoded.memory_bytes

  total, moved = of(model_config)
  plain_total, plain_moved = of(model_config.dense())
  return {
    "flops_per_token": total,
    "flops_saved_fraction": 1 - total / plain_total,
    "kv_read_bytes_per_token": moved["kv_read"],
    "kv_read_saved_fraction": 1 - moved["kv_read"] / plain_moved["kv_read"],
    "kv_write_bytes_per_token": moved["kv_write"],
  }


def summarise(
  run: RunFolder, model_config: ModelConfig, *, seq_len: int
) -> dict[str, Any]:
  """The final figures of a run, from its metrics and its config."""
  records = read_metrics(run.metrics_file)
  validations = [record for record in records if "validation_loss" in record]
  losses = [record for record in records if "loss" in record]
  rates = [
    record["tokens_per_s"] for record in losses if record["tokens_per_s"] > 0
  ]
  best = min(validations, key=lambda record: record["validation_loss"])
  return {
    "label": label(model_config),
    "steps": validations[-1]["step"],
    "train_loss": losses[-1]["loss"],
    "validation_loss": validations[-1]["validation_loss"],
    "validation_bits_per_byte": validations[-1]["validation_bits_per_byte"],
    "best_step": best["step"],
    "best_validation_loss": best["validation_loss"],
    "num_params": model_config.num_params,
    "active_heads_fraction": (
      model_config.active_heads / model_config.total_heads
    ),
    "visible_keys_fraction": model_config.visible_fraction(seq_len),
    **costs(model_config, seq_len=seq_len),
    # The median leaves compilation and pauses out.
    "tokens_per_s": statistics.median(rates) if rates else 0.0,
  }
