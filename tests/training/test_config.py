import dataclasses
import json

import pytest

from jaxheads.errors import UserError
from jaxheads.training import ModelOptions, TrainConfig, configfile, presets


def test_config_survives_json():
  config = configfile.override(
    presets.SMOKE,
    {"model": {"shared": [2], "dtype": "bfloat16"}, "data": "text.txt"},
  )
  values = json.loads(json.dumps(config.to_dict()))
  assert configfile.override(TrainConfig(), values) == config


def test_override_leaves_the_rest_alone():
  config = configfile.override(
    presets.SMOKE, {"optimizer": {"learning-rate": 1}}
  )
  expected = dataclasses.replace(
    presets.SMOKE,
    optimizer=dataclasses.replace(presets.SMOKE.optimizer, learning_rate=1.0),
  )
  assert config == expected
  assert isinstance(config.optimizer.learning_rate, float)


def test_yaml_number_without_a_dot_is_a_number(tmp_path):
  path = tmp_path / "run.yaml"
  path.write_text("optimizer:\n  learning_rate: 1e-3\n")
  config = configfile.override(TrainConfig(), configfile.read(path))
  assert config.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"stpes": 3}, "unknown key `stpes`, did you mean `steps`"),
    (
      {"optimizer": {"learnin_rate": 3}},
      "unknown key `optimizer.learnin_rate`, did you mean `learning_rate`",
    ),
    ({"steps": "many"}, "`steps` must be a whole number, got 'many'"),
    ({"steps": True}, "`steps` must be a whole number, got True"),
    ({"steps": 1.5}, "`steps` must be a whole number"),
    ({"model": {"gates": "soft"}}, "'scaled' or 'paper'"),
    ({"model": {"shared": [1, "a"]}}, "one or a list of a whole number"),
    ({"model": 3}, "`model` must be a mapping"),
    ({"steps": 0}, "`--steps` must be at least 1"),
    ({"optimizer": {"learning_rate": -1}}, "must be positive"),
    (
      {"batch_size": 3, "optimizer": {"accumulate": 2}},
      "multiple of `--optimizer.accumulate`",
    ),
  ],
)
def test_wrong_values_are_named(values, message):
  with pytest.raises(UserError, match=message) as error:
    configfile.override(TrainConfig(), values)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("run.toml", "", "must be a .yaml or .json file"),
    ("missing.yaml", None, "No such file"),
    ("run.yaml", "a: [1", "does not parse"),
    ("run.json", "{", "does not parse"),
    ("run.yaml", "- 1", "must hold a mapping"),
    ("run.yaml", b"\xff\xfe\x00", "is not text"),
  ],
)
def test_unreadable_files_are_named(tmp_path, name, text, message):
  path = tmp_path / name
  if text is not None:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError, match=message) as error:
    configfile.read(path)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_build(name):
  config = presets.get(name)
  model = config.model.build(257)
  assert config.seq_len <= model.max_seq_len
  sharded = name.endswith("-s2")
  active = 1.0 if sharded else 0.75
  assert model.active_heads == active * model.total_heads
  assert any(model.contexts) == sharded
  assert not all(model.contexts)


def test_one_number_counts_for_every_layer():
  model = ModelOptions(num_layers=3, shared=(3,), top_k=(2,)).build(257)
  assert [(p.num_shared, p.top_k) for p in model.head_plans] == [(3, 2)] * 3


def test_lists_give_each_layer_its_own_plan():
  model = ModelOptions(
    num_layers=3, shared=(1, 2, 8), top_k=(4, 3, 0), gates="paper"
  ).build(257)
  plans = [(p.num_shared, p.top_k) for p in model.head_plans]
  assert plans == [(1, 4), (2, 3), (8, 0)]
  assert all(plan.gates == "paper" for plan in model.head_plans)


def test_router_none_is_the_dense_baseline():
  options = ModelOptions(num_layers=2)
  dense = dataclasses.replace(options, router="none").build(257)
  assert dense == options.build(257).dense()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"shared": (5,), "top_k": (4,)}, "`top_k` must be in"),
    ({"shared": (1, 2)}, "one number or one per layer .4., got 2: 1 2"),
    ({"active": 0.0}, "`--model.active` must be in"),
    ({"num_heads": 6, "num_kv_heads": 4}, "`num_kv_heads` must divide"),
    ({"top_k": (0,)}, "`top_k` = 0 needs"),
  ],
)
def test_head_counts_that_do_not_add_up(changes, message):
  with pytest.raises(UserError, match=message):
    ModelOptions(**({"num_layers": 4} | changes)).build(257)
