import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxheads.errors import UserError
from jaxheads.sharding import (
  MeshShape,
  axis_size,
  check_heads,
  constrain,
  make_mesh,
  param_specs,
  parse_mesh,
  shardings,
  spec,
)
from tests.sharding import runs


@pytest.mark.parametrize(
  ("text", "devices", "shape"),
  [
    (None, 1, MeshShape()),
    (None, 8, MeshShape(fsdp=8)),
    ("", 8, MeshShape(fsdp=8)),
    ("data=2", 8, MeshShape(data=2, fsdp=4)),
    ("heads=4, context=2", 8, MeshShape(context=2, heads=4)),
    ("fsdp=2,data=4", 8, MeshShape(data=4, fsdp=2)),
    ("data=1,fsdp=1,context=1,heads=1", 1, MeshShape()),
  ],
)
def test_what_a_mesh_is_called(text, devices, shape):
  assert parse_mesh(text, devices) == shape
  assert parse_mesh(str(shape), devices) == shape
  assert shape.size == devices


@pytest.mark.parametrize(
  ("text", "devices", "message"),
  [
    ("data=3", 8, "needs a multiple of 3 devices, there are 8; data=2 fits"),
    ("heads=16", 8, "needs a multiple of 16.*heads=8 fits: `--mesh heads=8`"),
    ("data=2,fsdp=2", 8, "needs 4 devices, there are 8; .*=4 fits"),
    ("fsdp=16", 8, "needs 16 devices, there are 8; fsdp=8 fits"),
    ("data=3,fsdp=5", 8, "there are 8; the nearest is fsdp=8"),
    ("tensor=2", 8, "data, fsdp, context, heads; got 'tensor=2'"),
    ("data", 8, "got 'data'"),
    ("data=0", 8, "data must be a number of devices, at least 1; got '0'"),
    ("data=two", 8, "got 'two'"),
    ("data=2,data=4", 8, "names data twice"),
  ],
)
def test_a_mesh_that_is_none(text, devices, message):
  with pytest.raises(UserError, match=message):
    parse_mesh(text, devices)


def test_heads_that_do_not_divide():
  check_heads(16, 8, 8)
  with pytest.raises(UserError, match=r"heads=3.*8 key-value.*is heads=2"):
    check_heads(16, 8, 3)
  with pytest.raises(UserError, match=r"heads=16.*is heads=8"):
    check_heads(16, 8, 16)


def test_every_matrix_of_a_model_is_in_the_table():
  from flax import nnx

  from jaxheads.models import DecoderLM

  for tied in (False, True):
    config = runs.config(tie_embeddings=tied)
    model = nnx.eval_shape(lambda c=config: DecoderLM(c, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    specs = param_specs(params)
    for (path, leaf), where in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
      strict=True,
    ):
      name = jax.tree_util.keystr(path)
      small = "scale" in name or "router" in name
      assert any(where) != small, name
      assert len(where) in (0, leaf.ndim), name


def test_where_parameters_are():
  mesh = make_mesh(MeshShape(data=2, fsdp=2, heads=2))
  tree = {
    "attention": {
      "query": {"kernel": jnp.zeros((3, 8, 4, 2))},
      "key": {"kernel": jnp.zeros((3, 8, 2, 2))},
      "out": {"kernel": jnp.zeros((3, 4, 2, 8)), "bias": jnp.zeros((3, 8))},
    },
    "embedding": {"embedding": jnp.zeros((257, 8))},  # 257 words stay whole.
  }
  found = jax.tree.map(lambda s: s.spec, shardings(tree, mesh))
  assert found["attention"]["query"]["kernel"] == P(
    None, ("fsdp",), ("heads",), None
  )
  assert found["attention"]["key"]["kernel"] == P(
    None, ("fsdp",), ("heads",), None
  )
  assert found["attention"]["out"]["kernel"] == P(
    None, ("heads",), None, ("fsdp",)
  )
  assert found["attention"]["out"]["bias"] == P()
  assert found["embedding"]["embedding"] == P(None, ("fsdp",))


def test_without_a_mesh_nothing_is_split():
  x = jnp.ones((4, 6))
  assert constrain(x, "batch", "length") is x
  assert axis_size("data", "heads") == 1


def test_a_constraint_leaves_out_what_does_not_divide():
  mesh = make_mesh(MeshShape(data=2, fsdp=2, context=2))
  with jax.set_mesh(mesh):
    assert axis_size("data", "fsdp") == 4
    y = jax.jit(lambda x: constrain(x, "batch", "length"))(jnp.ones((2, 6)))
  assert y.sharding.spec == P("data", "context")
  assert spec("batch", None, "heads") == P(("data", "fsdp"), None, "heads")
