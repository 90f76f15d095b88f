import math

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from jaxheads.data import ByteTokenizer
from jaxheads.errors import UserError
from jaxheads.training import figures

BOUNDARY = np.array([0xD5, 0x5E, 0x00])
ABSENT = np.array([0xDD, 0xDD, 0xDD])
BLUE, VERMILION = np.array([0x00, 0x72, 0xB2]), BOUNDARY


def _pixels(path):
  """RGB, 0 to 255, [height, width, 3]."""
  return np.round(matplotlib.image.imread(path)[..., :3] * 255).astype(int)


def _count(image, colour):
  return int((image == colour).all(axis=-1).sum())


def _run(offset=0.0, steps=60):
  records = []
  for step in range(1, steps + 1):
    records.append({"step": step, "loss": 1 + offset + 4 / step})
    if step % 10 == 0:
      records.append({"step": step, "validation_loss": 1.1 + offset + 4 / step})
  return records


def _load(layers=2, classes=3, heads=8):
  return np.random.default_rng(0).uniform(size=(layers, classes, heads))


# Losses.


def test_losses_of_one_and_two_runs(tmp_path):
  figures.plot_losses({"MoH": _run()}, tmp_path / "new" / "one.png")
  figures.plot_losses({"MoH": _run(), "dense": _run(0.1)}, tmp_path / "two.png")
  one, two = (_pixels(tmp_path / name) for name in ("new/one.png", "two.png"))
  assert min(one.shape[:2]) > 600
  assert two.shape[0] > one.shape[0]  # A second panel, for the difference.
  assert _count(one, BLUE) > 500
  assert _count(one, VERMILION) == 0
  assert _count(two, BLUE) > 500
  assert _count(two, VERMILION) > 500
  assert sorted(path.name for path in tmp_path.rglob("*")) == [
    "new",
    "one.png",
    "two.png",
  ]


def test_difference_is_in_per_cent_at_shared_steps():
  first = (np.array([10.0, 20, 30]), np.array([2.0, 1.01, 0.5]))
  second = (np.array([5.0, 20, 30]), np.array([9.0, 1.0, 1.0]))
  steps, per_cent = figures._gap([first, second])
  assert steps.tolist() == [20, 30]
  np.testing.assert_allclose(per_cent, [1.0, -50.0], rtol=1e-12)
  assert figures._gap([first]) is None
  assert figures._gap([first, (np.array([7.0]), np.array([1.0]))]) is None


def test_running_mean_keeps_lines_and_has_no_noise_at_the_end():
  line = np.arange(10.0)
  np.testing.assert_allclose(
    figures._running_mean(line)[:-1], line[:-1], rtol=1e-12
  )
  noise = np.tile([1.0, -1.0], 300)
  assert np.abs(figures._running_mean(noise)[10:]).max() < 0.2
  assert figures._running_mean(np.array([3.0])).tolist() == [3.0]


@pytest.mark.parametrize(
  "records",
  [
    [{"step": 1, "loss": 2.0}],
    [{"step": 1, "validation_loss": 2.0}],
    [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}, {"step": 3}],
  ],
)
def test_short_runs_can_be_drawn(tmp_path, records):
  figures.plot_losses({"a": records, "b": []}, tmp_path / "short.png")
  assert (tmp_path / "short.png").stat().st_size > 5_000


def test_runs_without_a_finite_point_are_refused(tmp_path):
  with pytest.raises(ValueError, match="finite `loss` or `validation_loss`"):
    figures.plot_losses(
      {"a": [{"step": 1, "loss": math.inf}]}, tmp_path / "a.png"
    )
  assert not list(tmp_path.iterdir())


# Head load.


def _boundary(tmp_path, num_shared, load=None):
  path = tmp_path / "load.png"
  load = _load() if load is None else load
  names = [f"class {i}" for i in range(load.shape[1])]
  figures.plot_head_load(load, names, path, num_shared=num_shared)
  orange = (_pixels(path) == BOUNDARY).all(axis=-1)
  return np.flatnonzero(orange.any(axis=0)), orange


def test_boundary_stands_between_shared_and_routed_heads(tmp_path):
  places = [
    _boundary(tmp_path, num_shared)[0].mean() for num_shared in (1, 2, 4, 7)
  ]
  steps = np.diff(places) / [1, 2, 3]  # One head is equally wide everywhere.
  np.testing.assert_allclose(steps, steps[0], rtol=0.05)
  load = np.zeros((2, 3, 8))
  load[..., :2] = 1
  columns, orange = _boundary(tmp_path, 2, load)
  rows = orange.any(axis=1)  # Those of cells, without titles.
  darkest = _pixels(tmp_path / "load.png")[rows].sum(axis=-1) < 150
  assert darkest[:, columns[0] - 15].mean() > 0.9  # Full cells to the left,
  assert not darkest[:, columns[-1] + 15].any()  # empty ones to the right.


