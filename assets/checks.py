"""What must hold before a round goes on, and what a person should look at.

A blocking check that fails stops its asset's step, and with it everything that would be made from it. The others
warn. They are reported by the asset's own step, which has the numbers at hand and knows its round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import dagster as dg

from assets.rounds import asset_key
from pipeline.evaluation.pass_at_k import Evaluation
from pipeline.policies.weights import MOST_ROUNDED, compare
from pipeline.recipe import Learning
from pipeline.rollouts.locate import Located
from pipeline.rollouts.statistics import Statistics
from pipeline.rollouts.store import Manifest
from pipeline.scoring.score import ScoringSummary

SHOWN = 5
"""Problems that a check's metadata lists."""
LEAST_ENTROPY = 0.02
"""Nats a token, as sampled; below it a policy says nearly always the same, and groups have no variance left."""
MOST_LAG = 400
"""Optimizer steps between the policy that generated and the one that learns, up to which OAPL is reported stable
(arXiv 2602.19362)."""
ROUNDED_KEPT = "the next round goes on from the float32 weights, but what generates has not seen it"

CHECKS: dict[str, dict[str, tuple[bool, str]]] = {
    "rollouts": {
        "schema_and_counts": (True, "Each shard has its columns, its hash and whole groups; no prompt is missing."),
        "digest": (True, "The manifest is what its digest says."),
        "entropy": (False, f"The policy's entropy as sampled is at least {LEAST_ENTROPY} nats a token."),
    },
    "verdicts": {
        "canaries_and_statuses": (True, "Known cases are judged right; hardly any verdict is neither right nor wrong."),
        "reward_range": (True, "One verdict a rollout; rewards lie in [0, 1], and just the unscorable are null."),
        "reward_spread": (True, "Some group has both better and worse completions: there is something to learn."),
    },
    "trained_policy": {
        "logprob_gap": (True, "Engine and trainer agree on the data's log-probabilities within the recipe's bounds."),
        "finite_weights": (True, "Every weight of the snapshot is finite."),
        "weights_changed": (True, "Learning changed the weights."),
        "update_survives": (False, f"Publishing rounds away at most {MOST_ROUNDED:.0%} of what the round learned."),
        "lag": (False, f"The rollouts are at most {MOST_LAG} optimizer steps older than the policy that learned."),
    },
    "pass_at_k": {
        "pass_at_1_held": (False, "pass@1 did not fall by more than its 95 % interval."),
    },
}  # fmt: skip
"""asset -> check -> (blocking, what holds when it passes)."""


def specs(asset: str) -> list[dg.AssetCheckSpec]:
    return [
        dg.AssetCheckSpec(name, asset=asset_key(asset), description=text, blocking=blocking)
        for name, (blocking, text) in CHECKS[asset].items()
    ]


def _result(asset: str, name: str, problems: Sequence[str], **metadata: Any) -> dg.AssetCheckResult:
    blocking, text = CHECKS[asset][name]
    return dg.AssetCheckResult(
        passed=not problems,
        check_name=name,
        asset_key=asset_key(asset),
        severity=dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN,
        description="; ".join(problems[:SHOWN]) or text,
        metadata=metadata,
    )


def flaws_of_rollouts(place: Located, manifest: Manifest, prompts: Path) -> list[str]:
    """The first few things that are wrong with the shards; empty when they can be read and are whole."""
    from pipeline.prompts.files import iter_prompts
    from pipeline.rollouts.validate import validate

    problems = [str(problem) for problem in islice(validate(place), SHOWN)]
    asked = sum(1 for _ in iter_prompts(prompts))
    if manifest.groups != asked:
        problems.append(f"{manifest.groups} groups for {asked} prompts")
    if manifest.samples is not None and manifest.rows != manifest.groups * manifest.samples:
        problems.append(f"{manifest.rows} rows are not {manifest.groups} groups of {manifest.samples}")
    return problems


