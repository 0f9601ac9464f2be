"""Which run this code location is about: told by the environment, since Dagster loads modules without arguments.

OAPL_RECIPE is a recipe's name or file (`tiny` where it is unset), OAPL_SET a JSON list of `key.path=value`
overrides, OAPL_ROOT the data folder (`data`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.layout import Run
from pipeline.recipe import Recipe, load_recipe
from pipeline.runs import open_run, run_recipe

DEFAULT_RUN = "tiny"


def partitions_name(run: str) -> str:
    """Name of the dynamic partitions that are the run's rounds."""
    return "rounds" if run == DEFAULT_RUN else f"rounds_{run}"


@dataclass(frozen=True, slots=True)
class Chosen:
    """A recipe, and the data folder that its run lies in."""

    root: Path
    recipe: str
    overrides: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        return {
            "OAPL_ROOT": str(self.root),
            "OAPL_RECIPE": self.recipe,
            "OAPL_SET": json.dumps(list(self.overrides)),
        }

    def settings(self) -> Recipe:
        """What the run began with; where it has not begun, the recipe.

        Without overrides a run goes on under its own settings, so that a UI can be opened over any run by name.
        """
        asked = load_recipe(self.recipe, self.overrides)
        run = Run(self.root, asked.name)
        return run_recipe(run) if run.recipe.exists() and not self.overrides else asked

    def open(self) -> tuple[Run, Recipe]:
        """Begins the run, or goes on with it. Raises RequestError where overrides are not what it began with."""
        settings = self.settings()
        run = Run(self.root, settings.name)
        if not run.recipe.exists() or self.overrides:
            run = open_run(self.root, settings)
        return run, settings


def chosen(environment: Mapping[str, str] = os.environ) -> Chosen:
    """What the environment says. Raises RequestError where OAPL_SET is not a JSON list of texts."""
    try:
        overrides = json.loads(environment.get("OAPL_SET") or "[]")
    except json.JSONDecodeError:
        overrides = None
    if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
        raise RequestError('OAPL_SET: expected a JSON list of key.path=value, such as ["learning.beta2=0.1"]')
    root = Path(environment.get("OAPL_ROOT") or "data").absolute()
    return Chosen(root, environment.get("OAPL_RECIPE") or DEFAULT_RUN, tuple(overrides))
