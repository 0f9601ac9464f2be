"""The picture of a run: does pass@k rise, what did the data look like, did learning behave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.storage.durable import replacing

if TYPE_CHECKING:
    from pipeline.evaluation.curves import Curve

INK, FAINT, PALE = "#1f2430", "#6a7184", "#e3e6ee"
COLOURS = ("#2f6fde", "#e0772a", "#2a9d6f", "#9b51c7", "#c2394b")
WIDTH = 12.5
"""Inches."""
MOST_TASKS = 2
"""Tasks that have a panel of their own beside the one of all prompts."""


def draw_rounds(
    entries: Sequence[dict[str, Any]], curves: Sequence[Curve], pictures: dict[Path, int], *, title: str
) -> None:
    """Draws the report's entries and the learner's curves as PNG; `pictures` says where, and how many pixels wide.

    Above: pass@k by round with 95 % intervals, for all prompts and for up to MOST_TASKS tasks. Below: reward and
    length of what was learned from, the loss, and the log-ratio by optimizer step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    figure.suptitle(f"Run {title}", x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
    tasks = list(entries[0]["eval_by_source"])[:MOST_TASKS] if entries else []
    panels: list[str | None] = [None, *tasks] if len(tasks) > 1 else [None]
    for axis, task in zip(axes[0], panels, strict=False):
        _pass_at_k(axis, entries, task)
    for axis in axes[0][len(panels) :]:
        axis.set_visible(False)
    _data(axes[1][0], entries)
    _steps(axes[1][1], curves, "loss", "Loss")
    _steps(axes[1][2], curves, "log_ratio", "Mean log-ratio log π − log μ, nats a sequence")
    for out, width in pictures.items():
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            figure.savefig(temporary, format="png", dpi=width / WIDTH)


def _pass_at_k(axis: Any, entries: Sequence[dict[str, Any]], task: str | None) -> None:
    names = _names(entries)
    means = [entry["eval"] if task is None else entry["eval_by_source"][task] for entry in entries]
    spans = [entry["ci"] if task is None else entry["ci_by_source"][task] for entry in entries]
    ks = list(means[0]) if means else []
    for number, (colour, k) in enumerate(zip(COLOURS, ks, strict=False)):
        middle = [mean[k] for mean in means]
        # A little beside each other, so that the intervals can be told apart.
        places = [place + 0.06 * (number - (len(ks) - 1) / 2) for place in range(len(names))]
        low = [m - span[k][0] for m, span in zip(middle, spans, strict=True)]
        high = [span[k][1] - m for m, span in zip(middle, spans, strict=True)]
        axis.errorbar(
            places, middle, (low, high), color=colour, marker="o", markersize=4, capsize=2.5, label=f"pass@{k}"
        )
    axis.set_xlim(-0.4, max(1, len(names)) - 0.6)
    axis.set_ylim(0, 1.03)
    _by_round(axis, names, "Held-out pass@k after each round, " + ("all prompts" if task is None else task))
    if means:
        axis.legend(frameon=False, fontsize=8, loc="lower right", ncols=len(ks))


def _data(axis: Any, entries: Sequence[dict[str, Any]]) -> None:
    rounds = [entry for entry in entries if entry["round"] is not None]
    names = _names(rounds)
    rewards = [float("nan") if entry["reward_mean"] is None else entry["reward_mean"] for entry in rounds]
    lengths = [float("nan") if entry["tokens_mean"] is None else entry["tokens_mean"] for entry in rounds]
    (reward,) = axis.plot(range(len(names)), rewards, color=COLOURS[0], marker="o", markersize=4, label="mean reward")
    axis.set_ylim(0, 1.03)
    _by_round(axis, names, "What each round learned from")
    other = axis.twinx()
    (length,) = other.plot(
        range(len(names)), lengths, color=COLOURS[1], marker="s", markersize=4, linestyle="--", label="mean tokens"
    )
    other.set_ylim(0, max((value for value in lengths if value == value), default=1.0) * 1.3)
    other.set_ylabel("tokens a completion", fontsize=8, color=FAINT)
    axis.set_ylabel("reward", fontsize=8, color=FAINT)
    other.tick_params(colors=FAINT, labelsize=8, length=0)
    other.spines[:].set_visible(False)
    axis.legend(handles=[reward, length], frameon=False, fontsize=8, loc="lower right", ncols=2)


def _steps(axis: Any, curves: Sequence[Curve], name: str, title: str) -> None:
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        values = getattr(curve, name)
        axis.plot(curve.steps, values, color=colour, linewidth=0.8, alpha=0.35, marker="." if len(values) < 5 else None)
        axis.plot(curve.steps, smoothed(values), color=colour, linewidth=1.8, label=f"round {curve.round}")
    plain(axis, title)
    if name == "loss":
        _logarithmic(axis)  # a batch in a hundred has ten times the loss of the others
    axis.set_xlabel("optimizer step", fontsize=8, color=FAINT)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if 1 < len(curves) <= len(COLOURS):
        axis.legend(frameon=False, fontsize=8)


def _logarithmic(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def smoothed(values: Sequence[float], share: float = 0.12) -> list[float]:
    """Exponential mean, started at the first value."""
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else (1 - share) * smooth[-1] + share * value)
    return smooth


def _names(entries: Sequence[dict[str, Any]]) -> list[str]:
    return ["start" if entry["round"] is None else str(entry["round"]) for entry in entries]


def _by_round(axis: Any, names: Sequence[str], title: str) -> None:
    step = max(1, -(-len(names) // 12))
    axis.set_xticks(range(0, len(names), step), names[::step])
    axis.set_xlabel("round", fontsize=8, color=FAINT)
    plain(axis, title)


def plain(axis: Any, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.grid(axis="y", color=PALE, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=FAINT, labelsize=8, length=0)
    axis.spines[:].set_visible(False)
