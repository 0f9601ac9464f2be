"""`oapl prompts ...`: prompt files made of public problem sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import RequestError

app = typer.Typer(no_args_is_help=True, help="Make prompt files of public problem sets.")


@app.command("import")
def import_prompts(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FILE...", help="As published: .jsonl, .jsonl.gz or .parquet. NAME is the prompts' source."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Prompt file to write, .parquet.")],
    kind: Annotated[str, typer.Option("--kind", help="math, deepcoder, livecodebench, apps, taco, humaneval or mbpp.")],
    heldout: Annotated[bool, typer.Option("--heldout", help="Mark the prompts as held out.")] = False,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out records that can't be used.")] = False,
) -> None:
    """Turn downloaded rows of public problem sets into one file of prompts."""
    from pipeline.prompts.problem_sets import import_prompts as convert

    if out.suffix != ".parquet":
        raise RequestError(f"{out}: prompts are written as .parquet")
    skipped: list[str] | None = [] if skip else None
    pairs = [_named(item) for item in files]
    counts = convert(kind, pairs, out, "heldout" if heldout else "train", skipped)
    typer.echo(f"{out}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if skipped:
        typer.echo(f"{len(skipped):,} records left out, the first: {skipped[0]}", err=True)


def _named(item: str) -> tuple[str, Path]:
    """`NAME=FILE`, or a file whose name without suffixes is the source's."""
    name, equals, file = item.partition("=")
    return (name, Path(file)) if equals and not Path(item).exists() else (Path(item).name.partition(".")[0], Path(item))
