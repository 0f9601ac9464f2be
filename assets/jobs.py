"""What a person launches: a part of a round, or a whole one.

Steps of a run follow one another, and each keeps its work in a process of its own, so all run in the run's process:
a process a step would only add seconds of imports to each.
"""

from __future__ import annotations

import dagster as dg

from assets.rounds import RECIPE, RUN_NAME, TAGS, asset_key
from assets.running.instance import IN_ORDER, TWO_AT_ONCE

LIMITED = TAGS | {TWO_AT_ONCE if RECIPE.lag_rounds else IN_ORDER: RUN_NAME}
"""A round that lags is generated while the one before is learned; any other waits for it."""


def _job(name: str, assets: list[str], description: str) -> dg.UnresolvedAssetJobDefinition:
    return dg.define_asset_job(
        name,
        selection=dg.AssetSelection.assets(*(asset_key(asset) for asset in assets)),
        description=description,
        executor_def=dg.in_process_executor,
        tags=LIMITED,
    )


generation_round = _job(
    "generation_round",
    ["prompt_set", "frozen_policy", "rollouts", "verdicts", "rollout_dataset"],
    "Freezes the policy, generates the round's rollouts, judges them, and makes the dataset to share.",
)
training_round = _job(
    "training_round",
    ["trained_policy", "pass_at_k"],
    "Learns from the round's rollouts, publishes the next snapshot and evaluates it.",
)
whole_round = _job(
    "whole_round",
    ["prompt_set", "frozen_policy", "rollouts", "verdicts", "rollout_dataset", "trained_policy", "pass_at_k"],
    "A round from its frozen policy to pass@k of the next snapshot.",
)
rescore = _job(
    "rescore",
    ["verdicts", "rollout_dataset"],
    "Judges the round's rollouts again, with newer verifiers or other limits; the rollouts stay as they are.",
)
evaluate_snapshot = _job(
    "evaluate_snapshot", ["pass_at_k"], "Measures pass@k of the round's snapshot, with other samples or k if asked."
)

JOBS = [generation_round, training_round, whole_round, rescore, evaluate_snapshot]
