"""What a learning step tells while it runs: the learner's log, thinned out, as observations."""

from __future__ import annotations

import json
import re
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

LEARNED = re.compile(r"learn: ([\d,]+)/")
LEAST_S = 10.0
SHARE = 1 / 50
"""Of the time since learning began, that passes between two points: every ten seconds at first, three hundred or so
in a day."""
LABELS = {
    "loss": "loss",
    "residual_abs": "residual",
    "log_ratio": "log-ratio",
    "kl_k3": "KL, nats a token",
    "surprise": "surprise, nats a token",
    "entropy": "entropy, nats a token",
    "grad_norm": "gradient norm",
    "learning_rate": "learning rate",
    "lag": "lag, steps",
    "tokens_per_second": "tokens per second",
    "tokens_per_second_per_rank": "tokens per second and rank",
    "mfu": "MFU",
    "peak_memory_gib": "peak memory, GiB",
    "peak_resident_gib": "peak resident memory, GiB",
}
"""Field of the learner's log -> what Dagster calls it, the same as in the metadata of `trained_policy`."""

Observe: TypeAlias = Callable[[int, dict[str, float]], None]


class LearningCurve:
    """Takes a stage's progress lines, and calls `observe` with a step and means over the steps since the last call.

    Nobody waits or polls: by the time the learner says how far it is, its log has the numbers.
    """

    def __init__(self, log: Path, observe: Observe, clock: Callable[[], float] = time.monotonic) -> None:
        self._log, self._observe, self._clock = log, observe, clock
        self._began = self._said = clock()
        self._told = self._place = 0

    def __call__(self, line: str) -> None:
        found = LEARNED.match(line)
        now = self._clock()
        if found is None or now - self._said < max(LEAST_S, (now - self._began) * SHARE):
            return
        done = int(found[1].replace(",", ""))
        if done > self._told:
            self._said = now
            self._tell(done)

    def _tell(self, done: int) -> None:
        # A resumed round's log begins with steps of an earlier process; `done` counts those of this one.
        with self._log.open("rb") as file:
            file.seek(self._place)
            records = [json.loads(line) for line in deque(file, maxlen=done - self._told)]
            self._place = file.tell()
        self._told = done
        if records:
            self._observe(int(records[-1]["step"]), _means(records))


def _means(records: list[dict[str, float]]) -> dict[str, float]:
    """By label, over those that have the field: a round may have been begun by a version that logged others."""
    found = {LABELS[name]: [record[name] for record in records if name in record] for name in LABELS}
    return {label: sum(values) / len(values) for label, values in found.items() if values}
