"""Rounds that open by themselves: after one another, or at night; and word of those that failed.

Whoever opens a round asks `why_not` first, and names the run of Dagster by the round: no round is opened twice.
"""

from __future__ import annotations

import json
import os
import urllib.request

import dagster as dg

from assets.jobs import whole_round
from assets.rounds import CHOSEN, PARTITION, RECIPE, RUN_NAME, open_rounds, rounds, unfinished
from pipeline.layout import Run, round_key
from pipeline.policies import snapshots
from pipeline.runs.stages import read_stages

WEBHOOK = "OAPL_WEBHOOK"
WEBHOOK_TIMEOUT_S = 10


def newest_round(run: Run) -> int:
    """The last round that has been begun, -1 before the first."""
    begun = run.rounds()
    return begun[-1] if begun else -1


def why_not(instance: dg.DagsterInstance, run: Run, lag: int) -> str | None:
    """Why the next round must not be opened now; null where it may be.

    With `lag` it may be while the round before is still learned, once that one's rollouts are judged.
    """
    working = unfinished(instance, limit=2)
    last = newest_round(run)
    for found in working:
        round = found.tags.get(PARTITION, "?")
        if not lag or len(working) > 1 or round != round_key(last) or "verify" not in read_stages(run, last):
            return f"run {found.run_id[:8]} is working on round {round}"
    needed = last - lag if working else last
    if needed >= 0 and snapshots.newest(run, needed) is None:
        return f"nothing is new since round {last} was opened: round {needed} has not published its policy"
    return None


def _request(instance: dg.DagsterInstance, run: Run) -> dg.RunRequest:
    number = newest_round(run) + 1
    open_rounds(instance, number)
    return dg.RunRequest(
        run_key=f"{run.name}/{round_key(number)}",
        partition_key=round_key(number),
        tags={"oapl/started_by": "automation"},
    )


@dg.sensor(job=whole_round, minimum_interval_seconds=15, default_status=dg.DefaultSensorStatus.STOPPED)
def next_round(context: dg.SensorEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Opens round k+1 when round k has published its policy, until the run has the recipe's number of rounds.

    Where the recipe has `lag_rounds`, it is opened as soon as round k is judged and learning begins.
    """
    CHOSEN.bring()
    run, recipe = CHOSEN.open()
    number = newest_round(run) + 1
    if number == 0:
        return dg.SkipReason("no round was begun; launch round 0000")
    if number >= recipe.rounds:
        return dg.SkipReason(f"all {recipe.rounds} rounds of the recipe are made")
    reason = why_not(context.instance, run, recipe.lag_rounds)
    return dg.SkipReason(reason) if reason else _request(context.instance, run)


@dg.schedule(
    job=whole_round,
    cron_schedule=RECIPE.nightly.cron,
    execution_timezone=RECIPE.nightly.time_zone,
    default_status=dg.DefaultScheduleStatus.STOPPED,
)
def nightly_retraining(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Opens the next round, whatever their number; skips while one is being made, or where nothing is new."""
    CHOSEN.bring()
    run, recipe = CHOSEN.open()
    reason = why_not(context.instance, run, recipe.lag_rounds)
    return dg.SkipReason(reason) if reason else _request(context.instance, run)


@dg.sensor(minimum_interval_seconds=30, default_status=dg.DefaultSensorStatus.RUNNING)
def known_rounds(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Keeps a partition for each round in the data folder, and for the next; files may come from elsewhere."""
    CHOSEN.bring()
    number = newest_round(Run(CHOSEN.root, RUN_NAME)) + 1
    there = set(context.instance.get_dynamic_partitions(str(rounds.name)))
    missing = [key for key in map(round_key, range(number + 1)) if key not in there]
    if not missing:
        return dg.SensorResult(skip_reason=f"rounds up to {round_key(number)} can be launched")
    return dg.SensorResult(dynamic_partitions_requests=[rounds.build_add_request(missing)])


@dg.run_failure_sensor(
    name="report_failures",
    description=f"Posts a JSON object about each failed run to the address in ${WEBHOOK}.",
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.RUNNING if os.environ.get(WEBHOOK) else dg.DefaultSensorStatus.STOPPED,
)
def report_failures(context: dg.RunFailureSensorContext) -> None:
    if context.dagster_run.tags.get("oapl/run") != RUN_NAME:
        return
    address = os.environ.get(WEBHOOK)
    if not address:
        raise dg.Failure(f"${WEBHOOK} is not set; give it an address, or turn this sensor off")
    failed = context.dagster_run
    word = {
        "text": f"{RUN_NAME}: {failed.job_name} of round {failed.tags.get(PARTITION, '?')} failed: {_why(context)}",
        "run": RUN_NAME,
        "round": failed.tags.get(PARTITION),
        "job": failed.job_name,
        "run_id": failed.run_id,
        "reason": _why(context),
    }
    request = urllib.request.Request(address, json.dumps(word).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=WEBHOOK_TIMEOUT_S):
        context.log.info(f"reported run {failed.run_id}")


def _why(context: dg.RunFailureSensorContext) -> str:
    """The first failed step's own line, else what Dagster says."""
    for event in context.get_step_failure_events():
        data = event.step_failure_data.user_failure_data
        if data is not None and data.description:
            return data.description
    return " ".join((context.failure_event.message or "").split())
