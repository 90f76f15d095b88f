"""Sharded layers as options, flags and records of a run."""

import dataclasses
import json
import shutil

import pytest
from flax import nnx

from jaxheads.errors import UserError
from jaxheads.models import DecoderLM
from jaxheads.training import (
  ModelOptions,
  S2Options,
  artefacts,
  parse,
  presets,
)
from jaxheads.training.artefacts import label
from tests.training import small

S2 = S2Options(stride=2, block_size=8, local_blocks=1)


def build(**changes):
  options = {"num_layers": 3, "router": "none", "s2": S2} | changes
  return ModelOptions(**options).build(257)


def test_no_stride_shards_no_layer():
  assert build(s2=S2Options()).contexts == (None,) * 3


def test_dense_layers_see_everything_and_the_others_share_a_pattern():
  model = build()
  pattern = model.contexts[0]
  assert model.contexts == (pattern, pattern, None)
  assert pattern.union_complete()
  # Query heads of one key-value head see the same.
  assert pattern.cache_blocks(20) == (11,) * 4
  assert build(s2=dataclasses.replace(S2, dense_layers=())).contexts == (
    (pattern,) * 3
  )
  model = build(s2=dataclasses.replace(S2, dense_layers=(0, -2)))
  assert model.contexts == (None, None, pattern)


@pytest.mark.parametrize(
  ("execution", "implementation", "expected"),
  [
    (None, None, [(None, None)] * 2),
    ("dense", "xla", [("dense", "xla")] * 2),
    ("dispatch", "reference", [("dispatch", "reference")] * 2),
    ("dispatch", "triton", [("dispatch", "triton")] * 2),
  ],
)
def test_execution_and_implementation_reach_the_layers(
  execution, implementation, expected
):
  config = build(
    router="two_stage",
    active=0.75,
    s2=S2,
    num_layers=2,
    execution=execution,
    implementation=implementation,
  )
  model = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
  layers = [stack.attention for stack in model.stacks]
  assert [(x.execution, x.implementation) for x in layers] == expected


def test_costs_by_hand():
  # D 32, 4 heads of 8 of which 3 are active, 2 KV heads, F 64, V 257; a token
  # sees 16.5 keys on average. Query and output, keys and values, attention,
  # router, feed-forward, vocabulary.
  rest = 4 * 32 * 16 + 6 * 32 * 64 + 2 * 32 * 257
  routed = 2 * 2 * 32 * 24 + 4 * 24 * 16.5 + 2 * 32 * (3 + 2) + rest
  plain = 2 * 2 * 32 * 32 + 4 * 32 * 16.5 + rest
  costs = artefacts.costs(small.config().model.build(257), seq_len=32)
  assert costs == {
    "flops_per_token": routed,
    "flops_saved_fraction": pytest.approx(1 - routed / plain),
    # Two of the three routed heads always need the second KV head.
    "kv_read_bytes_per_token": 32 * 2 * 2 * 8 * 4,
    "kv_read_saved_fraction": 0.0,
    "kv_write_bytes_per_token": 2 * 2 * 8 * 4,
  }
  sharded = artefacts.costs(build(num_layers=1, s2=S2), seq_len=32)
  assert sharded["kv_read_saved_fraction"] == 0.0  # The last layer is dense.
  every = dataclasses.replace(S2, dense_layers=())
  sharded = artefacts.costs(build(num_layers=1, s2=every), seq_len=32)
  # Of four blocks of 8, the last token sees its own and every second one.
  assert 0.3 < sharded["kv_read_saved_fraction"] < 0.4


def test_query_heads_may_own_more_shares_than_key_value_heads():
  options = dataclasses.replace(S2, stride=8)
  with pytest.raises(UserError, match="`vertical_stride`.*`per_query_head`"):
    build(s2=options)
  model = build(s2=dataclasses.replace(options, per_query_head=True))
  assert len(model.contexts[0].distinct_rules) == 8


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"dense_layers": (3,)}, "`--model.s2.dense-layers`.*-3 to 2, got 3"),
    ({"block_size": 12}, "`block_size` must be a power of two"),
    ({"local_blocks": 0}, "`local_blocks` must be at least 1"),
    ({"stride": 0}, "`vertical_stride` must be at least 1"),
  ],
)
def test_sizes_that_make_no_pattern_are_named(changes, message):
  with pytest.raises(UserError, match=message) as error:
    build(s2=dataclasses.replace(S2, **changes))
  assert "\n" not in str(error.value)


def test_flags_reach_the_pattern(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags = (
    "--model.s2.stride 2 --model.s2.block-size 16 --model.s2.local-blocks 3 "
    "--model.s2.dense-layers 0 2"
  )
  request = parse(
    flags.split(), prog="train_s2.py", preset="tiny-s2", what="a model"
  )
  options = request.config.model.s2
  assert options == S2Options(
    stride=2, block_size=16, local_blocks=3, dense_layers=(0, 2)
  )
  assert request.config.seq_len == presets.TINY_S2.seq_len
  assert request.run.path.name.startswith("train_s2-")


def test_resume_finds_the_newest_run_of_its_own_script(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  config = small.config(model=presets.SMOKE_S2.model)
  for name in ("train_s2-20260101-000000", "train_moh-20260102-000000"):
    run = small.RunFolder(tmp_path / "runs" / name)
    run.create(config, config.model.build(257))
  request = parse(["--resume"], prog="train_s2.py", preset="tiny-s2")
  assert request.run.path.name == "train_s2-20260101-000000"
  assert request.config == config


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({}, "S2 hybrid"),
    ({"s2": dataclasses.replace(S2, dense_layers=())}, "S2"),
    ({"router": "two_stage"}, "MoH 75 % + S2 hybrid"),
    ({"s2": S2Options()}, "dense"),
  ],
)
def test_labels(options, expected):
  assert label(build(**options)) == expected


def test_the_baseline_is_neither_routed_nor_sharded():
  options = presets.SMOKE_S2.model
  dense = options.dense().build(257)
  assert dense == options.build(257).dense()
  assert label(dense) == "dense"


def test_config_of_a_run_before_contexts_still_reads(tmp_path):
  config = small.config()
  run = small.RunFolder(tmp_path)
  run.create(config, config.model.build(257))
  record = json.loads(run.config_file.read_text())
  del record["model"]["contexts"]
  del record["train"]["model"]["s2"]
  run.config_file.write_text(json.dumps(record))
  assert run.read_config() == (config, config.model.build(257))


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_and_draws_its_contexts(tmp_path):
  model = dataclasses.replace(
    presets.SMOKE_S2.model, implementation="reference"
  )
  config = small.config(model=model)
  summary, _ = small.run(config, tmp_path / "whole")
  assert summary["label"] == "S2 hybrid"
  assert summary["visible_keys_fraction"] < 1
  assert (tmp_path / "whole" / "figures" / "contexts.png").stat().st_size
  # Back to the checkpoint in the middle.
  shutil.rmtree(tmp_path / "whole" / "checkpoints" / "6")
  resumed, _ = small.run(config, tmp_path / "whole", resume=True)
  for name in ("validation_loss", "train_loss", "steps"):
    assert resumed[name] == summary[name]
