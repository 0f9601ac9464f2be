"""Asset `verdicts`."""

import time
from collections.abc import Callable

import dagster as dg

from assets import checks
from assets.config import VerdictsConfig
from assets.metadata import Made, column_schema, lineage, samples, tidy
from assets.prompt_set import prompt_set
from assets.resources import RunFolder, Step, step
from assets.rollouts import rollouts
from assets.rounds import GROUP, PREFIX, asset_key, rounds
from pipeline.runs.stages import read_stages
from pipeline.scoring.score import ScoringSummary

STAGE = "verify"
SAY_EVERY_S = 5.0


@dg.asset(
    key_prefix=PREFIX,
    partitions_def=rounds,
    deps=[prompt_set, rollouts],
    group_name=GROUP,
    kinds={"python", "parquet"},
    metadata={"dagster/column_schema": column_schema("VERDICTS")},
    check_specs=checks.specs("verdicts"),
)
def verdicts(context: dg.AssetExecutionContext, run_folder: RunFolder, config: VerdictsConfig) -> Made:
    """What the verifiers say of each completion: right, wrong, or why it can't be said.

    **Grain:** one row a completion and verifier version, keyed by `rollout_id`. **Source:** `rollouts`, judged
    against the answers and tests of `prompt_set` by math-verify and by programs run in a sandbox. Judging again
    with a newer verifier adds a file and leaves the rollouts as they are.
    """
    from pipeline.scoring.score import score

    with step(context, run_folder, config) as work:
        with work.timed(STAGE):
            folder, prompts = work.run.rollouts(work.round), work.run.round_prompts(work.round)
            summary = score(folder, prompts, work.run.verdicts(work.round), work.recipe.verification, _progress(work))
        return _result(work, summary)


def _progress(work: Step) -> Callable[[int, int], None]:
    started = said = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_EVERY_S:
            said = now
            left = (now - started) / done * (total - done)
            work.say(f"{STAGE}: {done:,}/{total:,} verdicts, {done / (now - started):,.0f}/s, {left:,.0f} s left")

    return progress


def _result(work: Step, summary: ScoringSummary) -> Made:
    from pipeline.rollouts.locate import locate
    from pipeline.rollouts.statistics import statistics

    numbers = statistics(locate(work.run.path, work.round))
    seconds = read_stages(work.run, work.round).get(STAGE, {}).get("seconds", 0.0)
    reward = summary.reward_mean or 0.0
    work.say(f"{STAGE}: done, {summary.rows:,} verdicts, mean reward {reward:.3f}, {seconds:.1f} s")
    by_task = {
        f"correct: {name}": counts.get("correct", 0) / max(1, sum(counts.values()))
        for name, counts in summary.by_verifier.items()
    }
    return dg.MaterializeResult(
        metadata=tidy(
            {
                "dagster/row_count": summary.rows,
                "reward": reward,
                **by_task,
                "groups without variance": numbers.uniform_rate or 0.0,
                "neither right nor wrong": summary.unsettled_share,
                "seconds": seconds,
                "statuses": dg.MetadataValue.json(summary.statuses),
                "verifiers": dg.MetadataValue.json(summary.versions),
                "isolation": dg.MetadataValue.json(summary.isolation),
                "samples": samples(work.run.path, work.round),
                "path": dg.MetadataValue.path(str(work.run.verdicts(work.round))),
                "dagster/column_lineage": lineage(
                    {
                        "rollout_id": [(asset_key("rollouts"), "rollout_id")],
                        **{
                            name: [
                                (asset_key("rollouts"), "completion"),
                                (asset_key("prompt_set"), "answer"),
                                (asset_key("prompt_set"), "tests"),
                            ]
                            for name in ("status", "reward", "detail")
                        },
                    }
                ),
            }
        ),
        check_results=checks.of_verdicts(work.run.verdicts(work.round), summary, numbers),
    )
