"""The measurements of docs/evidence, and what they come to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import polars as pl

from pipeline.comparison.table import over_seeds, student

STEPS_KEPT = 250
"""Rows of each curve by optimizer step: a longer one is thinned out, as it is drawn no finer."""
TARGETS = (0.65, 0.7, 0.75)
"""Held-out pass@1 for which the completions are counted."""


def gather(compared: Path) -> dict[str, pl.DataFrame]:
    """The tables of the comparisons below `compared` by name, and `passk`."""
    found = {}
    for place in sorted(compared.glob("*/measurements.parquet")):
        table = pl.read_parquet(place)
        step_wise = (pl.col("task") == "train") & ~pl.col("metric").str.contains("seconds|reward|samples")
        stride = (pl.col("step").max().over("variant", "lag", "seed") // STEPS_KEPT).clip(lower_bound=1)
        found[place.parent.name] = table.filter(~step_wise | (pl.col("step") % stride == 0))
    if rows := [row for place in sorted((compared / "passk").glob("*.parquet")) for row in _passk(place)]:
        found["passk"] = pl.DataFrame(rows, infer_schema_length=None)
    return found


def _passk(place: Path) -> list[dict[str, object]]:
    from pipeline.evaluation.pass_at_k import read_evaluation

    name, lag, seed = place.stem.rsplit("-", 2)
    known = {"variant": name, "lag": int(lag.removeprefix("lag")), "seed": int(seed.removeprefix("seed"))}
    found = read_evaluation(place)
    return [
        known | {"task": task, "k": k, "value": estimate.mean, "low": estimate.low, "high": estimate.high}
        for task, estimates in {"all": found.overall, **found.by_source}.items()
        for k, estimate in estimates.items()
    ]


def kept(folder: Path) -> dict[str, pl.DataFrame]:
    """The tables of docs/evidence by name; `lags` has the short lags in it, as `smollm2` has."""
    found = {place.stem: pl.read_parquet(place) for place in sorted(folder.glob("*.parquet"))}
    for short, name in (("short_lag", "lags"), ("smollm2_short", "smollm2")):
        if short in found and name in found:
            found[name] = pl.concat([found.pop(short), found[name]])
    return found


def by_completions(lags: pl.DataFrame) -> pl.DataFrame:
    """Held-out pass@1 by the completions that were generated until then, of what is laid beside fresh samples.

    Columns `variant, lag, seed, completions, value`; the start has none.
    """
    table = lags.filter((pl.col("lag") <= 8) | (pl.col("variant") == "oapl-4-epochs"))
    keys = ["variant", "lag", "seed"]
    made = table.filter(pl.col("metric") == "samples").sort("step")
    made = made.select(*keys, "round", completions=pl.col("value").cum_sum().over(keys))
    held = table.filter((pl.col("task") == "all") & (pl.col("metric") == "pass@1"))
    start = held.filter(pl.col("round").is_null()).with_columns(completions=pl.lit(0.0))
    both = held.filter(pl.col("round").is_not_null()).join(made, on=[*keys, "round"])
    return pl.concat([part.select(*keys, "completions", "value") for part in (start, both)])


def needed(curves: pl.DataFrame, target: float) -> pl.DataFrame:
    """Completions until a curve of `by_completions` first reaches `target`, by straight lines between its points.

    Columns `variant, lag, seed, completions`; null where it never does.
    """
    rows = []
    for part in curves.sort("completions").partition_by("variant", "lag", "seed", maintain_order=True):
        points, found = list(part.select("completions", "value").iter_rows()), None
        for (before, low), (after, high) in pairwise(points):
            if low < target <= high:
                found = before + (after - before) * (target - low) / (high - low)
                break
        rows.append((*part.row(0)[:3], found))
    names = {"variant": pl.String, "lag": pl.Int64, "seed": pl.Int64, "completions": pl.Float64}
    return pl.DataFrame(rows, schema=names, orient="row")


def summary(tables: dict[str, pl.DataFrame]) -> str:
    """Markdown: of each comparison where its variants ended, means over seeds with Student's interval."""
    parts = []
    for name, table in tables.items():
        parts.append(f"\n### {name}\n")
        if name == "passk":
            parts += _of_passk(table)
            continue
        if name == "lags":
            parts += [*_of_needed(table), ""]
        means = over_seeds(table)
        rivals = sorted({metric for metric in means["metric"].to_list() if metric.startswith("against ")})
        ks = sorted({int(m.removeprefix("pass@")) for m in means["metric"].to_list() if m.startswith("pass@")})
        metrics = [*(f"pass@{k}" for k in ks), "entropy", *rivals]
        parts.append(f"| lag | variant | seeds | {' | '.join(metrics)} |\n|{'---|' * (3 + len(metrics))}")
        for part in means.partition_by(["lag", "variant"], maintain_order=True):
            cells = [_cell(part.filter(pl.col("metric") == metric)) for metric in metrics]
            parts.append(f"| {part['lag'][0]} | {part['variant'][0]} | {part['seeds'].max()} | {' | '.join(cells)} |")
    return "\n".join(parts)


def _of_needed(lags: pl.DataFrame) -> list[str]:
    curves = by_completions(lags)
    cells: dict[tuple[str, int], list[str]] = {}
    for target in TARGETS:
        for (variant, lag), part in needed(curves, target).group_by("variant", "lag", maintain_order=True):
            values = part["completions"].to_list()
            if None in values:  # a mean over those that get there would flatter
                cell = ", ".join("never" if value is None else f"{value:,.0f}" for value in values)
            else:
                low, high = student(values)
                cell = f"{sum(values) / len(values):,.0f}"
                cell += f" [{max(0, low):,.0f}, {high:,.0f}]" if low is not None and high is not None else ""
            cells.setdefault((str(variant), int(str(lag))), []).append(cell)
    lines = [f"| variant | lag | {' | '.join(f'until pass@1 {target:g}' for target in TARGETS)} |"]
    lines.append(f"|{'---|' * (2 + len(TARGETS))}")
    return lines + [f"| {variant} | {lag} | {' | '.join(told)} |" for (variant, lag), told in cells.items()]


def _of_passk(table: pl.DataFrame) -> list[str]:
    ks = table["k"].unique().sort().to_list()
    lines = [f"| task | policy | seeds | {' | '.join(f'pass@{k}' for k in ks)} |\n|{'---|' * (3 + len(ks))}"]
    for part in table.partition_by(["task", "variant"], maintain_order=True):
        cells = []
        for k in ks:
            values = part.filter(pl.col("k") == k)["value"].to_list()
            low, high = student(values)
            mean = f"{sum(values) / len(values):.3f}"
            # Student's interval knows nothing of where a probability ends.
            cells.append(mean if low is None or high is None else f"{mean} [{low:.2f}, {min(1.0, high):.2f}]")
        lines.append(f"| {part['task'][0]} | {part['variant'][0]} | {part['seed'].n_unique()} | {' | '.join(cells)} |")
    return lines


def _cell(row: pl.DataFrame) -> str:
    if row.is_empty():
        return "–"
    value, low, high = row["value"][0], row["low"][0], row["high"][0]
    sign = "+" if row["metric"][0].startswith("against") else ""
    return f"{value:{sign}.3f}" + (f" [{low:{sign}.2f}, {high:{sign}.2f}]" if low is not None else "")
