"""The cost model against figures worked out by hand from the paper's layer."""

import dataclasses

import pytest

from jaxheads import flops, s2
from jaxheads.models import ModelConfig
from jaxheads.moh import MoHConfig

LAYERS = 2
# The published shape of LLaMA 3 8B, with fewer layers.
LLAMA = ModelConfig(
  vocab_size=128_256,
  num_layers=LAYERS,
  embed_dim=4096,
  mlp_dim=14336,
  num_heads=32,
  num_kv_heads=8,
  head_dim=128,
  max_seq_len=131_072,
  head_plans=(None,) * LAYERS,
)
PATTERN = s2.strided(32, num_kv_heads=8, local_blocks=8, vertical_stride=8)
HALF = MoHConfig(num_heads=32, num_shared=8, top_k=8)
THREE_QUARTERS = MoHConfig(num_heads=32, num_shared=16, top_k=8)
BY_NORM = dataclasses.replace(THREE_QUARTERS, router="query_norm")


def routed(plan):
  return dataclasses.replace(LLAMA, head_plans=(plan,) * LAYERS)


@pytest.mark.parametrize(
  ("plan", "saved"),
  [
    (BY_NORM, (2.8, 5.0, 10.7, 18.3)),
    (THREE_QUARTERS, (4.6, 6.7, 11.9, 18.9)),
    (HALF, (9.3, 13.3, 23.8, 37.8)),
  ],
  ids=["75 %, all queries", "75 %", "50 %"],
)
def test_share_of_the_layers_that_routing_removes(plan, saved):
  for kilo, percent in zip((2, 8, 32, 128), saved, strict=True):
    length = kilo << 10
    before = flops.prefill(LLAMA, length)
    after = flops.prefill(routed(plan), length)
    # The published derivation has no router and L / 2 keys, not (L + 1) / 2.
    less = after.layer_flops - after.flops["router"]
    assert 100 * (1 - less / before.layer_flops) == pytest.approx(
      percent, abs=0.06
    )


def test_every_term_by_hand():
  config = dataclasses.replace(
    LLAMA,
    head_plans=(HALF, None),
    contexts=(None, PATTERN),
  )
  length = 4096
  cost = flops.prefill(config, length).flops
  D, N, K, H, F = 4096, 32, 8, 128, 14336
  density = config.contexts[1].density(length)
  keys = (length + 1) / 2
  assert cost == pytest.approx(
    {
      "query": 2 * D * (16 + N) * H,
      "key_value": 2 * 4 * D * K * H,
      "attention": 4 * H * (16 * keys + N * density * keys),
      "output": 2 * D * (16 + N) * H,
      "router": 2 * D * (8 + 24 + 2),
      "mlp": 2 * 6 * D * F,
      "vocabulary": 2 * D * config.vocab_size,
    }
  )
  assert config.flops_per_token(length) == sum(cost.values())


def test_a_prefill_is_its_decoding_steps():
  length = 512
  config = dataclasses.replace(routed(HALF), contexts=(PATTERN, None))
  whole = length * flops.prefill(config, length).total_flops
  steps = sum(
    flops.decode(config, context).total_flops
    for context in range(1, length + 1)
  )
  assert steps == pytest.approx(whole)


@pytest.mark.parametrize(
  ("plan", "kv_heads", "fraction"),
  [
    (None, 8, 1.0),
    # Every head has keys of its own: those of the active ones are read.
    (THREE_QUARTERS, 32, 0.75),
    # Of the released model's routed groups 3.85 % are unread: half of 8.
    (THREE_QUARTERS, 8, 1 - 0.0385 / 2),
    # Whole groups: two of four.
    (dataclasses.replace(THREE_QUARTERS, group_size=4), 8, 0.75),
  ],
)
def test_keys_that_a_decoding_token_reads(plan, kv_heads, fraction):
  assert flops.kv_read_fraction(plan, 32, kv_heads) == pytest.approx(
    fraction, abs=1e-4
  )


def test_decoding_reads_weights_once_for_a_batch_and_keys_for_each():
  one, many = (
    flops.decode(LLAMA, 8192, batch_size=size).memory_bytes for size in (1, 16)
  )
  assert one["weights"] == 16 * many["weights"]
  assert one["kv_read"] == many["kv_read"] == 2 * 2 * LAYERS * 8 * 128 * 8192
  assert one["kv_write"] == one["kv_read"] / 8192


@pytest.mark.parametrize("call", [flops.prefill, flops.decode])
def test_lengths_below_one_are_refused(call):
  with pytest.raises(ValueError, match="_len` must be at least 1, got 0"):
    call(LLAMA, 0)
