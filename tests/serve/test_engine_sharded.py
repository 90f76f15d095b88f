"""An engine whose heads lie on several devices answers as one device does."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxheads import s2
from jaxheads.serve.engine import EngineConfig
from jaxheads.sharding import MeshShape, make_mesh
from tests.models.builders import NO_SHARED, ROUTED
from tests.serve.engines import (
  ADA,
  PAGE,
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


def mesh_of(heads):
  return make_mesh(MeshShape(heads=heads), jax.devices()[:heads])


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


def test_full():
  check_against_one_device(model_of(None), None, requests_of((9, 33), 20), 2)


def test_task_kv():
  check_against_one_device(model_of(None), TASK_KV, requests_of((9, 45), 18, budget=0.5), 2)
