"""`oapl plan`: what a recipe takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import RecipeOption, RootOption, SetOption
from pipeline.errors import RequestError


def preflight(
    recipe: RecipeOption = "tiny",
    root: RootOption = "data",
    set: SetOption = None,
    trial: Annotated[bool, typer.Option("--trial/--no-trial", help="Also start engine and learner.")] = True,
) -> None:
    """Whether a recipe works on this machine: what fits, and a trial of engine and learner at full length."""
    from pipeline.cli.tried import preflight as look

    look(recipe or "tiny", root, set or [], trial)


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a recipe, or a YAML file.")],
    set: SetOption = None,
    gpus: Annotated[int | None, typer.Option("--gpus", help="Cards there are.")] = None,
    gpu_memory: Annotated[float | None, typer.Option("--gpu-memory", help="GiB of a card; judges what fits.")] = None,
    mean_tokens: Annotated[float | None, typer.Option("--mean-tokens", help="Mean length of a completion.")] = None,
    uniform_share: Annotated[
        float | None, typer.Option("--uniform-share", help="Share of groups whose rewards will all be equal.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option("--tokens-per-second", help="Completion tokens that one engine makes.")
    ] = None,
    train_tokens_per_second: Annotated[
        float | None,
        typer.Option("--train-tokens-per-second", help="Completion tokens that all ranks together learn from."),
    ] = None,
    verdicts_per_second: Annotated[
        float | None, typer.Option("--verdicts-per-second", help="Completions that the verifiers judge.")
    ] = None,
    model_config: Annotated[
        Path | None, typer.Option("--model-config", help="The model's folder, or its config.json.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option("--measured", help="A run's folder to take lengths and throughputs from, and to compare with."),
    ] = None,
    root: Annotated[Path, typer.Option("--root", help="Data folder that the run lies in.")] = Path("data"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as one JSON object instead.")] = False,
) -> None:
    """What a recipe takes: tokens, hours, memory and disk, each with its formula; and what to change. Runs nothing."""
    from dataclasses import asdict, replace

    from pipeline.layout import Run
    from pipeline.planning.arithmetic import plan as make
    from pipeline.planning.measured import compare, finished_rounds, given_by, open_measured
    from pipeline.planning.terms import Given
    from pipeline.policies.shapes import shape_of
    from pipeline.recipe import load_recipe

    settings = load_recipe(recipe, set or [])
    run = open_measured(measured) if measured else Run(root, settings.name)
    facts = finished_rounds(run) if run.recipe.exists() else []
    if measured and not facts:
        raise RequestError(f"{measured}: no round of it is finished, so there is nothing to measure by")
    told: dict[str, Any] = {
        "mean_tokens": mean_tokens,
        "evaluation_tokens": mean_tokens,
        "uniform": uniform_share,
        "tokens_per_second": tokens_per_second,
        "evaluation_tokens_per_second": tokens_per_second,
        "train_tokens_per_second": train_tokens_per_second,
        "verdicts_per_second": verdicts_per_second,
        "gpus": gpus,
        "gpu_memory": gpu_memory,
    }
    known = given_by(facts, str(run.path), settings) if facts else Given()
    given = replace(known, **{name: value for name, value in told.items() if value is not None})
    made = make(settings, shape_of(settings, model_config), given)
    compared = compare(run, facts) if facts else []
    if as_json:
        import json

        tree = {**made.as_dict(), "given": asdict(given), "measured": [asdict(item) for item in compared]}
        typer.echo(json.dumps(tree, indent=1))
        return
    from rich.console import Console

    from pipeline.planning.tables import show

    show(made, given, compared, Console())
