"""When rounds open by themselves, and when they must not."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from asset_world import World

from assets.running.instance import prepare_home
from pipeline.layout import Run
from pipeline.runs.stages import note_stage


@pytest.fixture
def copied(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The world's run in a folder of its own, with three rounds to make; automation looks at it."""
    from assets import automation
    from assets.running.settings import Chosen

    run = Run(tmp_path / "data", "tiny")
    shutil.copytree(world.run.path, run.path)
    for folder in ("rollouts", "verdicts", "snapshots"):  # what later rounds of other tests left
        for path in (run.path / folder).glob("*"):
            if "round=" in path.name and path.name != "round=0000":
                shutil.rmtree(path)
    run.recipe.write_text(run.recipe.read_text().replace("rounds: 1\n", "rounds: 3\n"))
    monkeypatch.setattr(automation, "CHOSEN", Chosen(run.data, "tiny"))
    return run


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(prepare_home(tmp_path))) as found:
        yield found


def tick(instance: dg.DagsterInstance, name: str) -> Any:
    from assets import automation

    if name == "nightly_retraining":
        return automation.nightly_retraining(dg.build_schedule_context(instance=instance))
    return getattr(automation, name)(dg.build_sensor_context(instance=instance))


@pytest.mark.parametrize("name", ["next_round", "nightly_retraining"])
def test_a_published_policy_opens_the_next_round_once(copied: Run, instance: dg.DagsterInstance, name: str) -> None:
    request = tick(instance, name)
    assert request.partition_key == "0001" and "0001" in instance.get_dynamic_partitions("rounds")
    # Dagster makes one run of a key, so asking twice opens one round.
    assert tick(instance, name).run_key == request.run_key == "tiny/0001"


@pytest.mark.parametrize("name", ["next_round", "nightly_retraining"])
def test_an_unfinished_round_is_not_passed_over(copied: Run, instance: dg.DagsterInstance, name: str) -> None:
    copied.rollouts(1).mkdir()
    assert "has not published its policy" in tick(instance, name).skip_message


@pytest.mark.parametrize("name", ["next_round", "nightly_retraining"])
@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED])
def test_one_round_at_a_time(copied: Run, instance: dg.DagsterInstance, name: str, status: dg.DagsterRunStatus) -> None:
    tags = {"oapl/run": "tiny", "dagster/partition": "0001"}
    run = dg.DagsterRun(job_name="whole_round", run_id="a" * 36, status=status, tags=tags)
    instance.add_run(run)
    assert tick(instance, name).skip_message == "run aaaaaaaa is working on round 0001"


@pytest.mark.parametrize("name", ["next_round", "nightly_retraining"])
def test_a_lagging_run_opens_a_round_while_the_one_before_is_learned(
    copied: Run, instance: dg.DagsterInstance, name: str
) -> None:
    copied.recipe.write_text(copied.recipe.read_text().replace("lag_rounds: 0\n", "lag_rounds: 1\n"))
    copied.rollouts(1).mkdir()
    copied.stages(1).unlink(missing_ok=True)
    work_on(instance, "a", "0001")
    assert tick(instance, name).skip_message == "run aaaaaaaa is working on round 0001"
    note_stage(copied, 1, "verify", seconds=1.0)
    assert tick(instance, name).partition_key == "0002"
    work_on(instance, "b", "0002")
    assert "is working on round" in tick(instance, name).skip_message


def work_on(instance: dg.DagsterInstance, letter: str, partition: str) -> None:
    tags = {"oapl/run": "tiny", "dagster/partition": partition}
    status = dg.DagsterRunStatus.STARTED
    instance.add_run(dg.DagsterRun(job_name="whole_round", run_id=letter * 36, status=status, tags=tags))


def test_rounds_stop_at_the_recipes_number(copied: Run, instance: dg.DagsterInstance) -> None:
    copied.recipe.write_text(copied.recipe.read_text().replace("rounds: 3\n", "rounds: 1\n"))
    assert tick(instance, "next_round").skip_message == "all 1 rounds of the recipe are made"
    assert tick(instance, "nightly_retraining").partition_key == "0001"  # retraining has no end


def test_rounds_that_came_from_elsewhere_are_known(copied: Run, instance: dg.DagsterInstance) -> None:
    (asked,) = tick(instance, "known_rounds").dynamic_partitions_requests
    assert asked.partition_keys == ["0000", "0001"]
    instance.add_dynamic_partitions("rounds", asked.partition_keys)
    assert not tick(instance, "known_rounds").dynamic_partitions_requests


def test_a_failure_is_posted(
    world: World, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from assets.automation import report_failures
    from assets.definitions import defs
    from assets.running.settings import Chosen

    heard: list[dict[str, Any]] = []

    class Ear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Ear)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OAPL_WEBHOOK", f"http://127.0.0.1:{server.server_port}/hook")
    instance.add_dynamic_partitions("rounds", ["0003"])
    failed = defs.resolve_job_def("generation_round").execute_in_process(
        instance=instance,
        partition_key="0003",
        raise_on_error=False,
        run_config={"loggers": {"terminal": {}}},
        resources={"run_folder": Chosen(tmp_path, str(world.recipe))},
    )
    try:
        context = dg.build_run_status_sensor_context(
            "report_failures", failed.get_run_failure_event(), instance, failed.dagster_run
        )
        report_failures(context.for_run_failure())
    finally:
        server.shutdown()
        server.server_close()
    (word,) = heard
    assert word["run"] == "tiny" and word["round"] == "0003" and word["run_id"] == failed.run_id
    assert "round 3 has no policy to freeze" in word["reason"]
