"""A training run of a few seconds, and text for it."""

import dataclasses
import email
import io
import pathlib

from jaxheads.data import Corpus, load_corpus, load_tokenizer
from jaxheads.training import Reporter, RunFolder, TrainConfig, presets, train

# A folder of real text that every machine has: half a megabyte of Python.
TEXT = pathlib.Path(email.__file__).parent


def config(**changes) -> TrainConfig:
  """The smoke preset, shortened; learns from `TEXT`."""
  base = dataclasses.replace(
    presets.SMOKE,
    data=str(TEXT),
    steps=6,
    evaluation=dataclasses.replace(
      presets.SMOKE.evaluation, every=3, batches=2, sample_tokens=0
    ),
    checkpoint=dataclasses.replace(presets.SMOKE.checkpoint, every=3),
  )
  return dataclasses.replace(base, **changes)


def corpus() -> Corpus:
  return load_corpus(str(TEXT), tokenizer=load_tokenizer("bytes"))


def run(
  config: TrainConfig,
  path: pathlib.Path,
  *,
  resume: bool = False,
  reporter: Reporter | None = None,
  text: Corpus | None = None,
) -> tuple[dict, RunFolder]:
  """Trains in `path`; the summary and the folder."""
  folder = RunFolder(path)
  model_config = config.model.build(257)
  if not resume:
    folder.create(config, model_config)
  summary = train(
    config,
    model_config,
    folder,
    corpus=text or corpus(),
    tokenizer=load_tokenizer("bytes"),
    reporter=reporter or Reporter(io.StringIO()),
    resume=resume,
  )
  return summary, folder


def untimed(records: list[dict]) -> list[dict]:
  """Metrics records without what the clock decides."""
  clock = ("time_s", "tokens_per_s")
  return [
    {name: value for name, value in record.items() if name not in clock}
    for record in records
  ]
