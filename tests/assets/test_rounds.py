"""A real round through a real Dagster instance, with real vLLM and DeepSpeed, and what happens after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from asset_world import World, run_rounds, write_recipe

from pipeline.rollouts.schema import STATUSES

ASSETS = ["prompt_set", "frozen_policy", "rollouts", "verdicts", "rollout_dataset", "trained_policy", "pass_at_k"]


@pytest.fixture
def instance(world: World) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(world.root / "dagster")) as found:
        yield found


def materialise(world: World, instance: dg.DagsterInstance, job: str, root: Path | None = None, **settings: Any) -> Any:
    from assets.definitions import defs
    from assets.running.settings import Chosen

    return defs.resolve_job_def(job).execute_in_process(
        instance=instance,
        partition_key="0000",
        raise_on_error=False,
        run_config={"loggers": {"terminal": {}}, **settings},
        resources={"run_folder": Chosen(root or world.root, str(world.recipe))},
    )


def latest(instance: dg.DagsterInstance, asset: str) -> dg.AssetMaterialization:
    event = instance.get_latest_materialization_event(dg.AssetKey(asset))
    assert event is not None and event.asset_materialization is not None
    return event.asset_materialization


def failure(result: Any, step: str) -> str:
    data = result.failure_data_for_node(step)
    assert data is not None and data.user_failure_data is not None
    return str(data.user_failure_data.description)


def test_a_round_leaves_runs_metadata_and_picture(world: World, instance: dg.DagsterInstance) -> None:
    (run,) = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.SUCCESS], tags={"oapl/run": "tiny"}))[-1:]
    assert run.tags["dagster/partition"] == "0000" and run.job_name == "whole_round"
    for asset in ASSETS:
        assert latest(instance, asset).partition == (None if asset == "prompt_set" else "0000")
    rollouts = latest(instance, "rollouts").metadata
    assert rollouts["dagster/row_count"].value == 48 and rollouts["groups"].value == 12
    columns = rollouts["dagster/column_lineage"].value.deps_by_column
    assert columns["prompt_id"][0].asset_key == dg.AssetKey("prompt_set")
    assert "![" in latest(instance, "pass_at_k").metadata["picture"].value
    shown = latest(instance, "verdicts").metadata["samples"].value.splitlines()[2:]
    assert len(shown) == 9 and all(any(f"| {status} |" in row for status in STATUSES) for row in shown)


def test_the_next_round_can_be_launched(world: World, instance: dg.DagsterInstance) -> None:
    assert instance.get_dynamic_partitions("rounds") == ["0000", "0001"]


def test_every_check_was_reported(world: World, instance: dg.DagsterInstance) -> None:
    from assets.checks import CHECKS

    for asset, checks in CHECKS.items():
        for name in checks:
            key = dg.AssetCheckKey(dg.AssetKey(asset), name)
            records = instance.event_log_storage.get_asset_check_execution_history(key, limit=50)
            assert records, f"{asset}: {name} was never reported"


def test_summary_keeps_its_contract(world: World) -> None:
    start, first = json.loads(world.run.summary.read_text())["rounds"]
    assert start["round"] is None and start["step"] == 0 and start["generated"] == 0
    assert first["round"] == 0 and first["step"] > 0 and first["generated"] == 48
    for entry in (start, first):
        assert set(entry["eval"]) == set(entry["ci"]) == {"1", "4"}
        for k, (low, high) in entry["ci"].items():
            assert low <= entry["eval"][k] <= high
        assert set(entry["seconds"]) == {"generate", "verify", "learn", "evaluate"}
        assert (world.run.snapshots / entry["snapshot_id"] / "snapshot.json").exists()
    assert start["seconds"]["generate"] == 0 < start["seconds"]["evaluate"]
    assert all(first["seconds"].values()) and 0 < first["reward_mean"] < 1
    assert world.run.picture.read_bytes().startswith(b"\x89PNG") and "<table>" in world.run.page.read_text()


def test_the_terminal_sees_stages_and_table(world: World) -> None:
    assert "round 0000 · learn: done" in world.said and "pass@4" in world.said and "rounds.png" in world.said
    assert "DEBUG" not in world.said and len(world.said.splitlines()) < 60


def test_a_second_call_redoes_nothing(world: World, instance: dg.DagsterInstance) -> None:
    runs = instance.get_runs_count()
    again = run_rounds("--root", str(world.root), "--recipe", str(world.recipe), timeout=60)
    assert again.returncode == 0 and "round 0000: was done before" in again.stderr
    assert instance.get_runs_count() == runs


def test_materialising_again_changes_nothing(world: World, instance: dg.DagsterInstance) -> None:
    def state() -> dict[str, bytes]:
        kept = ("rollouts", "verdicts", "snapshots", "evaluations", "stages")
        files = (path for name in kept for path in (world.run.path / name).rglob("*") if path.is_file())
        return {
            str(path): path.read_bytes() for path in files if path.suffix != ".yaml" and path.name != "scoring.json"
        }

    def without_seconds(files: dict[str, bytes]) -> dict[str, Any]:
        stages = {name: json.loads(text) for name, text in files.items() if "/stages/" in name and text}
        for stage in (stage for record in stages.values() for stage in record.values()):
            stage.pop("seconds")
        return {name: stages.get(name, text) for name, text in files.items()}

    before = without_seconds(state())
    assert materialise(world, instance, "whole_round").success
    assert without_seconds(state()) == before


def test_another_beta2_publishes_another_snapshot_of_the_same_parent(
    world: World, instance: dg.DagsterInstance
) -> None:
    from assets.definitions import defs
    from assets.jobs import training_round

    before = latest(instance, "trained_policy").metadata
    result = defs.resolve_job_def(training_round.name).execute_in_process(
        instance=instance,
        partition_key="0000",
        asset_selection=[dg.AssetKey("trained_policy")],
        run_config={"ops": {"trained_policy": {"config": {"beta2": 0.5}}}, "loggers": {"terminal": {}}},
    )
    assert result.success
    after = latest(instance, "trained_policy").metadata
    assert after["snapshot"].value != before["snapshot"].value
    assert after["parent"].value == before["parent"].value
    assert after["loss"].value != before["loss"].value


@pytest.mark.parametrize(
    ("step", "config", "said"),
    [
        ("trained_policy", {"beta2": -1.0}, "trained_policy, beta2"),
        ("rollouts", {"samples": 1}, "rollouts, samples"),
        ("pass_at_k", {"samples": 2, "ks": [4]}, "pass@4 needs at least 4 samples"),
    ],
)
def test_nonsense_is_refused_before_anything_starts(
    world: World, instance: dg.DagsterInstance, step: str, config: dict[str, Any], said: str
) -> None:
    result = materialise(world, instance, "whole_round", ops={step: {"config": config}})
    assert not result.success
    assert said in failure(result, "prompt_set")
    assert not result.get_asset_materialization_events()


def test_a_damaged_shard_stops_the_round(world: World, instance: dg.DagsterInstance, tmp_path: Path) -> None:
    shutil.copytree(world.run.path, tmp_path / "runs" / "tiny")
    (shard,) = (tmp_path / "runs" / "tiny" / "rollouts" / "round=0000").glob("part-*.parquet")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    with dg.DagsterInstance.ephemeral() as alone:
        alone.add_dynamic_partitions("rounds", ["0000"])
        result = materialise(world, alone, "whole_round", root=tmp_path)
        assert not result.success
        failed = [check for check in result.get_asset_check_evaluations() if not check.passed]
        assert {check.check_name: check.blocking for check in failed} == {"schema_and_counts": True, "entropy": False}
        made = {event.asset_key.path[-1] for event in result.get_asset_materialization_events()}
        assert made == {"prompt_set", "frozen_policy", "rollouts"}


def test_the_launchpad_offers_settings_and_no_paths(world: World) -> None:
    from dagster._core.snap import JobSnap
    from dagster._core.snap.snap_to_yaml import default_values_yaml_from_type_snap

    from assets.config import CONFIGS
    from assets.definitions import defs

    job = JobSnap.from_job_def(defs.resolve_job_def("whole_round"))
    schema = job.config_schema_snapshot
    shown = default_values_yaml_from_type_snap(schema, schema.get_config_snap(job.mode_def_snaps[0].root_config_key))
    offered = yaml.safe_load(shown)
    assert list(offered) == ["ops"] and set(offered["ops"]) == set(CONFIGS)
    assert offered["ops"]["rollouts"]["config"]["prompts"] == 12
    assert str(world.root) not in shown


def test_what_the_lineage_launches_is_seen_as_work_on_the_round(world: World, instance: dg.DagsterInstance) -> None:
    """Such runs come without our tags; automation looks for those."""
    from assets.definitions import defs

    result = defs.resolve_implicit_global_asset_job_def().execute_in_process(
        instance=instance,
        partition_key="0000",
        asset_selection=[dg.AssetKey("frozen_policy")],
        run_config={"loggers": {"terminal": {}}},
    )
    run = instance.get_run_by_id(result.run_id)
    assert result.success and run is not None and run.tags["oapl/run"] == "tiny"


@pytest.mark.parametrize("partition", ["first", "7", "-001", "²"])
def test_a_partition_that_is_no_round_says_so(world: World, instance: dg.DagsterInstance, partition: str) -> None:
    from assets.definitions import defs

    instance.add_dynamic_partitions("rounds", [partition])
    try:
        result = defs.resolve_job_def("generation_round").execute_in_process(
            instance=instance, partition_key=partition, raise_on_error=False, run_config={"loggers": {"terminal": {}}}
        )
        said = failure(result, "prompt_set")
        assert said == f"partition {partition!r} is no round; rounds are named 0000, 0001, ..."
    finally:
        instance.delete_dynamic_partition("rounds", partition)


def test_a_round_without_a_policy_says_so(world: World, instance: dg.DagsterInstance) -> None:
    from assets.definitions import defs

    instance.add_dynamic_partitions("rounds", ["0007"])
    try:
        result = defs.resolve_job_def("generation_round").execute_in_process(
            instance=instance, partition_key="0007", raise_on_error=False, run_config={"loggers": {"terminal": {}}}
        )
        assert "round 6 has published no snapshot" in failure(result, "frozen_policy")
    finally:
        instance.delete_dynamic_partition("rounds", "0007")


def test_other_settings_are_refused_by_name(world: World) -> None:
    words = ("--root", str(world.root), "--recipe", str(world.recipe), "--set", "learning.beta1=2.0")
    refused = run_rounds(*words, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr.startswith("oapl: ") and "learning.beta1: 1.0 -> 2.0" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_failed_stage_is_one_line(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, policy={"model": str(tmp_path / "no such model")})
    failed = run_rounds("--root", str(tmp_path / "data"), "--recipe", str(recipe), timeout=60)
    assert failed.returncode == 2
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("oapl: ")]
    assert "no such model" in line and "Traceback" not in failed.stderr


@pytest.mark.parametrize("words", [["--recipe", "nonesuch"], ["--set", "learning.beta2=banana"]])
def test_a_bad_recipe_is_one_line(tmp_path: Path, words: list[str]) -> None:
    refused = run_rounds("--root", str(tmp_path), *words, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr.startswith("oapl: ") and refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_round_that_learns_leaves_a_curve(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real learner, on the world's rollouts: observations of the round, while its step runs."""
    from assets.definitions import defs

    monkeypatch.setattr("assets.learning_curve.LEAST_S", 0.0)
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
