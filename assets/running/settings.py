"""Which run this code location is about: told by the environment, since Dagster loads modules without arguments.

OAPL_RECIPE is a recipe's name or file (`tiny` where it is unset), OAPL_SET a JSON list of `key.path=value`
overrides, OAPL_ROOT the data folder (`data`) or the URL of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import RequestError
from pipeline.layout import Run
from pipeline.recipe import Recipe, load_recipe
from pipeline.runs.open import open_run, run_recipe
from pipeline.storage.places import is_url

if TYPE_CHECKING:
    from pipeline.runs.at_url import RemoteRun

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
    url: str | None = None
    """Where the data folder lies, of which `root` is then this machine's working copy."""

    def environment(self) -> dict[str, str]:
        return {
            "OAPL_ROOT": self.url or str(self.root),
            "OAPL_RECIPE": self.recipe,
            "OAPL_SET": json.dumps(list(self.overrides)),
        }

    def remote(self, name: str) -> RemoteRun | None:
        """The run of that name at the URL; None where the data folder lies on this machine."""
        if self.url is None:
            return None
        from pipeline.runs.at_url import RemoteRun

        return RemoteRun(self.url, name)

    def bring(self) -> None:
        """Brings a run at a URL up to date here, as far as one must know which rounds it has."""
        remote = self.remote(self.settings().name)
        if remote is not None:
            remote.bring()

    def settings(self) -> Recipe:
        """What the run began with; where it has not begun, the recipe.

        Without overrides a run goes on under its own settings, so that a UI can be opened over any run by name.
        """
        asked = load_recipe(self.recipe, self.overrides)
        run = Run(self.root, asked.name)
        remote = self.remote(asked.name)
        if remote is not None and not run.recipe.exists():
            remote.bring_recipe()
        return run_recipe(run) if run.recipe.exists() and not self.overrides else asked

    def open(self) -> tuple[Run, Recipe]:
        """Begins the run, or goes on with it. Raises RequestError where overrides are not what it began with."""
        settings = self.settings()
        run = Run(self.root, settings.name)
        if not run.recipe.exists() or self.overrides:
            run = open_run(self.root, settings)
            remote = self.remote(run.name)
            if remote is not None:
                remote.send_recipe()
        return run, settings


def root_of(place: str) -> tuple[Path, str | None]:
    """The data folder that `--root` or OAPL_ROOT names, on this machine; and its URL, where it has one."""
    place = place.removeprefix("file://")
    if not is_url(place):
        return Path(place).absolute(), None
    from pipeline.runs.at_url import working_root

    return working_root(place), place.rstrip("/")


def chosen(environment: Mapping[str, str] = os.environ) -> Chosen:
    """What the environment says. Raises RequestError where OAPL_SET is not a JSON list of texts."""
    try:
        overrides = json.loads(environment.get("OAPL_SET") or "[]")
    except json.JSONDecodeError:
        overrides = None
    if not isinstance(overrides, list) or not all(isinstance(item, str) for item in overrides):
        raise RequestError('OAPL_SET: expected a JSON list of key.path=value, such as ["learning.beta2=0.1"]')
    root, url = root_of(environment.get("OAPL_ROOT") or "data")
    return Chosen(root, environment.get("OAPL_RECIPE") or DEFAULT_RUN, tuple(overrides), url)
