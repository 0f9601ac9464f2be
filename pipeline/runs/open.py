"""Opening a run's folder, and knowing its settings again."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import RequestError
from pipeline.layout import Run
from pipeline.recipe import Recipe, differences, load_recipe
from pipeline.storage.durable import replacing

MAY_CHANGE = ("rounds", "nightly", "description")
"""Settings that a run in progress may be given anew: they change nothing of what was made."""


def open_run(data: Path, recipe: Recipe) -> Run:
    """The run of that recipe below `data`, begun or gone on with.

    Raises RequestError where the run was begun under other settings, naming the first difference.
    """
    run = Run(data, recipe.name)
    changed = changed_settings(run, recipe)
    if changed:
        raise RequestError(
            f"run {run.path} was begun under other settings ({'; '.join(changed)}); "
            "give it another name with --set name=..., another --root, or the settings it has"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    with replacing(run.recipe) as temporary:
        recipe.save(temporary)
    return run


def changed_settings(run: Run, recipe: Recipe) -> list[str]:
    """`key: old -> new` of what keeps the run from going on under that recipe; none where it has not begun."""
    if not run.recipe.exists():
        return []
    return [line for line in differences(run_recipe(run), recipe) if not line.startswith(MAY_CHANGE)]


def run_recipe(run: Run) -> Recipe:
    """The settings that the run was begun with. Raises RequestError where there is no such run."""
    if not run.recipe.exists():
        raise RequestError(f"no run in {run.path}: start it with `oapl run`")
    return load_recipe(str(run.recipe))
