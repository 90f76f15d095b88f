"""An engine whose heads lie on several devices answers as one device does."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from jaxheads import s2
from jaxheads.kvcache.by_context import ByContext
from jaxheads.kvcache.names import make_policy
from jaxheads.models import reordered
from jaxheads.serve.engine import Engine, EngineConfig
from jaxheads.sharding import MeshShape, make_mesh, spec
from tests.models.builders import BY_NORM, NO_SHARED, ROUTED
from tests.serve.engines import (
  ADA,
  SMALL,
  TASK_KV,
  Watched,
  check_masked,
  logprobs_of,
  model_of,
  prompt,
  request,
  tokens_of,
)

STRIDED = s2.strided(4, block_size=16, local_blocks=1, vertical_stride=3)
SINKS = s2.sliding_window(4, block_size=16, local_blocks=1, sink_blocks=1)
ROLL = dataclasses.replace(TASK_KV, decode="roll")
GATES = ((0.1, 0.9, 0.8, 0.2), (0.7, 0.1, 0.2, 0.3))
# No other array has as many numbers in a page's place.
POOL = 211
COLLECTIVES = (
  "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
)
CHUNKED = dataclasses.replace(SMALL, chunk=16, prefix_sharing=True)


def mesh_of(heads, **axes):
  shape = MeshShape(heads=heads, **axes)
  return make_mesh(shape, jax.devices()[: shape.size])


def requests_of(lengths, count, **fields):
  return [request(str(n), prompt(n), count, **fields) for n in lengths]


def check_against_one_device(model, policy, requests, heads, **fields):
  """Tokens and distributions; returns the sharded engine."""
  want = Watched(model, policy, poison=False, **fields).run(*requests)
  engine = Watched(model, policy, mesh=mesh_of(heads), **fields)
  for mine, theirs in zip(engine.run(*requests), want, strict=True):
    assert tokens_of(mine) == tokens_of(theirs)
    np.testing.assert_allclose(
      logprobs_of(mine), logprobs_of(theirs), atol=1e-5, rtol=0
    )
  return engine


@pytest.fixture(scope="module")
def mixed():
  """Routed heads and contexts, a prompt in chunks, on two devices."""
  model = model_of(ROUTED, None, contexts=(None, STRIDED))
  config = dataclasses.replace(SMALL, chunk=32, num_pages=2 * POOL)
  engine = Watched(model, TASK_KV, config, mesh=mesh_of(2))
  requests = requests_of((34, 47), 15, budget=0.5)
  return model, engine, requests, engine.run(*requests)


@pytest.mark.slow
def test_answers_equal_a_mask_over_a_dense_cache(mixed):
  model, _, requests, answers = mixed
  policy = ByContext(policy=TASK_KV, contexts=model.config.contexts)
  for one, events in zip(requests, answers, strict=True):
    check_masked(model, one, events, policy=policy, budget=0.5)


@pytest.mark.slow
def test_each_device_holds_its_part_of_the_pool(mixed):
  model, engine, _, _ = mixed
  pool = engine.device._state.pages.k.stored
  assert pool.shape == (2 * POOL, 16, 4)
  assert [x.data.shape for x in pool.addressable_shards] == [(POOL, 16, 4)] * 2
  assert len({x.device for x in pool.addressable_shards}) == 2
  memory = engine.engine.memory
  assert memory.pool == engine.device._state.pages.nbytes / 2
  # Heads and MLP are split, norms and routers are not.
  whole = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
  assert whole / 2 < memory.weights < 0.7 * whole


@pytest.mark.slow
def test_no_program_exchanges_pages(mixed):
  _, engine, _, _ = mixed
  programs = [
    compiled.as_text()
    for program in engine.device._programs
    for compiled in program._compiled.values()
  ]
  assert len(programs) >= 4
  found = [n for text in programs for n in exchanged(text)]
  assert found  # What heads say is added up.
  assert max(found) < POOL * 16 * 4 / 4


def exchanged(text):
  """Numbers in each array that a compiled program exchanges."""
  found = []
  for line in text.splitlines():
    what = line.partition(" = ")[2].partition("(%")[0]
    if re.search(COLLECTIVES, what):
      found += [
        math.prod(map(int, filter(None, dims.split(","))))
        for dims in re.findall(r"\w\d+\[([\d,]*)\]", what)
      ]
  return found


def test_an_exchange_of_pages_would_be_seen():
  mesh = mesh_of(2)
  pool = jax.ShapeDtypeStruct(
    (2 * POOL, 16, 4), "float32", sharding=NamedSharding(mesh, spec("pages"))
  )
  everywhere = NamedSharding(mesh, spec())
  gather = jax.jit(lambda x: x + 1.0, out_shardings=everywhere)
  text = gather.lower(pool).compile().as_text()
  assert max(exchanged(text)) == 2 * POOL * 16 * 4


@pytest.mark.exhaustive
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize(
  ("policy", "config", "budget"),
  [
    (None, SMALL, 1.0),
    (None, CHUNKED, 1.0),
    (TASK_KV, SMALL, 0.5),
    (TASK_KV, CHUNKED, 0.5),
    (ROLL, SMALL, 0.5),
    (ADA, SMALL, 0.4),
    (make_policy("streaming", sinks=2), SMALL, 0.4),
    (
      make_policy("static_heads", gates=GATES, sinks=2, recent=6),
      SMALL,
      0.6,
    ),
  ],
)
def test_policies(heads, policy, config, budget):
  check_against_one_device(
    model_of(None, None),
    policy,
    requests_of((9, 33, 45), 18, budget=budget),
    heads,
    config=config,
  )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
  ("heads", "plans", "fields", "policy", "config"),
  [
    # Routed heads, contexts, and both; four devices have a KV head each.
    (4, (ROUTED, None), dict(contexts=(None, STRIDED)), TASK_KV, SMALL),
    (
      2,
      (NO_SHARED, BY_NORM, None),
      dict(contexts=(STRIDED, None, SINKS)),
      TASK_KV,
      SMALL,
    ),
    (4, (ROUTED, None), dict(contexts=(STRIDED, SINKS)), None, CHUNKED),
    # Query heads that share a KV head.
    (2, (None, ROUTED), dict(num_kv_heads=2), TASK_KV, SMALL),
    # Pages of short numbers.
    (2, (None,), {}, None, dataclasses.replace(SMALL, dtype="int8")),
    (2, (None,), {}, TASK_KV, dataclasses.replace(SMALL, dtype="int8")),
    (4, (None,), {}, ROLL, dataclasses.replace(CHUNKED, dtype="int8")),
    (4, (None,), {}, ADA, dataclasses.replace(CHUNKED, dtype="int8")),
    (2, (None,), {}, None, dataclasses.replace(SMALL, dtype="bfloat16")),
  ],
)
def test_models(heads, plans, fields, policy, config):
  check_against_one_device(
    model_of(*plans, **fields),
    policy,
    requests_of((9, 45), 18, budget=0.5),
    heads,
    config=config,
  )


@pytest.mark.exhaustive
def test_heads_that_are_dealt_out_are_reported_by_their_own_numbers():
  own = model_of(ROUTED, None, contexts=(None, STRIDED))
  order = ((2, 0, 3, 1), (3, 0, 2, 1))
  stored = reordered(own, dataclasses.replace(own.config, head_orders=order))
  one = request("a", prompt(45), 12, budget=0.5)
  answers, told = [], []
  for model, mesh in ((own, None), (stored, mesh_of(2))):
    engine = Watched(model, TASK_KV, mesh=mesh)
    engine.submit(one)
    while len(engine.events["a"]) < 6:
      engine.step()
    told.append(engine.engine.snapshot()[0]["tokens"])
    engine.run()
    answers.append(engine.events["a"])
  assert told[0] == told[1]
  assert len(set(map(tuple, told[0]))) == 2  # Heads and layers differ.
  assert tokens_of(answers[0]) == tokens_of(answers[1])
  np.testing.assert_allclose(
    logprobs_of(answers[0]), logprobs_of(answers[1]), atol=1e-5
  )


@pytest.mark.exhaustive
def test_preempted_when_the_pages_of_one_device_are_short():
  model = model_of(None)
  requests = [
    request(name, prompt(16, seed), 40) for seed, name in enumerate("ab")
  ]
  alone = Watched(model, TASK_KV)
  want = [tokens_of(alone.run(one)[0]) for one in requests]
  engine = Watched(model, TASK_KV, mesh=mesh_of(2))
  allocator = engine.scheduler.allocator
  allocator.allocate([0, allocator.num_free[1] - 10])
  engine.submit(*requests)
  while engine.engine.has_work():
    engine.step()
  assert engine.engine.stats().preemptions
  assert [tokens_of(engine.events[one.id]) for one in requests] == want


@pytest.mark.exhaustive
@pytest.mark.parametrize("policy", [None, TASK_KV])
def test_nothing_is_compiled_after_warming_up(policy):
  config = dataclasses.replace(SMALL, max_length=32)
  engine = Engine(model_of(None), policy=policy, config=config, mesh=mesh_of(2))
  count = engine.warm_up()
  engine.generate(requests_of((3, 16, 20), 12, budget=0.5))
  assert engine.stats().compilations == count


@pytest.mark.parametrize(
  ("axes", "fields", "message"),
  [
    (dict(heads=4), dict(num_kv_heads=2), "heads=4 does not divide .* heads=2"),
    (dict(heads=2, data=2), {}, "one device along 'data', got 2"),
    (dict(fsdp=2), {}, "one device along 'fsdp', got 2"),
    (dict(context=2), {}, "one device along 'context', got 2"),
  ],
)
def test_meshes_that_do_not_fit(axes, fields, message):
  shape = MeshShape(**axes)
  mesh = make_mesh(shape, jax.devices()[: shape.size])
  with pytest.raises(ValueError, match=message):
    Engine(model_of(None, **fields), mesh=mesh)


def test_a_pool_too_small_for_its_devices():
  config = EngineConfig(page_size=16, num_pages=7)
  with pytest.raises(ValueError, match="`num_pages` must be at least 8"):
    Engine(model_of(None), config=config, mesh=mesh_of(4))
