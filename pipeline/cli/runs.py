"""`oapl run` and `oapl ui`: a run's rounds made through Dagster, and looked at."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import RecipeOption, RootOption, SetOption, become, overrides


def run(
    recipe: RecipeOption = "tiny",
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="Rounds to have in all.")] = None,
    root: RootOption = "data",
    set: SetOption = None,
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Try engine and learner before anything is generated.")
    ] = True,
) -> None:
    """Make rounds, through Dagster, and show how pass@k went. Goes on where an earlier call stopped."""
    from pipeline.recipe import load_recipe

    load_recipe(recipe or "tiny", overrides(set, rounds=rounds))  # nonsense is refused before anything starts
    words = ["assets.run_rounds", "--recipe", recipe or "tiny", "--root", root]
    for override in overrides(set, rounds=rounds):
        words += ["--set", override]
    if not preflight:
        words.append("--no-preflight")
    become(words)


def ui(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port on this machine.")] = 3000,
    root: RootOption = "data",
    recipe: RecipeOption = "tiny",
    set: SetOption = None,
) -> None:
    """Dagster's web UI and daemon: the assets, the rounds made so far, and new ones at a click."""
    from pipeline.recipe import load_recipe

    load_recipe(recipe or "tiny", set or [])
    words = ["assets.running.web", "--port", str(port), "--root", root, "--recipe", recipe or "tiny"]
    for override in set or []:
        words += ["--set", override]
    become(words)
