"""What a run's rounds really took, read from what they left, and a plan's numbers beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.layout import Run
from pipeline.planning.arithmetic import BYTES_PER_ROLLOUT, plan
from pipeline.planning.terms import Given
from pipeline.policies import snapshots
from pipeline.policies.shapes import shape_of
from pipeline.recipe import Recipe, load_recipe
from pipeline.runs.open import run_recipe
from pipeline.runs.stages import STAGES, read_stages


@dataclass(frozen=True, slots=True)
class Facts:
    """One finished round."""

    round: int
    recipe: Recipe
    """The run's settings with what was changed for this round."""
    groups: int
    rows: int
    tokens: int
    rollout_bytes: int
    seconds: dict[str, float]
    """By stage: generate, verify, learn, evaluate."""
    steps: int
    learned_tokens: int
    step_seconds: float
    """Of the optimizer steps alone."""
    uniform_groups: int
    snapshot_bytes: int | None
    """Of this round's; null where it is gone."""
    moment_bytes: int | None
    """The same of what is kept beside it for the next round."""
    evaluated: int
    """Completions of the evaluation."""
    evaluation_mean: float
    """Their mean tokens."""


@dataclass(frozen=True, slots=True)
class Comparison:
    round: int
    name: str
    unit: str
    planned: float
    fact: float

    @property
    def ratio(self) -> float | None:
        """Fact over plan."""
        return self.fact / self.planned if self.planned else None


def open_measured(folder: Path) -> Run:
    """The run in `folder`. Raises RequestError where there is none."""
    place = folder.absolute()
    if place.parent.name != "runs" or not (place / "recipe.yaml").exists():
        raise RequestError(f"{folder}: no run's folder; give one below runs/ that `oapl run` made")
    return Run(place.parent.parent, place.name)


def finished_rounds(run: Run) -> list[Facts]:
    """Every round of the run that has learned and was evaluated, oldest first."""
    done = [r for r in run.rounds() if run.learning_log(r).with_suffix(".json").exists() and run.evaluation(r).exists()]
    return [_facts(run, number) for number in done]


def _facts(run: Run, number: int) -> Facts:
    from pipeline.evaluation.pass_at_k import read_evaluation
    from pipeline.rollouts.store import read_manifest

    manifest = read_manifest(run.rollouts(number))
    stages = read_stages(run, number)
    log = run.learning_log(number)
    learned: dict[str, Any] = json.loads(log.with_suffix(".json").read_text(encoding="utf-8"))
    with log.open(encoding="utf-8") as lines:
        step_seconds = sum(float(json.loads(line)["seconds"]) for line in lines)
    evaluation = read_evaluation(run.evaluation(number))
    return Facts(
        number,
        _recipe_of(run, number),
        manifest.groups,
        manifest.rows,
        manifest.tokens,
        sum(shard.bytes for shard in manifest.shards),
        {stage: float(stages.get(stage, {}).get("seconds", 0.0)) for stage in STAGES},
        int(learned["steps"]),
        int(learned["tokens"]),
        step_seconds,
        int(learned["uniform_groups"]),
        _size(run.snapshot(learned["snapshot_id"])),
        _size(run.snapshots / snapshots.MOMENTS / learned["snapshot_id"]),
        evaluation.prompts * evaluation.samples,
        evaluation.mean_tokens,
    )


def _recipe_of(run: Run, number: int) -> Recipe:
    """The run's recipe with each part as the stage that it is about ran under."""
    recipe = run_recipe(run)
    for stage, parts in {
        "generate": ("prompts", "generation"),
        "verify": ("verification",),
        "learn": ("learning",),
        "evaluate": ("evaluation",),
    }.items():
        file = run.stage_recipe(stage, number)
        if file.exists():
            ran = load_recipe(str(file))
            recipe = recipe.model_copy(update={part: getattr(ran, part) for part in parts})
    return recipe


