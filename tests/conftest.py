"""Settings every test runs under: CPU, eight fake devices, strict JAX."""

import importlib.metadata
import os

# Before the first import of JAX, which reads both once. Programs that tests
# start inherit them. Set JAX_PLATFORMS yourself to run on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without LLVM's optimisations and with
# the older emitters of fused loops they take a quarter of the time. CI runs the
# quick ones as users compile them too.
_FLAGS = {
  "--xla_force_host_platform_device_count": 8,
  "--xla_backend_optimization_level": 0,
}
# Later versions have one kind of emitters, and refuse a flag they do not know.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for _flag, _value in _FLAGS.items():
  _flags = os.environ.get("XLA_FLAGS", "")
  if _flag not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} {_flag}={_value}".strip()

import hypothesis
import jax
import pytest

# An accidental mixture of types is a defect of ours.
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The same examples in every run; a compile may take longer than any deadline.
hypothesis.settings.register_profile(
  "jaxheads",
  deadline=None,
  derandomize=True,
  max_examples=30,
  print_blob=True,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
# For a night: HYPOTHESIS_PROFILE=jaxheads-long python -m pytest
hypothesis.settings.register_profile(
  "jaxheads-long",
  parent=hypothesis.settings.get_profile("jaxheads"),
  derandomize=False,
  max_examples=1000,
)
hypothesis.settings.load_profile(
  os.environ.get("HYPOTHESIS_PROFILE", "jaxheads")
)


@pytest.fixture
def standard_promotion():
  """For bfloat16 models: Flax's own norm layers mix it with float32."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.fixture(autouse=True, scope="module")
def _release_compiled_programs():
  """Keeps the memory of a long run flat."""
  yield
  jax.clear_caches()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
  """`-n auto`: one worker a core, but each holds a JAX of its own."""
  del config
  return min(os.cpu_count() or 1, 8)
