"""The cache evaluation: masks, cells, intervals and claims, and a smoke run."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import _kv_eval_cells as cells
from experiments import _kv_eval_report as report
from experiments import _kv_eval_stats as stats
from experiments import kv_eval
from experiments._kv_eval_cells import Cell, Question
from experiments._kv_eval_methods import (
  Settings,
  methods,
  page_budget,
  pages,
)
from experiments._kv_eval_model import Reader
from jaxheads.data import NEEDLE_VOCAB_SIZE, NeedleTask, retrieval_tasks
from jaxheads.errors import UserError
from jaxheads.kvcache import CacheShape, make_policy
from jaxheads.models import DecoderLM
from jaxheads.training.model_options import ModelOptions

SETTINGS = Settings()


@pytest.fixture(scope="module")
def model():
  options = ModelOptions(
    router="none",
    num_layers=2,
    embed_dim=16,
    mlp_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
  )
  config = options.build(NEEDLE_VOCAB_SIZE)
  return DecoderLM(config, rngs=nnx.Rngs(0))


def prompts(rows, length, seed=0):
  random = np.random.default_rng(seed)
  return random.integers(0, NEEDLE_VOCAB_SIZE, (rows, length), np.int32)


def test_a_cache_that_is_kept_whole_answers_as_the_model(model):
  tokens = prompts(3, 30)
  reader = Reader(model)
  cached, after = reader.read(tokens[:, :20])
  expected = model(jnp.asarray(tokens))
  np.testing.assert_allclose(after, expected[:, 19], atol=1e-5)
  keep = jnp.ones((2, 3, 2, 20), bool)
  answered = reader.answer(cached, keep, tokens[:, 20:], 20)
  np.testing.assert_allclose(answered, expected[:, 20:], atol=1e-5)


def test_what_is_dropped_is_not_seen_and_what_is_kept_is(model):
  tokens = prompts(2, 24)
  reader = Reader(model)
  cached, _ = reader.read(tokens[:, :20])
  keep = np.random.default_rng(1).random((2, 2, 2, 20)) < 0.5
  # [R, B, S, K, H] holds what is not kept.
  dropped = ~keep.swapaxes(2, 3)[..., None]
  spoilt = cached._replace(
    k=jnp.where(dropped, 1e3, cached.k), v=jnp.where(dropped, -1e3, cached.v)
  )
  answers = [
    np.asarray(reader.answer(cache, jnp.asarray(keep), tokens[:, 20:], 20))
    for cache in (cached, spoilt)
  ]
  np.testing.assert_array_equal(*answers)
  # One token more or less, of one head in one layer, shows.
  for at in ((0, 0, 1, 3), (1, 1, 0, 17)):
    other = keep.copy()
    other[at] = ~other[at]
    changed = reader.answer(cached, jnp.asarray(other), tokens[:, 20:], 20)
    difference = np.abs(np.asarray(changed) - answers[0]).max(axis=(1, 2))
    assert difference[at[1]] > 1e-4
    assert difference[1 - at[1]] == 0


def test_routed_models_are_refused(model):
  config = dataclasses.replace(model.config, num_kv_heads=4)
  routed = ModelOptions(num_layers=1, embed_dim=16, num_heads=4, head_dim=4)
  routed_config = routed.build(NEEDLE_VOCAB_SIZE)
  with pytest.raises(ValueError, match="must be dense"):
    Reader(DecoderLM(routed_config, rngs=nnx.Rngs(0)))
  assert not any(config.head_plans)


class Knowing:
  """Answers right as long as every head keeps the first asked token."""

  shape = CacheShape(2, 3)

  def __init__(self, task, length):
    self.examples = [
      task.draw(length, seed=2**31, index=index) for index in range(4)
    ]
    self.asked = []

  def _logits(self, tokens):
    return 9.0 * np.eye(NEEDLE_VOCAB_SIZE, dtype=np.float32)[tokens]

  def read(self, tokens):
    rows = [example.tokens[tokens.shape[1]] for example in self.examples]
    return None, jnp.asarray(self._logits(rows))

  def keep(self, policy, cached, *, length, budget):
    kept = round(budget * length)
    size = self.examples[0].length
    keep = (np.arange(size) >= length - kept) & (np.arange(size) < length)
    return jnp.broadcast_to(keep, (2, 4, 3, size))

  def answer(self, cached, keep, tokens, start):
    self.asked.append((tokens.shape[1], start))
    out = []
    for row, example in enumerate(self.examples):
      np.testing.assert_array_equal(
        tokens[row], example.tokens[start : start + tokens.shape[1]]
      )
      follows = example.tokens[start + 1 : start + 1 + tokens.shape[1]].copy()
      if not keep[:, row, :, example.start].all():
        follows[-1] += 1
      out.append(self._logits(follows))
    return jnp.asarray(np.stack(out))


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("name", ["niah_multikey", "induction"])
def test_cells_count_what_is_answered(aware, name):
  length = 64
  task = retrieval_tasks(length)[name]
  reader = Knowing(task, length)
  found, sets = cells.ask(
    reader,
    Question(task=task, length=length, aware=aware, samples=4, rows=4),
    {"some": make_policy("streaming", sinks=0)},
    budgets=(1.0, 0.5),
    page_size=8,
    sinks=2,
    sets_of=("some",),
  )
  cut = length if aware else reader.examples[0].questions_start
  answer = task.answer_tokens(length)
  if aware and answer == 1:
    assert reader.asked == []
  else:
    assert set(reader.asked) == {(length - cut + answer - 1, cut)}
  for budget in (1.0, 0.5):
    first_kept = cut - round(budget * cut)
    kept = [example.start >= first_kept for example in reader.examples]
    assert not all(kept) or budget == 1
    expected = np.array(kept) | (not reader.asked)
    cell = found["some", budget]
    np.testing.assert_array_equal(cell.exact, expected)
    np.testing.assert_allclose(
      cell.tokens, np.where(expected, 1, (answer - 1) / answer)
    )
    assert cell.kept == pytest.approx(round(budget * cut) / cut)
    assert cell.paged == pytest.approx(
      -(-round(budget * cut) // 8) / -(-cut // 8)
    )
  assert sets["some"].shape == (4, 2, 3)
  assert not sets["some"].any()


def test_reading_again_keeps_the_best_of_all_heads_together(model):
  tokens = prompts(2, 40)
  scores = cells.reread(Reader(model), tokens, 36)
  assert scores.shape == (2, 2, 2, 40)
  assert (np.asarray(scores[..., :36]) > 0).all()
  assert (np.asarray(scores[..., 36:]) == 0).all()
  keep = np.asarray(cells.keep_reread(scores, 0.25, 36, 2))
  np.testing.assert_array_equal(keep.sum(axis=(0, 2, 3)), 36)
  assert keep[..., :2].all()
  worst = np.where(keep, scores, np.inf)[..., 2:].min(axis=(0, 2, 3))
  best = np.where(keep, -np.inf, scores).max(axis=(0, 2, 3))
  assert (worst >= best).all()


def test_gates_say_which_heads_look_back(model):
  tasks = [NeedleTask()]
  gates = np.array(cells.head_gates(Reader(model), tasks, 40, SETTINGS))
  assert gates.shape == (2, 2)
  assert ((gates > 0) & (gates < 1)).all()


SHAPE = CacheShape(3, 8)
POLICIES = methods(
  SETTINGS,
  length=128,
  theta=1e4,
  gates=tuple(
    tuple(map(float, row)) for row in np.random.default_rng(0).random(SHAPE)
  ),
)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", [0.2, 0.6])
def test_budgets_of_pages_are_as_large_as_fits(name, budget):
  policy = POLICIES[name]
  if name == "full":
    return

  def paged(asked):
    lengths = policy.plan(128, asked, SHAPE).lengths
    return pages(lengths, 8).sum() / (24 * 16)

  found = page_budget(policy, budget, length=128, shape=SHAPE, page_size=8)
  assert paged(found) <= budget or found == 0.001
  assert paged(found + 0.001) > budget


def test_without_middle_tokens_recent_ones_take_their_place():
  plan = POLICIES["task_kv no middle"].plan(128, 0.6, SHAPE)
  same = POLICIES["task_kv"].plan(128, 0.6, SHAPE)
  assert (plan.layers["middle"] == 0).all()
  assert (same.layers["middle"] > 0).all()
  np.testing.assert_array_equal(plan.lengths, same.lengths)
  no_full = POLICIES["task_kv no full"].plan(128, 0.6, SHAPE)
  assert (no_full.lengths < 128).all()


def test_intervals_against_published_values():
  # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
  for successes, samples, low, high in (
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
  ):
    found = stats.proportion(successes, samples)
    assert found.mean == successes / samples
    np.testing.assert_allclose(found[1:], (low, high), atol=5e-5)


def test_differences_are_paired():
  random = np.random.default_rng(0)
  hard = (random.random(400) < 0.5).astype(float)
  better = np.where(np.arange(400) % 20 == 0, 1 - hard, hard)
  same = stats.paired_difference([hard], [hard])
  assert same == (0, 0, 0)
  assert same.verdict() == "too small to tell"
  small = stats.paired_difference([hard], [np.maximum(hard, better)])
  # 5 % of the prompts differ; unpaired, 400 coins say +- 7 points.
  assert -0.06 < small.low < small.mean < small.high < 0
  assert small.verdict() == "no"
  assert stats.Interval(0.1, 0.01, 0.2).verdict() == "yes"
  # Cells count alike, whatever their size.
  mixed = stats.paired_difference(
    [np.ones(10), np.zeros(1000)], [np.zeros(10), np.zeros(1000)]
  )
  assert mixed == pytest.approx((0.5, 0.5, 0.5))


def test_interval_of_a_difference_covers_it():
  random = np.random.default_rng(3)
  covered = 0
  for _ in range(60):
    first = random.random((2, 60)) < 0.7
    second = random.random((2, 60)) < 0.5
    found = stats.paired_difference(list(first), list(second))
    covered += found.low <= 0.2 <= found.high
  assert 52 <= covered <= 60


def test_overlap_of_head_sets():
  first = np.zeros((2, 2, 4), bool)
  first[0, 0, [0, 1]] = first[1, 0, [1, 2]] = True
  second = np.zeros((1, 2, 4), bool)
  second[0, 0, [1]] = second[0, 1, [3]] = True
  # Layer 0: one of two, one of two; layer 1: nothing of one.
  np.testing.assert_allclose(stats.overlap(first, second), [[0.25], [0.25]])
  np.testing.assert_allclose(
    stats.overlap(first, first), [[1, 1 / 3], [1 / 3, 1]]
  )
  same = np.repeat(first[:1], 20, axis=0)
  other = np.repeat(first[1:], 20, axis=0)
  gap, within, across = stats.overlap_gap({"a": same, "b": other})
  assert (within, across) == (1.0, pytest.approx(1 / 3))
  assert gap.low == gap.high == pytest.approx(2 / 3)
  gap, *_ = stats.overlap_gap({"a": same, "b": same})
  assert gap == (0, 0, 0)
  # Few prompts: resamples are never of one prompt alone.
  gap, *_ = stats.overlap_gap({"a": same[:2], "b": other[:2]})
  assert gap.low == gap.high == pytest.approx(2 / 3)


def planted(gain):
  """One model; Task-KV answers more than the rest, by `gain` prompts."""
  names = (*POLICIES, "task_kv by pages", "snapkv by pages", "kvzip")
  table = {}
  for name in names:
    for budget in (1.0, 0.5):
      right = 100 if name == "full" or budget == 1 else 60
      right += gain if name.startswith("task_kv") and budget < 1 else 0
      exact = np.arange(100) < right
      table[name, budget] = Cell(exact, exact.astype(float), budget, budget)
  poor = {
    key: cell._replace(exact=cell.exact & False) for key, cell in table.items()
  }
  sets = np.ones((5, 2, 3), bool)
  mode = {"good": table, "one": table, "poor": poor}
  return {
    "aware": mode,
    "agnostic": mode,
    "one_token": {"one"},
    "sets": {
      "aware": {"good": sets, "one": sets},
      "agnostic": {"good": sets, "one": sets},
    },
  }


def test_claims_follow_the_cells(tmp_path):
  results = report.summary(
    [planted(10)], enough=0.8, page_size=8, record={"device": "none"}
  )
  assert json.loads(json.dumps(results)) == results
  assert results["judged"]["aware"] == ["seed 0: good"]
  assert results["judged"]["agnostic"] == ["seed 0: good", "seed 0: one"]
  answers = {
    (claim["claim"][0], claim["mode"], claim["budget"]): claim
    for claim in reversed(results["claims"])
  }
  for mode in ("aware", "agnostic"):
    first = answers["1", mode, "below 1"]
    assert first["answer"] == "yes"
    assert first["difference"][0] == pytest.approx(0.1)
    for number in "235":
      assert answers[number, mode, 0.5]["answer"] == "too small to tell"
  assert answers["4", "agnostic", "below 1"]["difference"] == [0, 0, 0]
  text = report.as_markdown(results)
  assert "| 1. Task-KV beats SnapKV at equal pages | aware | below 1 |" in text
  assert "| poor | 0.0 | 0.0 |" in text
  report.plot_budgets(results, tmp_path / "budgets.png")
  report.plot_claims(results, tmp_path / "claims.png")
  worse = report.summary([planted(-10)], enough=0.8, page_size=8, record={})
  assert worse["claims"][0]["answer"] == "no"


def test_nothing_is_judged_by_tasks_that_are_not_learnt(tmp_path):
  results = report.summary([planted(0)], enough=1.1, page_size=8, record={})
  assert results["claims"] == []
  assert "No task is answered well enough" in report.as_markdown(results)
  report.plot_budgets(results, tmp_path / "budgets.png")
  report.plot_claims(results, tmp_path / "claims.png")


def test_presets_have_curricula_that_fit():
  for preset in kv_eval.PRESETS.values():
    stages = kv_eval.curriculum(preset)
    assert [stage.length for stage in stages] == list(preset.lengths)
    hidden = {str(task) for task in stages[-1].task.tasks}
    asked = retrieval_tasks(preset.length).values()
    assert {str(task) for task in asked} <= hidden
    for stage in stages:
      for index in range(20):
        task = stage.task.at_turn(index)
        task.draw(stage.length, seed=0, index=index)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--preset tiny", "`--preset` must be one of cpu, long, smoke"),
    ("--steps 3", "`--steps` must have one number for each of `--lengths`"),
    ("--samples 0", "`--samples` must be at least 1"),
    ("--samples 150", "`--samples` must be a multiple of `--rows`"),
    ("--budgets 1 1.5", r"`--budgets` must be in \(0, 1\], got 1.5"),
    ("--budgets 0.5", "`--budgets` must hold 1"),
  ],
)
def test_mistakes_are_one_line(flags, message):
  with pytest.raises(UserError, match=message):
    kv_eval.parse(flags.split())


@pytest.mark.exhaustive
def test_smoke_run_leaves_its_results_and_asks_again_without_training(
  tmp_path, capsys
):
  command = kv_eval.parse(["--preset", "smoke", "--out", str(tmp_path / "out")])
  results = kv_eval.run(command)
  read = json.loads((command.out / "kv_eval.json").read_text())
  assert read == json.loads(json.dumps(results))
  assert set(results["methods"]["agnostic"]) > {"kvzip", "snapkv by pages"}
  assert "kvzip" not in results["methods"]["aware"]
  assert results["judged"]["aware"] == ["seed 0: niah_single"]
  for name in ("kv_eval_budgets.png", "kv_eval_claims.png", "kv_eval.md"):
    assert (command.out / name).stat().st_size > 1000
  capsys.readouterr()
  again = kv_eval.run(command)
  for name in ("methods", "tasks", "claims"):
    assert again[name] == results[name]
  metrics = (command.out / "seed0" / "metrics.jsonl").read_text()
  steps = [
    json.loads(line)["step"]
    for line in metrics.splitlines()
    if '"loss"' in line
  ]
  assert steps == [1, 2, 3, 4]
  asked = kv_eval.run(dataclasses.replace(command, ask_only=True))
  assert asked["trained_steps"] == [4]
  assert asked["methods"] == results["methods"]
  longer = dataclasses.replace(command.evaluation, steps=(2, 3))
  with pytest.raises(UserError, match="holds a model of other settings"):
    kv_eval.run(dataclasses.replace(command, evaluation=longer))


def test_nothing_can_be_asked_without_a_model(tmp_path):
  command = kv_eval.parse(["--preset", "smoke", "--ask-only"])
  command = dataclasses.replace(command, out=tmp_path / "none")
  with pytest.raises(UserError, match="holds no checkpoint"):
    kv_eval.run(command)


def test_policies_have_names_of_the_library():
  assert POLICIES["snapkv"] == make_policy(
    "snapkv", window=8, kernel=7, recent=8
  )
