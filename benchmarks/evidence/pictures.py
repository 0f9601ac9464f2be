"""The pictures of docs/evidence.md: each seed as a point or thin line, the mean over seeds as a thick one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.evidence.tables import by_completions
from pipeline.comparison.pictures import MORE
from pipeline.evaluation.plots import COLOURS, FAINT, INK, plain

PIXELS, WIDTH = 1300, 11.5
SHOWN = ("oapl", "grpo", "grpo-wider", "grpo-paper")
"""grpo-truncated lies on grpo where engine and trainer agree."""
Tables = dict[str, pl.DataFrame]


def draw(tables: Tables, out: Path) -> list[Path]:
    """Draws those pictures whose measurements are there."""
    made = []
    for name, (title, panels, needed) in PICTURES.items():
        if not all(table in tables for table in needed):
            continue
        figure, axes = _figure(title, len(panels))
        for axis, panel in zip(axes, panels, strict=True):
            panel(axis, tables)
        place = out / f"{name}.png"
        figure.savefig(place, format="png", dpi=PIXELS / WIDTH)
        made.append(place)
    return made


def _figure(title: str, panels: int) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure, figure.subplots(1, panels, squeeze=False)[0].tolist()


def _colour(name: str, names: Sequence[str]) -> str:
    usual = {
        "oapl": COLOURS[0],
        "grpo": COLOURS[1],
        "start": FAINT,
        "grpo-paper": COLOURS[3],
        "grpo-truncated": COLOURS[2],
    }
    others = [colour for colour in (*COLOURS[2:], *MORE) if colour not in usual.values()]
    unknown = [other for other in names if other not in usual]
    return usual.get(name) or others[unknown.index(name) % len(others)]


def _last(table: pl.DataFrame, task: str, metric: str) -> pl.DataFrame:
    part = table.filter((pl.col("task") == task) & (pl.col("metric") == metric) & pl.col("round").is_not_null())
    return part.sort("step", maintain_order=True).group_by("variant", "lag", "seed", maintain_order=True).last()


def _lines(axis: Any, table: pl.DataFrame, x: str, labels: str, title: str, under: str) -> None:
    """`table` has `variant, seed, value` and x: seeds as points, means as a line a variant."""
    names = table["variant"].unique(maintain_order=True).to_list()
    for name in names:
        one = table.filter(pl.col("variant") == name)
        means = one.group_by(x).agg(pl.col("value").mean()).sort(x)
        colour = _colour(name, names)
        axis.plot(means[x], means["value"], color=colour, label=name, linewidth=1.8)
        axis.plot(one[x], one["value"], color=colour, marker="o", markersize=4, linestyle="", alpha=0.55)
    axis.set_xlabel(under, fontsize=8, color=FAINT)
    if labels:
        axis.legend(frameon=False, fontsize=8, loc=labels)
    plain(axis, title)


def _by_lag(task: str, metric: str, title: str) -> Callable[[Any, Tables], None]:
    def panel(axis: Any, tables: Tables) -> None:
        lags = _last(tables["lags"], task, metric).filter(pl.col("variant").is_in(SHOWN))
        _lines(
            axis, lags, "lag", "lower left" if task == "all" else "", title, "lag, optimizer steps between snapshots"
        )
        axis.set_xscale("log")
        places = lags["lag"].unique().sort().to_list()
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()

    return panel


def _by_samples(axis: Any, tables: Tables) -> None:
    """Held-out pass@1 after so many completions were generated."""
    named = by_completions(tables["lags"]).with_columns(variant=pl.format("{}, lag {}", "variant", "lag"))
    names = named["variant"].unique(maintain_order=True).to_list()
    for name in names:
        one = named.filter(pl.col("variant") == name)
        colours = {"grpo, lag 8": COLOURS[1], "oapl, lag 8": COLOURS[0], "grpo, lag 4": COLOURS[2]}
        colour = colours.get(name, COLOURS[3])
        for seed in one.sort("seed").partition_by("seed", maintain_order=True):
            line = seed.sort("completions")
            axis.plot(line["completions"], line["value"], color=colour, alpha=0.35, linewidth=0.9)
        means = one.group_by("completions").agg(pl.col("value").mean()).sort("completions")
        axis.plot(
            means["completions"], means["value"], color=colour, linewidth=1.8, marker="o", markersize=3.5, label=name
        )
    axis.set_xlabel("completions generated", fontsize=8, color=FAINT)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    plain(axis, "Held-out pass@1, all prompts")


def _by_step(table: str, lag: int, task: str, metric: str, title: str) -> Callable[[Any, Tables], None]:
    def panel(axis: Any, tables: Tables) -> None:
        part = tables[table].filter((pl.col("task") == task) & (pl.col("metric") == metric) & (pl.col("lag") == lag))
        names = [name for name in SHOWN if name in part["variant"]]
        for name in names:
            one, colour = part.filter(pl.col("variant") == name), _colour(name, names)
            means = one.group_by("step").agg(pl.col("value").mean()).sort("step")
            smooth = means["value"].rolling_mean(25, min_samples=1, center=True) if task == "train" else means["value"]
            for seed in one.sort("seed").partition_by("seed", maintain_order=True):
                axis.plot(seed.sort("step")["step"], seed.sort("step")["value"], color=colour, alpha=0.2, linewidth=0.7)
            axis.plot(means["step"], smooth, color=colour, linewidth=1.8, label=name)
        axis.set_xlabel("optimizer step", fontsize=8, color=FAINT)
        if metric == "grad_norm":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=8)
        plain(axis, title)

    return panel


def _by_k(task: str) -> Callable[[Any, Tables], None]:
    def panel(axis: Any, tables: Tables) -> None:
        part = tables["passk"].filter(pl.col("task") == task)
        _lines(axis, part, "k", "lower right", f"pass@k, {task.removeprefix('tiny-')}", "k")
        axis.set_xscale("log", base=2)
        axis.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])

    return panel


def _of_one_model(axis: Any, tables: Tables) -> None:
    """pass@k of SmolLM2 before and after a round of 32 steps, with intervals over prompts."""
    table = tables["smollm2"].filter((pl.col("task") == "all") & pl.col("metric").str.starts_with("pass@"))
    table = table.filter(pl.col("lag") == 32).with_columns(k=pl.col("metric").str.slice(5).cast(pl.Int64))
    start = table.filter(pl.col("round").is_null() & (pl.col("variant") == "oapl"))
    for name, part in [("start", start), *((v, table.filter(pl.col("variant") == v)) for v in ("oapl", "grpo"))]:
        one = (part if name == "start" else part.filter(pl.col("round").is_not_null())).sort("k")
        colour = _colour(name, ())
        axis.plot(one["k"], one["value"], color=colour, marker="o", markersize=4, linewidth=1.8, label=name)
        axis.fill_between(one["k"], one["low"], one["high"], color=colour, alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(places := one["k"].to_list(), list(map(str, places)))
    axis.set_xlabel("k", fontsize=8, color=FAINT)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    plain(axis, "Held-out pass@k, lag 32, bands over prompts")


def _of_one_model_by_step(axis: Any, tables: Tables) -> None:
    table = tables["smollm2"].filter((pl.col("task") == "all") & (pl.col("metric") == "pass@1"))
    for lag, dashes in ((32, "-"), (8, ":")):
        for name in ("oapl", "grpo"):
            one = table.filter((pl.col("lag") == lag) & (pl.col("variant") == name)).sort("step")
            if one.is_empty():
                continue
            label = f"{name}, lag {lag}"
            axis.plot(
                one["step"], one["value"], color=_colour(name, ()), marker="o", markersize=4, ls=dashes, label=label
            )
    axis.set_xlabel("optimizer step", fontsize=8, color=FAINT)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    plain(axis, "Held-out pass@1")


def _by_beta(axis: Any, tables: Tables) -> None:
    last = _last(tables["betas"], "all", "pass@1")
    told = last["variant"].str.extract_groups(r"^beta1-(?P<beta1>[\d.]+)-beta2-(?P<beta2>[\d.]+)$")
    betas = last.with_columns(
        variant=pl.concat_str(pl.lit("beta1 "), told.struct.field("beta1")),
        beta2=told.struct.field("beta2").cast(pl.Float64),
    )
    _lines(
        axis, betas.sort("variant"), "beta2", "lower center", "Held-out pass@1, one stored round of 64 steps", "beta2"
    )
    axis.set_xscale("log")
    places = betas["beta2"].unique().sort().to_list()
    axis.set_xticks(places, list(map(str, places)))
    axis.minorticks_off()


def _dots(table: str, title: str) -> Callable[[Any, Tables], None]:
    """A row a variant: each seed's pass@1, and their mean as a bar."""

    def panel(axis: Any, tables: Tables) -> None:
        last = _last(tables[table], "all", "pass@1")
        names = last["variant"].unique(maintain_order=True).to_list()
        for place, name in enumerate(names[::-1]):
            values = last.filter(pl.col("variant") == name)["value"]
            axis.plot(
                values, [place] * len(values), marker="o", markersize=4.5, linestyle="", color=COLOURS[0], alpha=0.6
            )
            axis.plot([values.mean()] * 2, [place - 0.25, place + 0.25], color=INK, linewidth=1.8)
        axis.set_yticks(range(len(names)), names[::-1], fontsize=8)
        axis.locator_params(axis="x", nbins=4)
        axis.set_xlabel("held-out pass@1", fontsize=8, color=FAINT)
        plain(axis, title)

    return panel