def test_boundary_may_differ_by_layer_and_be_missing(tmp_path):
  for num_shared in (0, 8, [0, 8]):
    assert not _boundary(tmp_path, num_shared)[1].any()
  columns, _ = _boundary(tmp_path, [2, 5])
  assert (np.diff(columns) > 20).sum() == 1  # Two lines, side by side.
  both = _boundary(tmp_path, 2)[1].sum()
  one = _boundary(tmp_path, [2, 8])[1].sum()
  assert both == pytest.approx(2 * one, rel=0.05)


def test_load_is_drawn_light_to_dark(tmp_path):
  def brightness(value):
    path = tmp_path / "load.png"
    load = np.full((1, 2, 8), value)
    figures.plot_head_load(load, ["a", "b"], path, num_shared=0)
    image = _pixels(path)
    height, width = image.shape[:2]
    # Left of the middle lie cells; the colour bar is at the right.
    block = image[height // 3 : 2 * height // 3, width // 4 : width // 2]
    return np.median(block, axis=(0, 1)).sum()

  assert brightness(0.0) > brightness(0.5) > brightness(1.0)


def test_class_without_tokens_is_grey(tmp_path):
  load = _load()
  _boundary(tmp_path, 2, load)
  assert _count(_pixels(tmp_path / "load.png"), ABSENT) < 500
  load[:, 1] = np.nan
  _boundary(tmp_path, 2, load)
  assert _count(_pixels(tmp_path / "load.png"), ABSENT) > 5_000


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 7, 16)])
def test_other_sizes_can_be_drawn(tmp_path, shape):
  _boundary(tmp_path, 0, _load(*shape))


@pytest.mark.parametrize(
  ("load", "keywords", "message"),
  [
    (np.zeros((3, 8)), {}, r"`load` must be \[layers, classes, heads\]"),
    (_load(classes=4), {}, "`class_names` must name 4 classes, got 3"),
    (_load() * 2, {}, r"fractions in \[0, 1\]"),
    (_load(), {"num_shared": 9}, r"`num_shared` .* in \[0, 8\]"),
    (_load(), {"num_shared": [1]}, "each of 2 layers"),
  ],
)
def test_bad_load_is_refused(tmp_path, load, keywords, message):
  with pytest.raises(ValueError, match=message):
    figures.plot_head_load(
      load,
      ["a", "b", "c"],
      tmp_path / "a.png",
      **{"num_shared": 2, **keywords},
    )


def test_pyplot_is_left_alone(tmp_path):
  mine = plt.figure()
  try:
    figures.plot_losses({"MoH": _run(steps=3)}, tmp_path / "a.png")
    _boundary(tmp_path, 2)
    assert plt.get_fignums() == [mine.number]
    assert plt.gcf() is mine
  finally:
    plt.close(mine)


def test_unwritable_place_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="figure .* cannot be written"):
    figures.plot_losses({"a": _run()}, tmp_path / "file" / "a.png")


# Classes of tokens.


def test_byte_classes_of_source_text():
  tokenizer = ByteTokenizer()
  tokens = [*tokenizer.encode("a_Z 9\t+('\"`#\r\n\x07é"), tokenizer.eot]
  ids, names = figures.byte_classes(np.asarray(tokens, np.uint16))
  assert ids.dtype == np.int32
  assert [names[i] for i in ids] == (
    ["letters"] * 3
    + ["spaces", "digits", "spaces"]
    + ["operators"] * 2
    + ["quotes, #"] * 4
    + ["newlines"] * 2
    + ["other"] * 4
  )


def test_byte_classes_cover_every_id_in_any_shape():
  tokens = np.arange(257)
  ids, names = figures.byte_classes(tokens)
  assert set(ids) == set(range(len(names)))
  square = tokens[:256].reshape(4, 64)
  np.testing.assert_array_equal(
    figures.byte_classes(square)[0], ids[:256].reshape(4, 64)
  )
  empty, _ = figures.byte_classes(np.zeros((0, 4), np.int32))
  assert empty.shape == (0, 4)


@pytest.mark.parametrize("bad", [257, -1])
def test_byte_classes_refuse_other_vocabularies(bad):
  with pytest.raises(ValueError, match=r"`tokens` must be in \[0, 257\)"):
    figures.byte_classes(np.array([3, bad]))


def test_longer_tokens_have_the_class_of_their_first_visible_character():
  texts = [" the", "  ", "\n\n", "(1", "1)", " 'a", ""]

  class Words:
    vocab_size = len(texts)

    def decode(self, ids):
      return "".join(texts[i] for i in ids)

  ids, names = figures.token_classes(np.arange(len(texts)), Words())
  assert [names[i] for i in ids] == (
    "letters|spaces|newlines|operators|digits|quotes, #|other".split("|")
  )
