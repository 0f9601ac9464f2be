"""Asset `trained_policy`."""

import json
from collections.abc import Iterable
from typing import Any

import dagster as dg

from assets import checks
from assets.config import LearningConfig
from assets.frozen_policy import frozen_policy
from assets.learning_curve import LABELS, LearningCurve, Observe
from assets.metadata import Made, snapshot_link, tidy
from assets.resources import RunFolder, Step, step
from assets.rounds import GROUP, PREFIX, open_rounds, rounds, unfinished
from assets.running.instance import LEARNER_POOL
from assets.verdicts import verdicts
from pipeline.policies import snapshots
from pipeline.recipe import Learning
from pipeline.runs.stages import read_stages

STAGE = "learn"
STARTING = {"launcher", "hosts"}
"""Settings of where ranks run: what is learned does not hang on them."""
WAIT_S, WAITS = 10, 1 << 20


@dg.asset(
    key_prefix=PREFIX,
    partitions_def=rounds,
    deps=[frozen_policy, verdicts],
    group_name=GROUP,
    kinds={"deepspeed", "huggingface"},
    pool=LEARNER_POOL,
    check_specs=checks.specs("trained_policy"),
)
def trained_policy(context: dg.AssetExecutionContext, run_folder: RunFolder, config: LearningConfig) -> Made:
    """The next snapshot: the policy after learning from the round's rollouts with the OAPL loss, by DeepSpeed.

    **Grain:** one snapshot a round, immutable, each file hashed. **Source:** `rollouts` and `verdicts` of the round,
    read as Parquet, and the policy published before, which is not the frozen one where the recipe's `lag_rounds` lets
    generation run ahead. Materialising it again under other settings publishes another snapshot; a round that goes on
    from here takes the newest.
    """
    with step(context, run_folder, config) as work:
        _let_the_round_before_end(work)
        if not _learned(work):
            _learn(work)
        open_rounds(context.instance, work.round + 1)
        return _result(work)


def _let_the_round_before_end(work: Step) -> None:
    """Rounds that overlap may come here out of order. The later one gives its slot back, and tries again."""
    before = work.round - 1
    if not work.recipe.lag_rounds or before < 0 or snapshots.newest(work.run, before) is not None:
        return
    if unfinished(work.context.instance, limit=1, round=before):
        work.say(f"{STAGE}: waits for round {before}, which is not learned yet")
        raise dg.RetryRequested(max_retries=WAITS, seconds_to_wait=WAIT_S)


def _inputs(work: Step) -> dict[str, Any]:
    """What the snapshot is made from; the same again makes nothing new."""
    from pipeline.rollouts.store import read_manifest
    from pipeline.scoring.score import read_summary

    summary = read_summary(work.run.verdicts(work.round))
    return {
        "rollouts": read_manifest(work.run.rollouts(work.round)).digest,
        "verdicts": summary.versions if summary else {},
        "policy": _parent(work).snapshot_id,
        "seed": work.recipe.seed,
        **work.recipe.learning.model_dump(mode="json", exclude=STARTING),
    }


def _parent(work: Step) -> snapshots.Snapshot:
    """What is learned from: what wrote the rollouts, or, where the recipe lets that lag, what the round before made."""
    if work.recipe.lag_rounds:
        return snapshots.published_before(work.run, work.round)
    return _behaviour(work)


def _behaviour(work: Step) -> snapshots.Snapshot:
    return snapshots.frozen_for(work.run, work.round, work.recipe.lag_rounds)


def _learned(work: Step) -> bool:
    told = read_stages(work.run, work.round).get(STAGE, {}).get("inputs")
    # A round that was learned before a setting existed had what is now its default.
    same = told is not None and Learning().model_dump(mode="json", exclude=STARTING) | told == _inputs(work)
    return same and snapshots.newest(work.run, work.round) is not None


