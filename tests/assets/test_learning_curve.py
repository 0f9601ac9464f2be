"""What a learning step tells while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest
from asset_world import World

from assets import learning_curve
from assets.learning_curve import LearningCurve


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(log: Path, *steps: int, mode: str = "a") -> None:
    """A step's loss is its number, its gradient norm ten times that; `seconds` is nobody's concern here."""
    with log.open(mode) as file:
        file.writelines(json.dumps({"step": n, "loss": n, "grad_norm": 10 * n, "seconds": 1}) + "\n" for n in steps)


def test_means_since_the_last_point(tmp_path: Path) -> None:
    clock, told = Clock(), list[tuple[int, dict[str, float]]]()
    log = tmp_path / "log.jsonl"
    curve = LearningCurve(log, lambda step, means: told.append((step, means)), clock)
    write(log, 1, 2)
    curve("learn: 2/2,000 steps, 6 s left")  # too early
    clock.now = 10.0
    curve("recompute: 1/3 row groups, 6 s left")  # not of learning
    assert told == []
    curve("learn: 2/2,000 steps, loss 0.1, 6 s left")
    clock.now = 20.0
    curve("learn: 2/2,000 steps, loss 0.1, 6 s left")  # nothing new
    write(log, *range(3, 1002))
    curve("learn: 1,001/2,000 steps, loss 0.1, 6 s left")
    assert told == [(2, {"loss": 1.5, "gradient norm": 15.0}), (1001, {"loss": 502.0, "gradient norm": 5020.0})]


def test_steps_of_an_earlier_process_are_left_out(tmp_path: Path) -> None:
    clock, told = Clock(), list[tuple[int, dict[str, float]]]()
    log = tmp_path / "log.jsonl"
    write(log, 1, 2, 3, 4)
    curve = LearningCurve(log, lambda step, means: told.append((step, means)), clock)
    write(log, 1, 2, 3, mode="w")  # those after the checkpoint are made again
    write(log, 4, 5)
    clock.now = 11.0
    curve("learn: 2/7 steps, 6 s left")
    assert told == [(5, {"loss": 4.5, "gradient norm": 45.0})]


def test_a_day_has_some_hundred_points(tmp_path: Path) -> None:
    clock, told = Clock(), list[int]()
    log = tmp_path / "log.jsonl"
    curve = LearningCurve(log, lambda step, means: told.append(step), clock)
    for number in range(1, 24 * 3600 // 30):  # a step and a line each half minute
        write(log, number)
        clock.now += 30
        curve(f"learn: {number:,}/20,000 steps, 6 s left")
    assert 100 < len(told) < 400
    assert told[:3] == [1, 2, 3]


def test_a_round_that_learns_leaves_a_curve(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real learner, on the world's rollouts: observations of the round, while its step runs."""
    from assets.definitions import defs

    monkeypatch.setattr(learning_curve, "LEAST_S", 0.0)
    with dg.DagsterInstance.from_config(str(world.root / "dagster")) as instance:
        result = defs.resolve_job_def("training_round").execute_in_process(
            instance=instance,
            partition_key="0000",
            asset_selection=[dg.AssetKey("trained_policy")],
            run_config={"ops": {"trained_policy": {"config": {"epochs": 3}}}, "loggers": {"terminal": {}}},
        )
        assert result.success
        seen = [event.asset_observation_data.asset_observation for event in result.get_asset_observation_events()]
        (made,) = result.get_asset_materialization_events()
    assert seen and {found.partition for found in seen} == {"0000"}
    for found in seen:
        numbers = {name: value.value for name, value in found.metadata.items()}
        assert numbers["loss"] > 0 and numbers["gradient norm"] > 0
        # The same names as in the round's own numbers.
        assert set(numbers) <= set(made.materialization.metadata)
    steps = [int(found.metadata["step"].value) for found in seen]
    assert steps == sorted(steps) and steps[-1] == made.materialization.metadata["step"].value
