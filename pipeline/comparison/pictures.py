"""The pictures of a comparison: what was learned, by step and lag, and whether learning behaved."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.comparison.table import TRAIN
from pipeline.evaluation.plots import COLOURS, FAINT, INK, WIDTH, plain, smoothed
from pipeline.storage.durable import replacing

if TYPE_CHECKING:
    import polars as pl

PIXELS = 1400
MOST_TASKS = 2
MORE = ("#8a6d1f", "#4b5563", "#d36ba6")
"""Colours of variants past those that other pictures have."""


def draw(table: pl.DataFrame, out: Path) -> list[Path]:
    """Draws a picture a lag, one of all lags where there are several, and a page of them; returns the pictures."""
    made = []
    lags = table["lag"].drop_nulls().unique().sort().to_list()
    for lag in lags:
        figure, axes = _figure(3, f"Lag {lag}: {lag} optimizer steps between snapshots")
        _lag(axes, table.filter(table["lag"] == lag))
        made.append(_save(figure, out / f"lag-{lag:04d}.png"))
    if len(lags) > 1:
        figure, axes = _figure(1, "After the last step, by lag")
        for axis, (task, metric) in zip(axes, [("all", "pass@1"), *_panels(table)[1:3]], strict=False):
            _by_lag(axis, table, task, metric)
        made.append(_save(figure, out / "lags.png"))
    page = out / "index.html"
    images = "\n".join(f'<p><img src="{path.name}" alt="{path.stem}"></p>' for path in made)
    page.write_text(_PAGE.format(name=html.escape(out.absolute().name), images=images), encoding="utf-8")
    return made


def _figure(rows: int, title: str) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.4 * rows + 0.4), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    return figure, figure.subplots(rows, 3).flatten().tolist()


def _save(figure: Any, place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    with replacing(place) as temporary:
        figure.savefig(temporary, format="png", dpi=PIXELS / WIDTH)
    return place


def _panels(table: pl.DataFrame) -> list[tuple[str, str]]:
    """pass@1 of all and of each task, then pass@k of the larger ks."""
    names = table["metric"].unique().to_list()
    ks = sorted(int(name.removeprefix("pass@")) for name in names if name.startswith("pass@"))
    tasks = sorted(set(table["task"].to_list()) - {"all", TRAIN})
    chosen = [("all", "pass@1"), *((task, "pass@1") for task in tasks[:MOST_TASKS])] if len(tasks) > 1 else []
    chosen = chosen or [("all", "pass@1")]
    return [*chosen, *(("all", f"pass@{k}") for k in ks[::-1] if k > 1)][:5]


def _lag(axes: list[Any], table: pl.DataFrame) -> None:
    panels = _panels(table)
    for axis, (task, metric) in zip(axes, panels, strict=False):
        _evaluations(axis, table, task, metric)
    left = iter(axes[len(panels) :])
    _evaluations(next(left), table, "all", "entropy")
    for metric, title in (
        ("grad_norm", "Gradient norm before clipping"),
        ("log_ratio_abs", "Mean |log π − log μ|, nats a sequence"),
        ("surprise", "Surprise, −log π a token of the data"),
    ):
        _steps(next(left), table, metric, title)
    for axis in left:
        axis.set_visible(False)


def _variants(table: pl.DataFrame) -> list[tuple[str, str]]:
    names = table["variant"].unique(maintain_order=True).to_list()
    colours = (*COLOURS, *MORE)
    return [(name, colours[number % len(colours)]) for number, name in enumerate(names)]


def _evaluations(axis: Any, table: pl.DataFrame, task: str, metric: str) -> None:
    import polars as pl

    part = table.filter((pl.col("task") == task) & (pl.col("metric") == metric))
    span = max([1, *part["step"].to_list()])
    for number, (name, colour) in enumerate(_variants(table)):
        seeds = part.filter(pl.col("variant") == name).sort("step").partition_by("seed", maintain_order=True)
        for which, one in enumerate(sorted(seeds, key=lambda one: one["seed"][0])):
            middle = one["value"]
            # A little beside each other, so that the intervals can be told apart.
            places = one["step"] + span * 0.012 * (number + which / 4 - 0.5)
            axis.errorbar(
                places,
                middle,
                (middle - one["low"], one["high"] - middle),
                color=colour,
                alpha=0.75,
                linestyle=("-", "--", ":", "-.")[which % 4],
                marker="o",
                markersize=3.5,
                capsize=2,
                linewidth=1.3,
                label=f"{name}, seed {one['seed'][0]}",
            )
    words = "Held-out entropy, nats a token" if metric == "entropy" else f"Held-out {metric}, {task}"
    plain(axis, words)
    axis.set_xlabel("optimizer step", fontsize=8, color=FAINT)
    if metric == "pass@1" and task == "all":
        axis.legend(frameon=False, fontsize=7, loc="lower right")
    axis.set_ylim(bottom=0, top=None if metric == "entropy" else 1.03)


def _steps(axis: Any, table: pl.DataFrame, metric: str, title: str) -> None:
    import polars as pl

    part = table.filter((pl.col("task") == TRAIN) & (pl.col("metric") == metric)).sort("step")
    for name, colour in _variants(table):
        seeds = part.filter(pl.col("variant") == name).partition_by("seed", maintain_order=True)
        for which, one in enumerate(sorted(seeds, key=lambda one: one["seed"][0])):
            axis.plot(one["step"], one["value"], color=colour, linewidth=0.6, alpha=0.25)
            style = ("-", "--", ":", "-.")[which % 4]
            axis.plot(one["step"], smoothed(one["value"].to_list()), color=colour, linewidth=1.5, linestyle=style)
    plain(axis, title)
    if metric == "grad_norm":
        axis.set_yscale("log")  # losses differ in their scale, and clipping makes them alike
    axis.set_xlabel("optimizer step", fontsize=8, color=FAINT)


def _by_lag(axis: Any, table: pl.DataFrame, task: str, metric: str) -> None:
    import polars as pl

    part = table.filter((pl.col("task") == task) & (pl.col("metric") == metric))
    last = part.sort("step").group_by("variant", "lag", "seed").last()
    for name, colour in _variants(table):
        one = last.filter(pl.col("variant") == name)
        means = one.group_by("lag").agg(pl.col("value").mean()).sort("lag")
        axis.plot(means["lag"], means["value"], color=colour, label=name)
        axis.plot(one["lag"], one["value"], color=colour, marker="o", markersize=4, linestyle="", alpha=0.6)
    axis.set_xscale("log")
    axis.set_ylim(0, 1.03)
    axis.set_xlabel("lag, optimizer steps between snapshots", fontsize=8, color=FAINT)
    axis.legend(frameon=False, fontsize=8)
    plain(axis, f"Held-out {metric}, {task}: each seed, and their mean")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<style>body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }}
img {{ max-width: 100%; }}</style></head><body>
<h1>{name}</h1>
<p>A colour a variant, a line style a seed. Bars are 95 % intervals over held-out prompts: they say nothing of how much
another seed would differ. All numbers are in <a href="measurements.parquet">measurements.parquet</a>.</p>
{images}
</body></html>
"""
