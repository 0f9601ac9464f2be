"""`oapl train` and `oapl evaluate`: the next policy, and how good one is."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from pipeline.cli.options import PolicyOption, PromptsOption, RecipeOption, SetOption, become, require, settings_of
from pipeline.cli.verdicts import judge_here


def train(
    rollouts: Annotated[str, typer.Option("--rollouts", help="A run's folder, generated rollouts, or a dataset.")],
    policy: PolicyOption,
    out: Annotated[str, typer.Option("--out", help="Folder or URL below which the new snapshot is published.")],
    round: Annotated[
        int | None, typer.Option("--round", min=0, help="Round of a run's folder; its newest unless given.")
    ] = None,
    behaviour_policy: Annotated[
        str | None,
        typer.Option(
            "--behaviour-policy", help="The snapshot that wrote the rollouts, where --policy has learned on since."
        ),
    ] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
) -> None:
    """Learn from stored rollouts with DeepSpeed and publish the next snapshot. Needs no engine."""
    settings = settings_of(recipe, set or [])
    require(policy)

    from pipeline.sharing.bring import bring
    from pipeline.storage.places import without_scheme
    from pipeline.storage.working_copy import working_folder

    found = bring(without_scheme(rollouts), round)
    if found.verdicts is None:
        counts, place = judge_here(found, settings)
        typer.echo(f"{place}: {sum(counts.values()):,} verdicts")
    words = ["trainer", "--rollouts", str(found.root), "--policy", policy, "--out", out]
    if found.round is not None:
        words += ["--round", str(found.round)]
    if behaviour_policy is not None:
        require(behaviour_policy)
        words += ["--behaviour-policy", behaviour_policy]
    settings_file = working_folder(out) / ".recipe.yaml"
    settings_file.parent.mkdir(parents=True, exist_ok=True)
    settings.save(settings_file)
    become([*words, "--recipe", str(settings_file)])


def evaluate(
    policy: PolicyOption,
    prompts: PromptsOption,
    out: Annotated[str, typer.Option("--out", help="Parquet file or its URL, a row a prompt.")],
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Completions a prompt.")] = None,
    ks: Annotated[str | None, typer.Option("--ks", help="Values of k, such as 1,8,64.")] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
) -> None:
    """pass@k of a policy on held-out prompts."""
    changes = list(set or [])
    if samples is not None:
        changes.append(f"evaluation.samples={samples}")
    if ks is not None:
        changes.append(f"evaluation.ks=[{ks}]")
    elif samples is not None and not any(item.startswith("evaluation.ks") for item in changes):
        changes.append(f"evaluation.ks=[{','.join(str(k) for k in (1, 8, 16, 64) if k <= samples)}]")
    settings = settings_of(recipe, changes)
    require(policy)

    from pipeline.evaluation.pass_at_k import evaluate_to, heldout
    from pipeline.generation.vllm_engine import VllmEngine
    from pipeline.policies.fetch import fetch_policy
    from pipeline.prompts.fetch import fetch_prompts
    from pipeline.prompts.files import iter_prompts

    here = fetch_policy(policy)
    start = partial(VllmEngine, here, settings.for_evaluation(), settings.seed)
    found = evaluate_to(out, here, heldout(iter_prompts(fetch_prompts(prompts))), settings, start)
    for k, estimate in found.overall.items():
        typer.echo(f"pass@{k} {estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]")
    typer.echo(f"{out}: {found.prompts:,} prompts, {found.samples} completions each, {found.seconds:.1f} s")
