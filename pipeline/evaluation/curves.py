"""A round's learning by optimizer step, thinned so that a picture can hold it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.layout import Run

MOST_POINTS = 2000
"""Points that a curve keeps of one round."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A round's learning by optimizer step; steps count from the start of the run."""

    round: int
    steps: list[int]
    loss: list[float]
    log_ratio: list[float]


def curve(run: Run, round: int) -> Curve:
    """Loss and log-ratio by step, thinned to MOST_POINTS; empty where the round has not learned yet."""
    points = _thinned(_learning_rows(run.learning_log(round)))
    return Curve(
        round,
        [int(row["step"]) for row in points],
        [float(row["loss"]) for row in points],
        [float(row["log_ratio"]) for row in points],
    )


def _learning_rows(log: Path) -> Iterator[dict[str, Any]]:
    if log.exists():
        with log.open(encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)


def _thinned(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every n-th row, n a power of two such that at most MOST_POINTS are kept at any time."""
    kept: list[dict[str, Any]] = []
    every = 1
    for number, row in enumerate(rows):
        if number % every == 0:
            kept.append(row)
        if len(kept) > MOST_POINTS:
            kept, every = kept[::2], every * 2
    return kept
