"""Sizes that fit together, parameter counts, and the way to JSON and back."""

import dataclasses
import json
import math

import jax
import pytest
from flax import nnx

from jaxheads.models import DecoderLM, ModelConfig, presets
from jaxheads.moh import MoHConfig
from tests.models.builders import (
  BY_NORM,
  MIXED,
  ROUTED,
  small_config,
)


def counted_params(config: ModelConfig) -> int:
  """Parameters of the model itself, without allocating one of them."""
  model = nnx.eval_shape(lambda: DecoderLM(config, rngs=nnx.Rngs(0)))
  leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
  return sum(math.prod(leaf.shape) for leaf in leaves)


@pytest.mark.parametrize(
  "config",
  [
    small_config(*MIXED),
    small_config(ROUTED, None, tie_embeddings=True),
    small_config(*MIXED).dense(),
    presets.get("tiny"),
    presets.get("tiny", router="query_norm", num_kv_heads=8),
  ],
  ids=["mixed", "tied", "dense", "tiny", "tiny-query-norm"],
)
def test_num_params_is_the_real_count(config):
  assert config.num_params == counted_params(config)


@pytest.mark.parametrize(
  ("name", "moh_millions", "dense_millions"),
  [("llm-s", 186, 186), ("llm-b", 882, 881)],
)
def test_paper_presets_have_the_published_sizes(
  name, moh_millions, dense_millions
):
  moh = presets.get(name)
  for config, millions in ((moh, moh_millions), (moh.dense(), dense_millions)):
    assert config.num_params == counted_params(config)
    assert round(config.num_params / 1e6) == millions


def test_paper_presets_split_heads_as_published():
  # LLM-B at 75 %: 4 shared heads and 8 of 12 routed ones.
  plan = presets.get("llm-b").head_plans[0]
  assert (plan.num_shared, plan.top_k, plan.num_routed) == (4, 8, 12)
  assert presets.get("llm-b", active=0.5).active_heads == 24 * 8


@pytest.mark.parametrize(
  ("name", "params"),
  # The number of parameters in the released weights of LLaMA 3.
  [("moh-llama3-8b", 8_030_261_248), ("moh-llama3-70b", 70_553_706_496)],
)
def test_llama_presets_have_the_released_sizes(name, params):
  config = presets.get(name, vocab_size=128_256)
  assert config.num_params == counted_params(config) == params
  # The router has no parameters.
  assert config.dense().num_params == params
  shared = config.num_heads // 2
  for plan in config.head_plans:
    assert plan.router == "query_norm"
    assert (plan.num_shared, plan.active_fraction) == (shared, 0.75)


def test_the_8b_preset_has_the_published_shape():
  config = presets.get("moh-llama3-8b")
  # Two tables of 160,896 words instead of 128,256.
  grown = 2 * (160_896 - 128_256) * 4096
  assert config.num_params == 8_030_261_248 + grown
  plan = config.head_plans[0]
  assert (plan.num_shared, plan.top_k, plan.num_routed) == (16, 8, 16)
  assert presets.get("moh-llama3-8b", active=0.5).head_plans[0].num_shared == 8
  assert not config.tie_embeddings
  assert (config.rope_theta, config.max_seq_len) == (5e5, 8192)
  assert (config.dtype, config.param_dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize(
  "config",
  [small_config(*MIXED, remat=True, norm_eps=1e-6), presets.get("llm-b")],
)
def test_json_round_trip(config):
  again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict())))
  assert again == config
  assert hash(again) == hash(config)


