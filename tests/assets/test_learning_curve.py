"""What a learning step tells while it runs."""

from __future__ import annotations

import json
from pathlib import Path

from assets.learning_curve import LearningCurve


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(log: Path, *steps: int, mode: str = "a") -> None:
    """A step's loss is its number, its gradient norm ten times that; `seconds` is nobody's concern here."""
    with log.open(mode) as file:
        file.writelines(json.dumps({"step": n, "loss": n, "grad_norm": 10 * n, "seconds": 1}) + "\n" for n in steps)


def test_means_since_the_last_point(tmp_path: Path) -> None:
    clock, told = Clock(), list[tuple[int, dict[str, float]]]()
    log = tmp_path / "log.jsonl"
    curve = LearningCurve(log, lambda step, means: told.append((step, means)), clock)
    write(log, 1, 2)
    curve("learn: 2/2,000 steps, 6 s left")  # too early
    clock.now = 10.0
    curve("recompute: 1/3 row groups, 6 s left")  # not of learning
    assert told == []
    curve("learn: 2/2,000 steps, loss 0.1, 6 s left")
    clock.now = 20.0
    curve("learn: 2/2,000 steps, loss 0.1, 6 s left")  # nothing new
    write(log, *range(3, 1002))
    curve("learn: 1,001/2,000 steps, loss 0.1, 6 s left")
    assert told == [(2, {"loss": 1.5, "gradient norm": 15.0}), (1001, {"loss": 502.0, "gradient norm": 5020.0})]


def test_steps_of_an_earlier_process_are_left_out(tmp_path: Path) -> None:
    clock, told = Clock(), list[tuple[int, dict[str, float]]]()
    log = tmp_path / "log.jsonl"
    write(log, 1, 2, 3, 4)
    curve = LearningCurve(log, lambda step, means: told.append((step, means)), clock)
    write(log, 1, 2, 3, mode="w")  # those after the checkpoint are made again
    write(log, 4, 5)
    clock.now = 11.0
    curve("learn: 2/7 steps, 6 s left")
    assert told == [(5, {"loss": 4.5, "gradient norm": 45.0})]


def test_a_log_begun_by_an_older_version_is_read(tmp_path: Path) -> None:
    clock, told = Clock(), list[tuple[int, dict[str, float]]]()
    log = tmp_path / "log.jsonl"
    log.write_text(
        '{"step": 1, "loss": 1, "utilisation": 0.5}\n{"step": 2, "loss": 3, "mfu": 0.25}\n', encoding="utf-8"
    )
    curve = LearningCurve(log, lambda step, means: told.append((step, means)), clock)
    clock.now = 11.0
    curve("learn: 2/7 steps, 6 s left")
    assert told == [(2, {"loss": 2.0, "MFU": 0.25})]


def test_a_day_has_some_hundred_points(tmp_path: Path) -> None:
    clock, told = Clock(), list[int]()
    log = tmp_path / "log.jsonl"
    curve = LearningCurve(log, lambda step, means: told.append(step), clock)
    for number in range(1, 24 * 3600 // 30):  # a step and a line each half minute
        write(log, number)
        clock.now += 30
        curve(f"learn: {number:,}/20,000 steps, 6 s left")
    assert 100 < len(told) < 400
    assert told[:3] == [1, 2, 3]
