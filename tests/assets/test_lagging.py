"""With `lag_rounds`, an engine works on a round while the learner is at the one before: a real daemon shows it."""

from __future__ import annotations

import json
from pathlib import Path

import dagster as dg
import pytest
from asset_world import RECIPE, World, write_recipe
from dagster_site import Site, served, wait_for

from assets.running.instance import prepare_home
from pipeline.layout import Run
from pipeline.policies import snapshots

pytestmark = pytest.mark.system  # some minutes

ROUNDS = ("0000", "0001")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str], int]:
    """Two rounds, the second launched while the first generates; Dagster's runs, and the most that were under way."""
    folder = tmp_path_factory.mktemp("lagging")
    learning = RECIPE["learning"] | {"epochs": 12, "drop_uniform_groups": False}
    recipe = write_recipe(folder, lag_rounds=1, rounds=2, learning=learning)
    root = folder / "data"
    root.mkdir()
    with dg.DagsterInstance.from_config(str(prepare_home(root))) as instance:
        instance.add_dynamic_partitions("rounds", list(ROUNDS))
    with served(World(root, recipe, "")) as site:
        launched = [site.launch("whole_round", ROUNDS[0])]
        wait_for(Run(root, "tiny").log("generate", 0).exists, 200, "the first round's engine")
        launched.append(site.launch("whole_round", ROUNDS[1]))
        together = wait_until_made(site, launched)
    return (Run(root, "tiny"), launched, together)


def wait_until_made(site: Site, launched: list[str]) -> int:
    most = 0

    def made() -> bool:
        nonlocal most
        statuses = [site.status(run_id) for run_id in launched]
        most = max(most, statuses.count("STARTED"))
        assert not {"FAILURE", "CANCELED"} & set(statuses), statuses
        return statuses == ["SUCCESS"] * len(launched)

    wait_for(made, 500, "both rounds")
    return most


def spans(run: Run, run_id: str) -> dict[str, tuple[float, float]]:
    """When each step of a run of Dagster's last began and ended, in seconds since the epoch."""
    with dg.DagsterInstance.from_config(str(prepare_home(run.data))) as instance:
        stats = instance.get_run_step_stats(run_id)
    return {found.step_key: (found.attempts_list[-1].start_time, found.end_time) for found in stats}


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return min(one[1], other[1]) > max(one[0], other[0])


def test_generation_runs_while_the_round_before_is_learned(made: tuple[Run, list[str], int]) -> None:
    run, launched, together = made
    assert together == 2
    first, second = (spans(run, run_id) for run_id in launched)
    # One engine and one learner at a time.
    assert not overlap(first["rollouts"], second["rollouts"])
    assert first["trained_policy"][1] <= second["trained_policy"][0]
    assert overlap(first["trained_policy"], second["rollouts"]), (first, second)


def test_each_round_lags_by_one(made: tuple[Run, list[str], int]) -> None:
    """Both rounds are written by the start, and the second is learned by what the first one published."""
    run, _, _ = made
    start, first, second = (snapshots.newest(run, number) for number in (None, 0, 1))
    assert start is not None and first is not None and second is not None
    assert [snapshots.frozen_for(run, number, 1) for number in range(3)] == [start, start, first]
    assert (first.parent, second.parent) == (start.snapshot_id, first.snapshot_id)
    for number, behind in enumerate((0, first.step)):
        lags = [json.loads(line)["lag"] for line in Path(run.learning_log(number)).read_text().splitlines()]
        assert lags == [behind + step for step in range(1, len(lags) + 1)]