def _learn(work: Step) -> None:
    with work.timed(STAGE, inputs=_inputs(work)):
        words: list[object] = ["--recipe", work.recipe_file(STAGE), "--rollouts", work.run.path, "--round", work.round]
        words += ["--policy", work.snapshot(_parent(work).snapshot_id), "--out", work.run.snapshots]
        words += ["--behaviour-policy", work.snapshot(_behaviour(work).snapshot_id)]
        _bring_what_was_kept(work)
        work.start(STAGE, "pipeline.cli train", words, LearningCurve(work.run.learning_log(work.round), _observe(work)))


def _bring_what_was_kept(work: Step) -> None:
    """Of a run at a URL: what the learner left for itself, perhaps on another machine."""
    if work.remote is None:
        return
    work.remote.bring_kept(_parent(work).snapshot_id)
    if work.recipe.learning.behaviour != "engine":
        work.remote.bring_reference(work.replayed())


def _observe(work: Step) -> Observe:
    """Numbers of some steps, among the events of the run and of the round while it is learned."""

    def observe(step: int, means: dict[str, float]) -> None:
        said = f"{STAGE}: step {step:,}, means since the last"
        context = work.context
        metadata = tidy({"step": step, **means})
        context.log_event(dg.AssetObservation(context.asset_key, said, metadata, context.partition_key))

    return observe


def _result(work: Step) -> Made:
    summary = json.loads(work.run.learning_log(work.round).with_suffix(".json").read_bytes())
    last = _last_step(work)
    snapshot = snapshots.load_record(work.snapshot(summary["snapshot_id"]))
    parent = work.snapshot(summary["parent"])
    residual = summary.get("residual_gap")
    seconds = read_stages(work.run, work.round).get(STAGE, {}).get("seconds", 0.0)
    done = f"{summary['steps']:,} steps to {snapshot.snapshot_id}, {seconds:.1f} s"
    work.say(f"{STAGE}: done, {done}{_odd(work, summary)}")
    return dg.MaterializeResult(
        metadata=tidy(
            {
                **_by_label(last),
                **_by_label(summary, SPEED),
                "optimizer steps": summary["steps"],
                "log-probability gap": summary["logprob_gap"]["mean"],
                "log-probability gap, largest": summary["logprob_gap"]["max_abs"],
                "update rounded away": summary.get("rounded_away", 0.0),
                **({} if residual is None else {"log-probability gap, of a residual": residual}),
                "sequences": summary["sequences"],
                "groups without variance": summary["uniform_groups"] / max(1, summary["groups"]),
                **({"planned memory, GiB": planned} if (planned := summary.get("planned_memory_gib")) else {}),
                "peak of a device": summary.get("peak_flops_source", "unknown"),
                "seconds": seconds,
                **snapshot_link(snapshot, work.run.snapshot(snapshot.snapshot_id)),
                "parent path": dg.MetadataValue.path(str(parent)),
                "learning by step": dg.MetadataValue.path(str(work.run.learning_log(work.round))),
                **work.log_metadata(STAGE),
            }
        ),
        check_results=checks.of_policy(
            work.run.snapshot(snapshot.snapshot_id), parent, summary, last, work.recipe.learning
        ),
        data_version=dg.DataVersion(snapshot.sha256),
    )


SPEED = ("tokens_per_second", "tokens_per_second_per_rank", "mfu", "peak_memory_gib", "peak_resident_gib")
"""What the summary tells of all steps of a round, where a log tells of each."""


def _by_label(numbers: dict[str, Any], names: Iterable[str] = LABELS) -> dict[str, Any]:
    """Those that are there: older versions logged others."""
    return {LABELS[name]: numbers[name] for name in names if name in numbers}


def _odd(work: Step, summary: dict[str, Any]) -> str:
    """That there is less data than one batch, which is learned from in one odd step."""
    found, wanted = summary["sequences"] * work.recipe.learning.epochs, work.recipe.learning.batch_size
    return f"; its only step has {found} sequences, and learning.batch_size is {wanted}" if found < wanted else ""


def _last_step(work: Step) -> dict[str, Any]:
    last: dict[str, Any] = {}
    with work.run.learning_log(work.round).open(encoding="utf-8") as lines:
        for line in lines:
            last = json.loads(line)
    return last
