"""The end of a comparison: table, pictures and a summary on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.comparison.run import all_cells

if TYPE_CHECKING:
    import polars as pl


def show(out: Path) -> None:
    """Writes measurements and pictures of what is made so far, and prints where each cell ended."""
    from rich.console import Console

    from pipeline.comparison.pictures import draw
    from pipeline.comparison.table import measure, write

    table = measure(all_cells(out), out)
    if table.is_empty():
        return
    place = write(table, out)
    pictures = draw(table, out)
    console = Console()
    console.print(_summary(table))
    if table["seed"].n_unique() > 1:
        console.print(_over_seeds(table))
    console.print(f"Numbers: {place}", soft_wrap=True)
    console.print(f"Page: {out / 'index.html'} ({', '.join(path.name for path in pictures)})", soft_wrap=True)


def _summary(table: pl.DataFrame) -> object:
    from rich.table import Table

    found = Table(title="Held-out prompts, start and last step, 95 % intervals over prompts", title_justify="left")
    keys = ["variant", "lag", "seed"]
    ks = sorted({int(m.removeprefix("pass@")) for m in table["metric"].to_list() if m.startswith("pass@")})
    metrics = [*(f"pass@{k}" for k in ks), "entropy"]
    rivals = sorted({m for m in table["metric"].to_list() if m.startswith("against ")})
    for head in [*keys, "step", "start pass@1", *metrics, *rivals]:
        found.add_column(head, justify="left" if head == "variant" else "right", no_wrap=head == "variant")
    for part in table.partition_by(keys, maintain_order=True):
        last = part.filter(part["task"] == "all").sort("step", maintain_order=True)
        if last.is_empty():
            continue
        begin = last.filter((last["metric"] == "pass@1") & last["round"].is_null())
        final = last.filter(last["step"] == last["step"].max())
        cells = [*(str(part[key][0]) for key in keys), str(last["step"].max())]
        cells.append(f"{begin['value'][0]:.3f}" if len(begin) else "–")
        found.add_row(*cells, *(_cell(final, metric) for metric in [*metrics, *rivals]))
    return found


def _over_seeds(table: pl.DataFrame) -> object:
    from rich.table import Table

    from pipeline.comparison.table import over_seeds

    means = over_seeds(table)
    found = Table(title="Means over seeds, 95 % intervals over seeds (Student's)", title_justify="left")
    metrics = [name for name in means["metric"].unique(maintain_order=True).to_list() if not name.startswith("gain")]
    metrics.sort(key=lambda name: (name.startswith("against "), not name.startswith("pass@")))
    for head in ["variant", "lag", "seeds", *metrics]:
        found.add_column(head, justify="left" if head == "variant" else "right", no_wrap=head == "variant")
    for part in means.partition_by(["variant", "lag"], maintain_order=True):
        found.add_row(
            part["variant"][0],
            str(part["lag"][0]),
            str(part["seeds"].max()),
            *(_cell(part, metric) for metric in metrics),
        )
    return found


def _cell(final: pl.DataFrame, metric: str) -> str:
    row = final.filter(final["metric"] == metric)
    if row.is_empty():
        return "–"
    value, low, high = row["value"][0], row["low"][0], row["high"][0]
    sign = "+" if metric.startswith("against ") else ""
    if low is None:
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.3f} [{low:{sign}.2f}, {high:{sign}.2f}]"