PICTURES: dict[str, tuple[str, list[Callable[[Any, Tables], None]], tuple[str, ...]]] = {
    "lags": (
        "After the last step, by lag",
        [
            _by_lag("all", "pass@1", "Held-out pass@1, all prompts"),
            _by_lag("math", "pass@1", "arithmetic"),
            _by_lag("code", "pass@1", "programs"),
        ],
        ("lags",),
    ),
    "entropy": (
        "Entropy and gradients over a round of 400 steps",
        [
            _by_step("lags", 400, "train", "entropy", "Entropy of the policy on the data, nats a token"),
            _by_step("lags", 400, "train", "grad_norm", "Gradient norm before clipping"),
            _by_step("lags", 400, "train", "log_ratio_abs", "Mean |log π − log μ|, nats a sequence"),
        ],
        ("lags",),
    ),
    "generations": ("What a completion buys", [_by_samples], ("lags",)),
    "passk": (
        "pass@k before and after 400 steps at lag 400",
        [_by_k("all"), _by_k("tiny-arithmetic"), _by_k("tiny-programs")],
        ("passk",),
    ),
    "betas": ("Betas, from one stored dataset", [_by_beta], ("betas",)),
    "choices": (
        "Lag 64: what stands for the behaviour policy, uniform groups, epochs and replay",
        [
            _dots("behaviour-bfloat16", "Behaviour, bfloat16 engine"),
            _dots("groups", "Groups without variance"),
            _dots("epochs", "Epochs"),
            _dots("replay", "Older rounds replayed, lag 8"),
        ],
        ("behaviour-bfloat16", "groups", "epochs", "replay"),
    ),
    "smollm2": (
        "SmolLM2-135M-Instruct on sums, one seed",
        [_of_one_model, _of_one_model_by_step],
        ("smollm2",),
    ),
}
