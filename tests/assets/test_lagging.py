"""With `lag_rounds`, an engine works on a round while the learner is at the one before: a real daemon shows it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import dagster as dg
import pytest
from asset_world import RECIPE, World, write_recipe
from dagster_site import Site, served, wait_for

from assets.instance import prepare_home
from pipeline import snapshots
from pipeline.layout import Run

ROUNDS = ("0000", "0001", "0002")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[str], int]:
    """Three rounds launched at once and made, Dagster's runs of them, and the most that were under way together."""
    folder = tmp_path_factory.mktemp("lagging")
    learning = RECIPE["learning"] | {"epochs": 12, "drop_uniform_groups": False}
    recipe = write_recipe(folder, lag_rounds=1, rounds=3, learning=learning)
    root = folder / "data"
    root.mkdir()
    with dg.DagsterInstance.from_config(str(prepare_home(root))) as instance:
        instance.add_dynamic_partitions("rounds", list(ROUNDS))
    with served(World(root, recipe, "")) as site:
        launched = [site.launch("whole_round", number) for number in ROUNDS]
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

    wait_for(made, 500, "three rounds")
    return most


def spans(run: Run, run_id: str) -> dict[str, tuple[float, float]]:
    """When each step of a run of Dagster's last began and ended, in seconds since the epoch."""
    with dg.DagsterInstance.from_config(str(prepare_home(run.data))) as instance:
        stats = instance.get_run_step_stats(run_id)
    return {found.step_key: (found.attempts_list[-1].start_time, found.end_time) for found in stats}


def test_generation_runs_while_the_round_before_is_learned(made: tuple[Run, list[str], int]) -> None:
    run, launched, together = made
    assert together == 2  # the third waited in the queue
    steps = [spans(run, run_id) for run_id in launched]
    for one, other in pairwise(steps):
        assert max(one["rollouts"][0], other["rollouts"][0]) >= min(one["rollouts"][1], other["rollouts"][1])
        assert one["trained_policy"][1] <= other["trained_policy"][0]
    ahead = [
        min(one["trained_policy"][1], other["rollouts"][1]) - max(one["trained_policy"][0], other["rollouts"][0])
        for one, other in pairwise(steps)
    ]
    assert max(ahead) > 1, steps


def test_each_round_lags_by_one(made: tuple[Run, list[str], int]) -> None:
    """Round k is written by what round k-2 published, and learned by what round k-1 did."""
    run, _, _ = made
    published = [snapshots.newest(run, None), *(snapshots.newest(run, number) for number in range(3))]
    assert None not in published
    start, *others = (snapshot for snapshot in published if snapshot is not None)
    assert [snapshots.frozen_for(run, number, 1) for number in range(3)] == [start, start, others[0]]
    assert [snapshot.parent for snapshot in others] == [start.snapshot_id, *(s.snapshot_id for s in others[:2])]
    steps = [0, *(snapshot.step for snapshot in others)]
    for number, behind in enumerate((0, steps[1] - steps[0], steps[2] - steps[1])):
        lags = [json.loads(line)["lag"] for line in Path(run.learning_log(number)).read_text().splitlines()]
        assert lags == [behind + step for step in range(1, len(lags) + 1)]
