"""`oapl verify`: answers and programs judged, from a file of cases or from rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.recipe import Recipe
    from pipeline.rollouts.locate import Located

from pipeline.cli.options import RecipeOption, SetOption, settings_of
from pipeline.errors import RequestError


def verify(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE.jsonl",
            help="A case a line: id, task, response, answer or tests; or a folder or URL of rollouts.",
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Where verdicts go, .jsonl or .parquet; a folder's go into it.")
    ] = None,
    recipe: RecipeOption = None,
    set: SetOption = None,
) -> None:
    """Judge answers and programs. Needs no model."""
    settings = settings_of(recipe, set or [])
    from pipeline.storage.places import is_url, without_scheme

    file = without_scheme(file)
    if is_url(file) or Path(file).is_dir():
        counts, place = _verify_rollouts(file, settings)
    elif out is None:
        raise RequestError("verify needs --out, a .jsonl or .parquet file for the verdicts")
    else:
        from pipeline.verifiers.command import verify_file

        counts, place = verify_file(Path(file), out, settings.verification), str(out)
    words = "".join(f", {count:,} {name}" for name, count in sorted(counts.items()))
    typer.echo(f"{place}: {sum(counts.values()):,} verdicts{words}")


def _verify_rollouts(place: str, settings: Recipe) -> tuple[dict[str, int], str]:
    """Judges a folder's or a URL's rollouts; verdicts go beside them. Returns the statuses and where they went."""
    from pipeline.rollouts.mirror import verdicts_copy
    from pipeline.sharing.bring import bring
    from pipeline.storage.places import is_url

    found = bring(place)
    copy = verdicts_copy(found)
    if copy is None and is_url(place):
        raise RequestError(f"{place}: an exported dataset stays as it is; import it, and judge the folder")
    if copy is None:
        return _judge(found, settings, found.verdict_folder), str(found.verdict_folder)
    copy.bring(lambda name: "/" not in name)
    counts = _judge(found, settings, copy.folder)
    copy.send(lambda name: "/" not in name)
    return counts, copy.url


def judge_here(found: Located, settings: Recipe) -> tuple[dict[str, int], str]:
    """Verdicts for rollouts that have none yet, where `bring` finds them; nothing is sent to a URL."""
    import shutil

    from pipeline.rollouts.mirror import verdicts_copy

    copy, place = verdicts_copy(found), found.verdict_folder
    if copy is None:
        return _judge(found, settings, place), str(place)
    counts = _judge(found, settings, copy.folder)  # kept there, where the next call finds them judged
    shutil.copytree(copy.folder, place, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    return counts, str(place)


def _judge(found: Located, settings: Recipe, out: Path) -> dict[str, int]:
    from pipeline.scoring.score import score

    if found.prompts is None:
        raise RequestError(f"{found.root}: no prompts.parquet beside the rollouts, so no answers to judge by")
    return score(found.rollouts, found.prompts, out, settings.verification).statuses
