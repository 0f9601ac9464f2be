"""Asset `pass_at_k`."""

import dagster as dg

from assets import checks
from assets.config import EvaluationConfig
from assets.metadata import Made, picture, table, tidy
from assets.prompt_set import prompt_set
from assets.resources import RunFolder, Step, step
from assets.rounds import GROUP, PREFIX, rounds
from assets.running.instance import ENGINE_POOL
from assets.trained_policy import trained_policy
from pipeline.errors import RequestError
from pipeline.evaluation.pass_at_k import Evaluation, read_evaluation
from pipeline.evaluation.report import write_report
from pipeline.policies import snapshots
from pipeline.runs.stages import START_EVALUATION, read_stages

STAGE = "evaluate"


@dg.asset(
    key_prefix=PREFIX,
    partitions_def=rounds,
    deps=[prompt_set, trained_policy],
    group_name=GROUP,
    kinds={"vllm", "parquet"},
    pool=ENGINE_POOL,
    check_specs=checks.specs("pass_at_k"),
)
def pass_at_k(context: dg.AssetExecutionContext, run_folder: RunFolder, config: EvaluationConfig) -> Made:
    """pass@k of the new snapshot on the held-out prompts, unbiased, with 95 % intervals over prompts.

    **Grain:** one row a held-out prompt and round. **Source:** `trained_policy`, sampled by the engine on the
    held-out prompts of `prompt_set`, and judged by the verifiers. In round 0 the start is evaluated too. The run's
    report, with its picture, is written anew.
    """
    with step(context, run_folder, config) as work:
        start = snapshots.newest(work.run, None)
        if start is not None and _differs(work, None, start):
            _evaluate(work, START_EVALUATION, start, None)
        trained = snapshots.newest(work.run, work.round)
        if trained is None:
            raise RequestError(f"round {work.round} has published no snapshot; materialise trained_policy first")
        if _differs(work, work.round, trained):
            _evaluate(work, STAGE, trained, work.round)
        return _result(work)


def _differs(work: Step, round: int | None, snapshot: snapshots.Snapshot) -> bool:
    """Whether the snapshot must be evaluated: not yet, or under other settings, or it is another one now."""
    if round is None and work.round > 0:
        return False
    stage = START_EVALUATION if round is None else STAGE
    told = read_stages(work.run, work.round).get(stage, {}).get("inputs")
    return told != _inputs(work, snapshot) or not work.run.evaluation(round).exists()


def _inputs(work: Step, snapshot: snapshots.Snapshot) -> dict[str, object]:
    return {"snapshot": snapshot.snapshot_id, **work.recipe.evaluation.model_dump(mode="json")}


def _evaluate(work: Step, stage: str, snapshot: snapshots.Snapshot, round: int | None) -> None:
    with work.timed(stage, inputs=_inputs(work, snapshot)):
        words: list[object] = ["--recipe", work.recipe_file(STAGE), "--policy", work.snapshot(snapshot.snapshot_id)]
        words += ["--prompts", work.run.prompts, "--out", work.run.evaluation(round)]
        work.start(stage, "pipeline.cli evaluate", words)
    found = read_evaluation(work.run.evaluation(round))
    numbers = ", ".join(f"pass@{k} {mean:.3f}" for k, mean in found.pass_at.items())
    work.say(f"{stage}: done, {numbers}, {found.seconds:.1f} s")


def _result(work: Step) -> Made:
    found = read_evaluation(work.run.evaluation(work.round))
    before = work.run.evaluation(work.round - 1 if work.round else None)
    previous = read_evaluation(before) if before.exists() else None
    write_report(work.run)
    return dg.MaterializeResult(
        metadata=tidy(
            {
                **{f"pass@{k}": estimate.mean for k, estimate in found.overall.items()},
                **{f"pass@1 {name}": ks[1].mean for name, ks in found.by_source.items() if 1 in ks},
                "picture": picture(work.run.small_picture),
                "estimates": _table(found),
                "gain in pass@1": _gain(found, previous),
                "mean tokens": found.mean_tokens,
                "unscorable": found.unscorable,
                "seconds": read_stages(work.run, work.round).get(STAGE, {}).get("seconds", 0.0),
                "dagster/row_count": found.prompts,
                "snapshot": found.snapshot_id,
                "report": dg.MetadataValue.path(str(work.run.page)),
                "summary": dg.MetadataValue.path(str(work.run.summary)),
                "path": dg.MetadataValue.path(str(work.run.evaluation(work.round))),
                **work.log_metadata(STAGE),
            }
        ),
        check_results=checks.of_evaluation(found, previous),
    )


def _gain(found: Evaluation, previous: Evaluation | None) -> float:
    return found.pass_at[1] - previous.pass_at[1] if previous and 1 in found.pass_at and 1 in previous.pass_at else 0.0


def _table(found: Evaluation) -> dg.MarkdownMetadataValue:
    rows = [
        [name, *(f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]" for e in ks.values())]
        for name, ks in {"all": found.overall, **found.by_source}.items()
    ]
    return table(["prompts", *(f"pass@{k}" for k in found.overall)], rows)
