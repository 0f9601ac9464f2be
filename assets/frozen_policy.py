"""Asset `frozen_policy`."""

import fcntl
from collections.abc import Sequence

import dagster as dg

from assets.metadata import Made, snapshot_link
from assets.prompt_set import prompt_set
from assets.resources import RunFolder, Step, step
from assets.rounds import GROUP, PREFIX, asset_key, rounds
from pipeline.planning.preflight import check, one_line, read_mark, rehearse
from pipeline.policies import snapshots
from pipeline.policies.fetch import find_policy
from pipeline.runs.stages import START

PREFLIGHT = "preflight"


# No prompt is read here. But a backfill makes what depends on nothing first, for all rounds, in runs of its own: round
# 1's policy would be asked for before round 0 had published it.
@dg.asset(key_prefix=PREFIX, partitions_def=rounds, deps=[prompt_set], group_name=GROUP, kinds={"huggingface"})
def frozen_policy(context: dg.AssetExecutionContext, run_folder: RunFolder) -> Made:
    """The snapshot that the round is generated with: the head of a round.

    **Grain:** one snapshot a round. **Source:** the newest `trained_policy` of the round before, or of `lag_rounds`
    rounds earlier where the recipe lets generation run ahead of learning; at first the run's start, which is made or
    imported here. It is found when this is materialised, since a policy that depends on rollouts that depend on the
    policy would be a circle. Once settled it stays, so that a round can be gone on with.
    """
    with step(context, run_folder) as work:
        lag = work.recipe.lag_rounds
        check(work.recipe, work.run.path)
        if work.round <= lag:
            _make_start(work)
        snapshot = snapshots.frozen_for(work.run, work.round, lag)
        tried = _preflight(work, snapshot)
        before = context.asset_key_for_output() if snapshot.round is None else asset_key("trained_policy")
        return dg.MaterializeResult(
            metadata={
                **snapshot_link(snapshot, work.run.snapshot(snapshot.snapshot_id)),
                "published by": dg.MetadataValue.asset(before),
                "published in round": -1 if snapshot.round is None else snapshot.round,
                "rounds behind": work.round - 1 - (-1 if snapshot.round is None else snapshot.round),
                "preflight": tried,
                **work.log_metadata(START),
            },
            data_version=dg.DataVersion(snapshot.sha256),
        )


def _preflight(work: Step, snapshot: snapshots.Snapshot) -> str:
    """Engine and learner are tried under the recipe's settings, once a run, before anything is generated."""

    def start(name: str, module: str, words: Sequence[object]) -> None:
        work.start(name, module, words, again=False)

    with (work.run.path / ".preflight.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # rounds that lag are at it together
        before = read_mark(work.run.preflight)
        recipe, policy = work.recipe_file(PREFLIGHT), work.snapshot(snapshot.snapshot_id)
        told = rehearse(work.recipe, recipe, policy, work.run.preflight, start)
    if told != before:
        work.say(f"{PREFLIGHT}: {one_line(told)}")
    return one_line(told)


def _make_start(work: Step) -> None:
    """Trains the embedded policy, or copies in the model that the recipe names, once; rounds that lag share it."""
    place = work.run.path / ".start.lock"
    with place.open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if snapshots.newest(work.run, None) is None:
            _start(work)


def _start(work: Step) -> None:
    with work.timed(START):
        if work.recipe.policy.cold_start is not None:
            words = ["--recipe", work.recipe_file(START), "--out", work.run.snapshots]
            work.start(START, "trainer.cold_start", words)
        else:
            assert work.recipe.policy.model is not None
            snapshots.adopt(find_policy(work.recipe.policy.model), work.run.snapshots)