def _size(folder: Path) -> int | None:
    if not folder.is_dir():
        return None
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def given_by(facts: list[Facts], source: str, recipe: Recipe | None = None) -> Given:
    """Lengths, shares, throughputs and bytes of all rounds together; says so where `recipe` is of another policy."""
    other = ", of another policy" if recipe is not None and recipe.policy != facts[-1].recipe.policy else ""
    rows, tokens = sum(f.rows for f in facts), sum(f.tokens for f in facts)
    evaluated, evaluated_tokens = sum(f.evaluated for f in facts), sum(f.evaluated * f.evaluation_mean for f in facts)
    seconds = {stage: sum(f.seconds[stage] for f in facts) for stage in STAGES}
    stepping = sum(f.step_seconds for f in facts)
    learned = sum(f.learned_tokens for f in facts)
    return Given(
        mean_tokens=tokens / rows,
        evaluation_tokens=evaluated_tokens / evaluated,
        uniform=sum(f.uniform_groups for f in facts) / sum(f.groups for f in facts),
        tokens_per_second=_rate(tokens, seconds["generate"]),
        evaluation_tokens_per_second=_rate(evaluated_tokens, seconds["evaluate"]),
        train_tokens_per_second=_rate(learned, stepping),
        verdicts_per_second=_rate(rows, seconds["verify"]),
        start_seconds=max(0.0, seconds["learn"] - stepping) / len(facts),
        bytes_per_token=(sum(f.rollout_bytes for f in facts) - rows * BYTES_PER_ROLLOUT) / tokens,
        source=f"{source}, {len(facts)} round{'s' * (len(facts) > 1)}{other}",
    )


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds else None


def compare(run: Run, facts: list[Facts]) -> list[Comparison]:
    """Plan against fact for each round.

    A round's plan knows its mean lengths and its share of groups without variance, which are the policy's doing;
    throughputs and bytes a token are those of all rounds together.
    """
    together = given_by(facts, str(run.path))
    found: list[Comparison] = []
    for fact in facts:
        given = replace(
            together,
            mean_tokens=fact.tokens / fact.rows,
            evaluation_tokens=fact.evaluation_mean,
            uniform=fact.uniform_groups / fact.groups,
        )
        found += _compared(fact, given)
    return found


def _compared(fact: Facts, given: Given) -> Iterator[Comparison]:
    made = plan(fact.recipe, shape_of(fact.recipe), given)
    evaluated = fact.evaluated * fact.evaluation_mean
    hours = {line.key: line.value for line in made.lines if line.part == "time"}
    cards = {"generation": fact.recipe.generation.tensor_parallel, "learning": fact.recipe.learning.ranks}
    cards["evaluation"] = cards["generation"]
    yield Comparison(fact.round, "tokens generated", "", made.value("tokens"), fact.tokens)
    yield Comparison(fact.round, "tokens of the evaluation", "", made.value("evaluation_tokens"), evaluated)
    yield Comparison(fact.round, "optimizer steps", "", made.value("steps"), fact.steps)
    yield Comparison(fact.round, "tokens learned from", "", made.value("learned_tokens"), fact.learned_tokens)
    for name, stage in (("generation", "generate"), ("learning", "learn"), ("evaluation", "evaluate")):
        if f"{name}_gpu_hours" in hours:
            planned = hours[f"{name}_gpu_hours"] / cards[name] * 3600
            yield Comparison(fact.round, name, "seconds", planned, fact.seconds[stage])
    if "verification_hours" in hours:
        yield Comparison(
            fact.round, "verification", "seconds", hours["verification_hours"] * 3600, fact.seconds["verify"]
        )
    yield Comparison(fact.round, "rollouts", "bytes", made.value("rollout_bytes"), fact.rollout_bytes)
    if fact.snapshot_bytes is not None:
        yield Comparison(fact.round, "snapshot", "bytes", made.value("snapshot_bytes"), fact.snapshot_bytes)
    if fact.moment_bytes is not None:
        yield Comparison(fact.round, "kept for the next round", "bytes", made.value("state_bytes"), fact.moment_bytes)
