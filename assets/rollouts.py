"""Asset `rollouts`."""

from pathlib import Path

import dagster as dg

from assets import checks
from assets.config import RolloutsConfig
from assets.frozen_policy import frozen_policy
from assets.metadata import Made, column_schema, lineage, tidy
from assets.prompt_set import prompt_set
from assets.resources import RunFolder, Step, step
from assets.rounds import GROUP, PREFIX, asset_key, rounds
from assets.running.instance import ENGINE_POOL
from pipeline.policies import snapshots
from pipeline.runs.stages import read_stages

STAGE = "generate"


@dg.asset(
    key_prefix=PREFIX,
    partitions_def=rounds,
    deps=[prompt_set, frozen_policy],
    group_name=GROUP,
    kinds={"vllm", "parquet"},
    pool=ENGINE_POOL,
    metadata={"dagster/column_schema": column_schema("ROLLOUTS")},
    check_specs=checks.specs("rollouts"),
)
def rollouts(context: dg.AssetExecutionContext, run_folder: RunFolder, config: RolloutsConfig) -> Made:
    """Completions that the frozen policy gives to the round's prompts, sampled by vLLM.

    **Grain:** one row a completion; the rows of a prompt are its group and stand together. **Source:** the next
    prompts of `prompt_set`, and the policy of `frozen_policy`. Token ids and the engine's own log-probabilities are
    kept. Shards are committed as groups complete, so that an interrupted round is gone on with.
    """
    with step(context, run_folder, config) as work:
        _take_prompts(work)
        if not _whole(work):
            _generate(work)
        return _result(work)


def _take_prompts(work: Step) -> None:
    from pipeline.prompts.files import write_prompts
    from pipeline.prompts.sets import round_prompts

    place = work.run.round_prompts(work.round)
    taken = round_prompts(work.run.prompts, work.round, work.recipe.prompts.per_round, work.recipe.seed)
    write_prompts(place, taken)


def _whole(work: Step) -> bool:
    """Whether a finished generation under these settings lies there, so that no engine need be started."""
    told = read_stages(work.run, work.round).get(STAGE, {}).get("settings")
    return told == _settings(work)


def _policy(work: Step) -> snapshots.Snapshot:
    return snapshots.frozen_for(work.run, work.round, work.recipe.lag_rounds)


def _settings(work: Step) -> dict[str, object]:
    return {
        "snapshot": _policy(work).snapshot_id,
        "prompts": work.recipe.prompts.per_round,
        "seed": work.recipe.seed,
        **work.recipe.generation.model_dump(mode="json"),
    }


def _generate(work: Step) -> None:
    with work.timed(STAGE, settings=_settings(work)):
        words: list[object] = ["--recipe", work.recipe_file(STAGE), "--policy", _policy_for_engine(work)]
        words += ["--prompts", work.run.round_prompts(work.round)]
        words += ["--out", _out(work), "--round", work.round]
        work.start(STAGE, "pipeline.cli generate", words)
    if work.remote is not None:
        work.remote.bring_rollouts(work.round)


def _policy_for_engine(work: Step) -> Path | str:
    """The frozen snapshot's folder, or, where engines on other machines need it, its URL."""
    snapshot_id = _policy(work).snapshot_id
    if work.remote is not None and work.recipe.generation.engine == "ray":
        return work.remote.at_url(work.run.snapshot(snapshot_id))
    return work.snapshot(snapshot_id)


def _out(work: Step) -> Path | str:
    """Where rollouts are written: to the URL at once, so that a machine that is lost takes no whole group with it."""
    folder = work.run.rollouts(work.round)
    return folder if work.remote is None else work.remote.at_url(folder)


def _result(work: Step) -> Made:
    from pipeline.rollouts.locate import Located
    from pipeline.rollouts.statistics import statistics
    from pipeline.rollouts.store import read_manifest

    folder: Path = work.run.rollouts(work.round)
    manifest = read_manifest(folder)
    place = Located(folder, folder, work.run.round_prompts(work.round), None, work.round)
    problems = checks.flaws_of_rollouts(place, manifest, work.run.round_prompts(work.round))
    if problems:
        return dg.MaterializeResult(
            metadata={"dagster/row_count": manifest.rows, "path": dg.MetadataValue.path(str(folder))},
            check_results=checks.of_rollouts(manifest, problems, None),
        )
    numbers = statistics(place, manifest)
    seconds = read_stages(work.run, work.round).get(STAGE, {}).get("seconds", 0.0)
    entropy = -(numbers.logprob_mean or 0.0)
    work.say(f"{STAGE}: done, {manifest.rows:,} completions, {manifest.tokens:,} tokens in {seconds:.1f} s")
    return dg.MaterializeResult(
        metadata=tidy(
            {
                "dagster/row_count": manifest.rows,
                "groups": manifest.groups,
                "tokens": manifest.tokens,
                "tokens per second": manifest.tokens / seconds if seconds else 0.0,
                "seconds": seconds,
                "mean tokens": manifest.tokens / max(1, manifest.rows),
                "cut at max_tokens": numbers.finish_reasons["length"] / max(1, manifest.rows),
                "entropy, nats a token": entropy,
                "bytes": numbers.bytes,
                "snapshot": manifest.provenance.snapshot_id,
                "sampling": dg.MetadataValue.json(manifest.provenance.sampling),
                "digest": manifest.digest,
                "path": dg.MetadataValue.path(str(folder)),
                "dagster/column_lineage": lineage(
                    {
                        "prompt_id": [(asset_key("prompt_set"), "prompt_id")],
                        "prompt_tokens": [(asset_key("prompt_set"), "messages")],
                        "completion": [(asset_key("prompt_set"), "messages")],
                    }
                ),
                **work.log_metadata(STAGE),
            }
        ),
        check_results=checks.of_rollouts(manifest, problems, entropy),
        data_version=dg.DataVersion(manifest.digest),
    )