def test_from_dict_names_what_is_wrong():
  good = small_config(ROUTED).to_dict()
  with pytest.raises(ValueError, match="`width` is no field of ModelConfig"):
    ModelConfig.from_dict({**good, "width": 3})
  plan = {**good["head_plans"][0], "topk": 1}
  with pytest.raises(ValueError, match=r"`head_plans\[0\].topk` is no field"):
    ModelConfig.from_dict({**good, "head_plans": [plan]})
  del good["mlp_dim"]
  with pytest.raises(ValueError, match="`mlp_dim` is missing"):
    ModelConfig.from_dict(good)


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    ({"num_kv_heads": 3}, ValueError, r"`num_kv_heads` must divide.*\(4\)"),
    ({"head_dim": 5}, ValueError, "`head_dim` must be even.*got 5. Take 6"),
    ({"embed_dim": 0}, ValueError, "`embed_dim` must be at least 1, got 0"),
    ({"max_seq_len": -1}, ValueError, "`max_seq_len` must be at least 1"),
    ({"mlp_dim": 8.0}, TypeError, "`mlp_dim` must be an integer, got 8.0"),
    ({"num_layers": 3}, ValueError, "`head_plans` must hold.* 3 layers.*got 2"),
    ({"num_heads": 8}, ValueError, r"`head_plans\[0\].num_heads` must equal"),
    ({"head_plans": (None, 3)}, TypeError, r"`head_plans\[1\]`.*got int"),
    ({"rope_theta": 0.0}, ValueError, "`rope_theta` must be positive"),
    ({"norm_eps": math.nan}, ValueError, "`norm_eps` must be positive"),
    ({"dtype": "int8"}, ValueError, "`dtype` must be one of.*'bfloat16'"),
    ({"param_dtype": "f32"}, ValueError, "`param_dtype` must be one of"),
    ({"execution": "fast"}, ValueError, "`execution` must be one of.*'dense'"),
    ({"implementation": "cuda"}, ValueError, "`implementation` must be one"),
  ],
)
def test_impossible_configs_are_refused(fields, error, message):
  with pytest.raises(error, match=message):
    small_config(ROUTED, None, **fields)


def test_dense_is_the_same_model_without_routers():
  config = small_config(*MIXED)
  dense = config.dense()
  assert dense.head_plans == (None,) * 7
  assert dense == dataclasses.replace(config, head_plans=dense.head_plans)
  assert dense.active_heads == dense.total_heads == 28
  # None, 2 x ROUTED, K = E, K = 0, no shared, query norm.
  assert config.active_heads == 4 + 2 * 3 + 4 + 4 + 2 + 3


def test_runs_join_neighbours_of_equal_plan_only():
  assert small_config(*MIXED).runs[1] == (ROUTED, None, None, 2)
  assert small_config(ROUTED, None, ROUTED).runs == (
    (ROUTED, None, None, 1),
    (None, None, None, 1),
    (ROUTED, None, None, 1),
  )


def test_flops_per_token_by_hand():
  # D 8, F 12, V 13; N 4, K 2, H 4; 7 tokens see 4 keys on average.
  vocabulary, kv, mlp = 2 * 8 * 13, 4 * 8 * 2 * 4, 6 * 8 * 12
  dense = 2 * 8 * 16 + kv + 4 * 16 * 4 + 2 * 16 * 8 + mlp
  assert small_config(None).flops_per_token(7) == vocabulary + dense
  # Three of four heads, and 3 routed columns and 2 for the balance (S = 1).
  routed = 2 * 8 * 12 + kv + 4 * 12 * 4 + 2 * 12 * 8 + mlp + 2 * 8 * (3 + 2)
  assert small_config(ROUTED).flops_per_token(7) == vocabulary + routed
  # The query-norm router needs all queries, and the norms of 2 routed heads.
  normed = 2 * 8 * 16 + kv + 4 * 12 * 4 + 2 * 12 * 8 + mlp + 2 * 2 * 4
  assert small_config(BY_NORM).flops_per_token(7) == vocabulary + normed
  both = small_config(ROUTED, BY_NORM).flops_per_token(7)
  assert both == vocabulary + routed + normed
  with pytest.raises(ValueError, match="`seq_len` must be at least 1, got 0"):
    small_config(None).flops_per_token(0)


def test_preset_overrides():
  config = presets.get(
    "tiny", vocab_size=99, active=0.5, shared=1, num_layers=2, gates="paper"
  )
  plan = MoHConfig(num_heads=8, num_shared=1, top_k=3, gates="paper")
  assert config.vocab_size == 99
  assert config.head_plans == (plan, plan)
  plans = (None, plan)
  config = presets.get("tiny", num_layers=2, head_plans=plans)
  assert config.head_plans == plans


def test_preset_errors_name_the_argument():
  with pytest.raises(ValueError, match="`name` must be one of 'tiny'"):
    presets.get("huge")
  with pytest.raises(ValueError, match="`depth` is no field of ModelConfig"):
    presets.get("tiny", depth=3)
  with pytest.raises(ValueError, match="`active`"):
    presets.get("tiny", active=0.0)
