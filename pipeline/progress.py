"""Progress of a stage: a bar on a terminal, else a line now and then that a log or a UI can show."""

from __future__ import annotations

import sys
import time
from typing import Any

INTERVAL_S = 5.0


class Progress:
    """Counts work done out of `total` and says how fast it goes and how long it will take.

    On a terminal it is a live bar. Elsewhere it is one line each few seconds on standard error, such as
    `generate: 384/1024 completions, 9,812 tokens/s, 6 s left`.
    """

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = 0
        self.tokens = 0
        self._note = ""
        self._start = time.monotonic()
        self._said = self._start
        self._bar = _Bar(stage, total) if sys.stderr.isatty() else None

    def add(self, done: int, tokens: int = 0, note: str = "") -> None:
        self.done += done
        self.tokens += tokens
        self._note = note
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self.done, self.text(now))
        elif now - self._said >= INTERVAL_S:
            self._said = now
            self._say(self.text(now))

    def text(self, now: float | None = None) -> str:
        """`384/1024 completions, 9,812 tokens/s, 6 s left`"""
        seconds = max((now or time.monotonic()) - self._start, 1e-9)
        parts = [f"{self.done:,}/{self.total:,} {self.unit}"]
        if self.tokens:
            parts.append(f"{self.tokens / seconds:,.0f} tokens/s")
        if self._note:
            parts.append(self._note)
        if 0 < self.done < self.total:
            parts.append(f"{seconds / self.done * (self.total - self.done):,.0f} s left")
        else:
            parts.append(f"{seconds:,.1f} s")
        return ", ".join(parts)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._say(self.text())

    def _say(self, text: str) -> None:
        sys.stderr.write(f"{self.stage}: {text}\n")
        sys.stderr.flush()


class _Bar:
    def __init__(self, stage: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as RichProgress

        self._progress = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._progress.start()
        self._task: Any = self._progress.add_task(stage, total=total, text="")

    def update(self, done: int, text: str) -> None:
        self._progress.update(self._task, completed=done, text=text)

    def close(self) -> None:
        self._progress.stop()
