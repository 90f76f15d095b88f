import jax
import jax.numpy as jnp
import pytest

from jaxheads.planning.memory import bytes_per_device, measure, too_large
from jaxheads.sharding import MeshShape, make_mesh, shardings

GIB = 2**30


def parts():
  mesh = make_mesh(MeshShape(fsdp=2, heads=4))
  shapes = {
    "query": {"kernel": jax.ShapeDtypeStruct((8, 12, 4), jnp.float32)},
    "scale": jax.ShapeDtypeStruct((8,), jnp.bfloat16),
  }
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    shapes,
    shardings(shapes, mesh),
  )


def test_a_device_holds_its_part():
  # The kernel is split in two and in four, the vector is on every device.
  assert bytes_per_device(parts()) == 4 * 8 * 12 * 4 / (2 * 4) + 2 * 8


def test_what_a_program_needs_adds_up():
  x = jax.ShapeDtypeStruct(
    (1024, 8),
    jnp.float32,
    sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )
  compiled = jax.jit(jnp.sort, donate_argnums=0).lower(x).compile()
  needed = measure(compiled, {"numbers": x})
  assert needed.arguments == {"numbers": 4 * 1024 * 8}
  assert needed.total == sum(needed.by_category().values())
  assert needed.total >= 4 * 1024 * 8


@pytest.mark.parametrize(
  ("message", "used", "limit"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
      "for HLO temporaries (22.01G) exceeds available HBM (15.75G).",
      22.01 * GIB,
      15.75 * GIB,
    ),
    (
      "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
      "Used 512.5M of 15.75G hbm. Exceeded hbm capacity by 1M.",
      512.5 * 2**20,
      15.75 * GIB,
    ),
  ],
)
def test_a_refusal_for_memory_has_numbers(message, used, limit):
  found = too_large(message, {"parameters": parts()})
  assert (found.used, found.limit) == (used, limit)
  assert found.arguments == {"parameters": bytes_per_device(parts())}


def test_other_refusals_are_no_matter_of_memory():
  message = "Ran out of memory in memory space vmem. Used 20M of 16M vmem."
  assert too_large(message, {}) is None
