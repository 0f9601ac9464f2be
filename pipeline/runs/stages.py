"""What each stage of a round was made from, and the seconds that it took: a file a round."""

from __future__ import annotations

import json
from typing import Any

from pipeline.layout import Run
from pipeline.storage.durable import write_durably

STAGES = ("generate", "verify", "learn", "evaluate")


START = "start"
"""Key of the seconds that making the first snapshot took, among the stages of round 0."""


START_EVALUATION = "evaluate_start"


def read_stages(run: Run, round: int) -> dict[str, dict[str, Any]]:
    """The record of each stage that the round has been through; empty before the first."""
    try:
        record: dict[str, dict[str, Any]] = json.loads(run.stages(round).read_bytes())
    except FileNotFoundError:
        return {}
    return record


def note_stage(run: Run, round: int, stage: str, *, seconds: float = 0.0, **facts: Any) -> None:
    """Adds `seconds` to what the stage took so far, over all attempts, and remembers `facts` of it."""
    record = read_stages(run, round)
    before = record.get(stage, {})
    record[stage] = before | facts | {"seconds": round_to(before.get("seconds", 0.0) + seconds)}
    place = run.stages(round)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_durably(place, json.dumps(record, indent=1).encode())


def round_to(seconds: float) -> float:
    return float(f"{seconds:.2f}")
