"""What a run says of devices that share sequences, and what it refuses."""

import dataclasses

import pytest

from jaxheads import UserError
from jaxheads.sharding import MeshShape
from jaxheads.training import exchange
from jaxheads.training.loop import check_sizes
from tests.sharding import runs
from tests.training import small


def test_every_layer_takes_its_road():
  config = runs.config(execution="dense", remat=False)
  layers = exchange.of_model(
    config, MeshShape(context=4, heads=2), batch_size=8, seq_len=runs.LENGTH
  )
  assert [one.road for one in layers] == [
    "all_to_all",
    "all_to_all",
    "exchange",
    "exchange",
  ]
  dispatched = exchange.of_model(
    dataclasses.replace(config, execution="dispatch"),
    MeshShape(context=4, heads=2),
    batch_size=8,
    seq_len=runs.LENGTH,
  )
  # Routed heads that are not computed for all tokens.
  assert dispatched[3].road == "all_to_all"
  (again,) = exchange.of_model(
    dataclasses.replace(
      config, num_layers=1, head_plans=(None,), contexts=(None,), remat=True
    ),
    MeshShape(context=4, heads=2),
    batch_size=8,
    seq_len=runs.LENGTH,
  )
  assert 2 * again.sent.most == 3 * layers[0].sent.most
  # A token's keys and values are 512 bytes. Ring: 48 tokens, three times over.
  # A halo is 6 tokens, twice, and of 64 tokens half are a residue: 12 + 24.
  assert exchange.describe(layers) == (
    "2 of 4 layers exchange halos and residues: 73.73 kB a device and step "
    "(ring attention: 147.5 kB); 2 of 4 layers exchange tokens for heads: "
    "98.3 kB a device and step (ring attention: 147.5 kB)"
  )


@pytest.mark.parametrize(
  ("mesh", "changes", "message"),
  [
    (
      MeshShape(context=8),
      {"seq_len": 40},
      "context=8 needs sequences whose length is a multiple of 16, got 40 "
      "tokens; the nearest is 32",
    ),
    (
      MeshShape(context=4, heads=2),
      {},
      r"context=4 with heads=2 does not divide the 4 query heads.*nearest that "
      "does is context=2",
    ),
  ],
)
def test_refused_before_anything_is_read(mesh, changes, message):
  config = small.config(**changes)
  with pytest.raises(UserError, match=message):
    check_sizes(config, config.model.build(257), mesh)
