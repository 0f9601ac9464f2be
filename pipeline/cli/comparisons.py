"""`oapl compare`: losses, lags and seeds side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import RecipeOption, SetOption


def compare(
    out: Annotated[Path, typer.Option("--out", help="Folder of the comparison; gone on with where it has some cells.")],
    loss: Annotated[str | None, typer.Option("--loss", help="Losses, such as oapl,grpo.")] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME:KEY=VALUE,...",
            help="learning.* settings of a loss, or of one more thing to compare; repeatable.",
        ),
    ] = None,
    lag: Annotated[str, typer.Option("--lag", help="Optimizer steps between snapshots, such as 8,64.")] = "64",
    seeds: Annotated[str, typer.Option("--seeds", help="Such as 0,1,2.")] = "0",
    steps: Annotated[
        int | None, typer.Option("--steps", help="Optimizer steps in all; one round unless given.")
    ] = None,
    recipe: RecipeOption = None,
    rollouts: Annotated[
        Path | None,
        typer.Option("--rollouts", help="A run's folder: learn from one of its rounds, sample no new ones."),
    ] = None,
    round: Annotated[int, typer.Option("--round", min=0, help="Round of --rollouts.")] = 0,
    set: SetOption = None,
) -> None:
    """Run one recipe under several losses, lags and seeds, side by side: one table of measurements, and pictures."""
    from pipeline.comparison import grid

    compared = grid.arms(loss, variant or [])
    chosen = grid.numbers(seeds, "--seeds", 0)
    if rollouts is not None:
        from pipeline.sharing.bring import bring

        bring(rollouts, round)
        data = grid.Stored(rollouts, round)
        cells = grid.stored(recipe or str(rollouts / "recipe.yaml"), set or [], compared, chosen)
    else:
        lags, data = grid.numbers(lag, "--lag", 1), None
        cells = grid.fresh(recipe or "tiny", set or [], compared, lags, chosen, steps or max(lags))

    from pipeline.comparison import run as comparison
    from pipeline.comparison.show import show
    from pipeline.comparison.stages import Children

    with comparison.alone(out) as lock:
        try:
            comparison.compare(cells, out, Children(lock), partial(typer.echo, err=True), data)
        finally:
            show(out)
