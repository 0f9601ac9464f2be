"""What several commands take, and how they become the process that does the work."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import modules
from pipeline.errors import RequestError

if TYPE_CHECKING:
    from pipeline.recipe import Recipe

RecipeOption = Annotated[str | None, typer.Option("--recipe", help="Name of a recipe, or a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Replace a setting of the recipe; repeatable."),
]
RootOption = Annotated[
    str, typer.Option("--root", help="Data folder, or its URL: runs and Dagster's records lie below it.")
]
# Text, since a Path would make s3:/ of s3://.
PolicyOption = Annotated[
    str, typer.Option("--policy", help="Policy in Hugging Face format, or a snapshot: a folder or a URL.")
]
PromptsOption = Annotated[str, typer.Option("--prompts", help="Prompts, JSONL or Parquet; a file or a URL.")]


def settings_of(recipe: str | None, overrides: list[str]) -> Recipe:
    """The recipe that was named, else plain defaults, with the overrides applied."""
    from pipeline.recipe import RECIPES, load_recipe

    return load_recipe(recipe or str(RECIPES / "defaults.yaml"), overrides)


def overrides(given: list[str] | None, **flags: int | None) -> list[str]:
    return [*(given or []), *(f"{key}={value}" for key, value in flags.items() if value is not None)]


def require(policy: str) -> None:
    """Refuses a missing policy before seconds are spent on imports; one at a URL is brought here."""
    from pipeline.storage.places import is_url

    if is_url(policy):
        from pipeline.policies.fetch import fetch_policy

        fetch_policy(policy)
    elif not (Path(policy) / "config.json").exists():
        raise RequestError(f"no policy in {policy}: expected a folder with config.json, weights and tokenizer")


def become(words: list[str]) -> None:
    """Replaces this process by `python -P -m words...`, so that signals reach what does the work."""
    sys.stdout.flush()
    os.execv(sys.executable, modules.python(*words))
