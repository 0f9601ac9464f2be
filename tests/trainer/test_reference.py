"""Recomputed log-probabilities and replayed rounds: each row against the policy that sampled it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from learning_parts import Learned, Made, plain_logprobs, write_round

from pipeline.errors import RequestError, WorkError
from pipeline.layout import Run
from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]


def stored(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    return {row["rollout_id"]: np.array(row["logprobs"], np.float32) for table in tables for row in table.to_pylist()}


def test_every_row_is_recomputed_beside_its_round(
    learn_here: Learn, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path
) -> None:
    """The engine said nothing (text that came from elsewhere): the frozen snapshot says it, dropped rows included."""
    run = Run(tmp_path, "small")
    made = write_round(run, 0, policy, float64, logprobs=False)
    learned = learn_here(run.path, recipe(behaviour="recomputed"), out=run.snapshots)
    found = stored(run.reference(0))
    assert found.keys() == {row.rollout_id for row, _ in made.rows}
    for row, _ in made.rows:
        exact = plain_logprobs(float64, row.prompt_tokens, row.completion_tokens, made.temperature).detach().numpy()
        np.testing.assert_allclose(found[row.rollout_id], exact, atol=5e-6)
    assert learned.summary["logprob_gap"]["mean_abs"] < 1e-6
    assert learned.summary["engine_gap"] is None
    assert learned.log[0]["log_ratio_abs"] < 1e-4  # the policy that learns has not moved yet


def test_recomputed_stands_for_the_behaviour_policy(
    learn_here: Learn, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path
) -> None:
    """An engine that is off by 0.2 nats a token is refused, recomputed it is not, and both means are told."""
    run = Run(tmp_path, "small")
    write_round(run, 0, policy, float64, shift=0.2, noise=0.0)
    with pytest.raises(WorkError, match="disagree"):
        learn_here(run.path, recipe(), out=run.snapshots)
    assert not run.reference(0).exists()
    learned = learn_here(run.path, recipe(behaviour="recomputed"), out=run.snapshots)
    assert learned.summary["engine_gap"]["mean"] == pytest.approx(0.2, abs=1e-5)
    assert abs(learned.summary["logprob_gap"]["mean"]) < 1e-6
    assert learned.log[0]["log_ratio_abs"] < 1e-4


def test_it_is_computed_once(
    learn_here: Learn, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path, dataset: Made
) -> None:
    """Another beta1 over the same data finds it; what a killed pass left is not taken for it."""
    run = Run(tmp_path, "small")
    write_round(run, 0, policy, float64)
    run.reference(0).with_name(".tmp-round=0000").mkdir(parents=True)
    first = learn_here(run.path, recipe(behaviour="recomputed"), out=run.snapshots)
    record = run.reference(0) / "reference.json"
    written = record.stat().st_mtime_ns
    assert not list(run.reference(0).parent.glob(".tmp-*"))
    learn_here(run.path, recipe(behaviour="recomputed", beta1=0.5), out=run.snapshots)
    assert record.stat().st_mtime_ns == written
    tree = json.loads(record.read_bytes())
    tree["identity"]["dataset"] = "another"
    record.write_text(json.dumps(tree), encoding="utf-8")
    again = learn_here(run.path, recipe(behaviour="recomputed"), out=tmp_path / "elsewhere")
    assert record.stat().st_mtime_ns != written
    assert again.summary["snapshot_id"] == first.summary["snapshot_id"]


def test_another_policy_can_not_stand_for_the_one_that_sampled(
    learn_here: Learn, recipe: Recipes, dataset: Made
) -> None:
    first = learn_here(dataset.place, recipe())
    with pytest.raises(RequestError, match="can't recompute what that one sampled"):
        learn_here(dataset.place, recipe(behaviour="recomputed"), parent=first.snapshot, number=1)


def test_replay_takes_older_rounds_with_their_own_behaviour(
    learn_here: Learn, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path
) -> None:
    """Round 1 is sampled by the next policy; of round 0 each row keeps its log-probabilities and its lag."""
    from transformers import AutoModelForCausalLM

    run = Run(tmp_path, "small")
    write_round(run, 0, policy, float64, noise=0.0)
    first = learn_here(run.path, recipe(epochs=1), out=run.snapshots)
    model = AutoModelForCausalLM.from_pretrained(first.snapshot, dtype=torch.float64, attn_implementation="eager")
    write_round(run, 1, first.snapshot, model.eval(), noise=0.0, seed=1)
    wanted = recipe(epochs=1, batch_size=100, keep_optimizer=False)
    alone = learn_here(run.path, wanted, parent=first.snapshot, out=tmp_path / "alone", number=1)
    wanted = recipe(epochs=1, batch_size=100, keep_optimizer=False, replay_rounds=3)
    both = learn_here(run.path, wanted, parent=first.snapshot, out=tmp_path / "both", number=1)
    assert both.summary["sequences"] == alone.summary["sequences"] + first.summary["sequences"]
    assert both.summary["groups"] == 12
    # The gap is measured on the round that this policy wrote, or every replay would be refused.
    assert both.summary["logprob_gap"]["mean_abs"] < 1e-5
    assert both.summary["logprob_gap"]["tokens"] == alone.summary["logprob_gap"]["tokens"]
    # The policy is where round 1 was sampled, and has left where round 0 was.
    assert alone.log[0]["log_ratio_abs"] < 1e-4 < 0.01 < both.log[0]["log_ratio_abs"]


def test_replay_needs_a_run(learn_here: Learn, recipe: Recipes, dataset: Made) -> None:
    with pytest.raises(RequestError, match="replay_rounds needs a run's folder"):
        learn_here(dataset.place, recipe(replay_rounds=1))


def test_each_row_has_its_lag(learn_here: Learn, recipe: Recipes, policy: Path, float64: Any, tmp_path: Path) -> None:
    """Rows of an older snapshot are further behind than the round's own."""
    from transformers import AutoModelForCausalLM

    run = Run(tmp_path, "small")
    write_round(run, 0, policy, float64)
    first = learn_here(run.path, recipe(epochs=1), out=run.snapshots)
    model = AutoModelForCausalLM.from_pretrained(first.snapshot, dtype=torch.float64, attn_implementation="eager")
    write_round(run, 1, first.snapshot, model.eval(), seed=1)
    wanted = recipe(epochs=1, batch_size=100, replay_rounds=1)
    both = learn_here(run.path, wanted, parent=first.snapshot, out=run.snapshots, number=1)
    steps = first.summary["steps"]
    own, older = (both.summary["sequences"] - first.summary["sequences"]), first.summary["sequences"]
    assert both.log[0]["lag_max"] == steps + 1
    assert both.log[0]["lag"] == pytest.approx((own * 1 + older * (steps + 1)) / (own + older))
