"""What a run's rounds came to, as tables for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.evaluation.report import name_of
from pipeline.runs.stages import STAGES

if TYPE_CHECKING:
    from rich.table import Table


def summary_tables(found: list[dict[str, Any]]) -> Iterator[Table]:
    """The report's entries for a terminal of 80 columns: how well the policy does, then what the rounds took."""
    ks = list(found[0]["eval"]) if found else []
    tasks = list(found[0]["eval_by_source"]) if found else []
    heads = [f"pass@{ks[0]}\n{name}" for name in _ends(tasks)] if len(tasks) > 1 else []
    scores = _table("Held-out pass@k with 95 % intervals", ["round", "step", *(f"pass@{k}" for k in ks), *heads])
    costs = _table(
        "What each round learned from, and seconds a stage", ["round", "snapshot", "rollouts", "reward", *STAGES]
    )
    for entry in found:
        estimates = [_estimate(entry["eval"][k], entry["ci"][k]) for k in ks]
        if heads:
            by_task, spans = entry["eval_by_source"], entry["ci_by_source"]
            estimates += [_estimate(by_task[task][ks[0]], spans[task][ks[0]]) for task in tasks]
        scores.add_row(name_of(entry["round"]), f"{entry['step']:,}", *estimates)
        reward = "–" if entry["reward_mean"] is None else f"{entry['reward_mean']:.3f}"
        seconds = [f"{entry['seconds'][stage]:.1f}" for stage in STAGES]
        costs.add_row(name_of(entry["round"]), entry["snapshot_id"], f"{entry['generated']:,}", reward, *seconds)
    yield scores
    yield costs


def _ends(names: list[str]) -> list[str]:
    """The names without what stands before the first hyphen, where that is the same in all of them."""
    parted = [name.partition("-") for name in names]
    alike = len({first for first, _, _ in parted}) == 1 and all(end for _, _, end in parted)
    return [end for _, _, end in parted] if alike else names


def _table(title: str, heads: list[str]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    table.box, table.pad_edge, table.padding = SIMPLE_HEAD, False, (0, 1, 0, 0)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number else "left", no_wrap=True)
    return table


def _estimate(mean: float, span: tuple[float, float]) -> str:
    return f"{mean:.3f}\n{span[0]:.2f}–{span[1]:.2f}"
