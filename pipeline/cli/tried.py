"""What `oapl preflight` does: the table of what fits, and trials of engine and learner."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline import modules
from pipeline.errors import RequestError, WorkError
from pipeline.layout import Run
from pipeline.planning.fits import Check, fits, known_shape, refuse
from pipeline.planning.machine import this_machine
from pipeline.planning.preflight import one_line, rehearse, trials
from pipeline.policies import snapshots
from pipeline.policies.fetch import find_policy
from pipeline.recipe import Recipe, load_recipe
from pipeline.storage.cache import cache_folder
from pipeline.storage.places import local_path

LAST = 4000
"""Characters of a failed trial's output that are shown where it gave no line."""


def preflight(recipe_name: str, root: str, changes: list[str], trial: bool) -> None:
    """Prints what was checked and tried. Raises RequestError or WorkError with the first thing that does not work."""
    recipe = load_recipe(recipe_name, changes)
    place = local_path(root) or cache_folder()
    run = Run(place, recipe.name)
    policy = _policy(recipe, run) if trial else None
    found = fits(recipe, known_shape(recipe, policy), this_machine(), run.path)
    console = Console()
    console.print(_table(found))
    refuse(found)
    if not trial:
        return
    if policy is None:
        console.print("the policy is made by the run itself, so engine and learner are tried there")
        return
    with tempfile.TemporaryDirectory(dir=_made(place), prefix=".preflight-") as folder:
        recipe_file, mark = Path(folder) / "recipe.yaml", Path(folder) / "preflight.json"
        recipe.save(recipe_file)
        wanted, _ = trials(recipe, known_shape(recipe, policy), this_machine())
        if wanted:
            console.print(f"trying {' and '.join(one.name.removeprefix('preflight ') for one in wanted)}", style="dim")
        console.print(one_line(rehearse(recipe, recipe_file, policy, mark, _start)), highlight=False)


def _made(place: Path) -> Path:
    """A folder of the data folder, which all nodes see."""
    place.mkdir(parents=True, exist_ok=True)
    return place.absolute()


def _policy(recipe: Recipe, run: Run) -> Path | None:
    """The recipe's model, or the start of its run; null where that is still to be made."""
    if recipe.policy.model is not None:
        return find_policy(recipe.policy.model)
    start = snapshots.newest(run, None)
    return run.snapshot(start.snapshot_id) if start is not None else None


def _table(found: Sequence[Check]) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("", "what", "found", "to mend it"):
        table.add_column(heading, overflow="fold")
    for one in found:
        mark = "?" if one.fits is None else "fits" if one.fits else "NO"
        table.add_row(mark, one.name, one.told, one.cure if one.fits is False else "")
    return table


def _start(name: str, module: str, words: Sequence[object]) -> None:
    """Runs a trial here; its output is shown only where it fails without a line for a person."""
    done = subprocess.run(
        modules.python(module, *words), stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    if not done.returncode:
        return
    said = [line.removeprefix("oapl: ") for line in done.stderr.splitlines() if line.startswith("oapl: ")]
    if not said:
        sys.stderr.write(done.stderr[-LAST:])
    text = said[-1] if said else f"the process ended with status {done.returncode}; its last lines are above"
    raise (RequestError if done.returncode == RequestError.exit_code else WorkError)(f"{name}: {text}")