def of_rollouts(manifest: Manifest, problems: Sequence[str], entropy: float | None) -> list[dg.AssetCheckResult]:
    """`entropy` is null where the shards could not be read."""
    broken = [] if manifest.sealed().digest == manifest.digest else ["the manifest was changed after it was written"]
    if entropy is None:
        low = ["the shards could not be read"]
    else:
        low = [] if entropy >= LEAST_ENTROPY else [f"entropy fell to {entropy:.4f} nats a token"]
    return [
        _result("rollouts", "schema_and_counts", problems, rows=manifest.rows, groups=manifest.groups),
        _result("rollouts", "digest", broken, digest=manifest.digest),
        _result("rollouts", "entropy", low, **({} if entropy is None else {"entropy": entropy})),
    ]


def of_verdicts(folder: Path, summary: ScoringSummary, numbers: Statistics) -> list[dg.AssetCheckResult]:
    odd = list(islice(_reward_problems(folder), SHOWN))
    if numbers.rows != summary.rows or numbers.statuses["unjudged"]:
        odd.append(f"{summary.rows} verdicts for {numbers.rows} rollouts")
    rate = numbers.uniform_rate if numbers.uniform_rate is not None else 1.0
    flat = [] if rate < 1 else ["no group has completions of different reward; there is nothing to learn from"]
    return [
        _result("verdicts", "canaries_and_statuses", summary.problems(), canaries=summary.canaries),
        _result("verdicts", "reward_range", odd, reward=summary.reward_mean or 0.0),
        _result("verdicts", "reward_spread", flat, groups_without_variance=rate),
    ]


def _reward_problems(folder: Path) -> Iterator[str]:
    from pipeline.rollouts.schema import UNSCORABLE
    from pipeline.scoring.score import read_verdicts

    for batch in read_verdicts(folder):
        rows = zip(*(batch[name].to_pylist() for name in ("rollout_id", "status", "reward")), strict=True)
        for rollout_id, status, reward in rows:
            if (reward is None) != (status in UNSCORABLE):
                yield f"rollout {rollout_id}: status {status} with reward {reward}"
            elif reward is not None and not 0.0 <= reward <= 1.0:
                yield f"rollout {rollout_id}: reward {reward} is not between 0 and 1"


def of_policy(
    folder: Path, parent: Path, summary: dict[str, Any], last: dict[str, Any], learning: Learning
) -> list[dg.AssetCheckResult]:
    gap, residual = summary["logprob_gap"], summary.get("residual_gap")
    bound, of_residual = learning.max_logprob_gap, learning.max_residual_gap
    # Written so that NaN fails, too.
    apart = [] if abs(gap["mean"]) <= bound else [f"they differ by {gap['mean']:+.4f} nats a token, more than {bound}"]
    if residual is not None and of_residual is not None and not abs(residual) <= of_residual:
        apart.append(f"that moves a residual by {residual:+.4f} of a reward, more than {of_residual}")
    told = gap if residual is None else {**gap, "residual": residual}
    weights = compare(folder, parent)
    same = [] if weights.changed else ["no weight differs from the parent's"]
    lost = summary.get("rounded_away", 0.0)
    rounded = [] if lost <= MOST_ROUNDED else [f"{lost:.0%} of the update was rounded away; {ROUNDED_KEPT}"]
    lag = int(last.get("lag", 0))
    old = [] if lag <= MOST_LAG else [f"the rollouts are {lag} steps old"]
    return [
        _result("trained_policy", "logprob_gap", apart, **{key: float(value) for key, value in told.items()}),
        _result("trained_policy", "finite_weights", [f"{name} is not finite" for name in weights.not_finite]),
        _result("trained_policy", "weights_changed", same, changed=weights.changed, tensors=weights.tensors),
        _result("trained_policy", "update_survives", rounded, rounded_away=float(lost)),
        _result("trained_policy", "lag", old, lag=lag),
    ]


def of_evaluation(found: Evaluation, previous: Evaluation | None) -> list[dg.AssetCheckResult]:
    fell: list[str] = []
    k = min(found.overall)
    if previous is not None and k in previous.overall:
        before, after = previous.overall[k], found.overall[k]
        if after.mean < before.low:
            fell.append(
                f"pass@{k} fell from {before.mean:.3f} to {after.mean:.3f}, below its interval's {before.low:.3f}"
            )
    return [_result("pass_at_k", "pass_at_1_held", fell)]
