"""What a section finds: rows of figures, bounds that it is held to, and errors; kept as JSON after each step."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Figure = float | int | str | bool | None
NOT_MEASURED = "not measured"


@dataclass(slots=True)
class Bound:
    """A goal and what was found; `ok` is null where it says nothing of this machine."""

    what: str
    bound: float
    sense: str
    """`at most` or `at least`."""
    value: float | None = None
    ok: bool | None = False
    why: str = NOT_MEASURED
    """Why there is no value."""

    def meet(self, value: float) -> None:
        self.value, self.why = value, ""
        # Not a number meets no bound.
        self.ok = bool(value <= self.bound if self.sense == "at most" else value >= self.bound)

    def as_dict(self) -> dict[str, Any]:
        told = {"what": self.what, "value": self.value, "bound": self.bound, "sense": self.sense, "ok": self.ok}
        return told | ({"why": self.why} if self.why else {})


@dataclass(slots=True)
class Section:
    """One section at work. What it found so far is in its file at any moment, whatever ends the process."""

    name: str
    seconds: float
    """Its budget; a step that would begin past it is left out, and said to be."""
    file: Path | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    figures: list[dict[str, Figure]] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def expect(self, what: str, sense: str, bound: float, *, applies: bool = True, why: str = "") -> Bound:
        """A bound that must be met: one that nothing is found for is not passed, unless it does not apply here."""
        made = Bound(what, bound, sense)
        if not applies:
            made.ok, made.why = None, why
        self.bounds.append(made)
        return made

    def add(self, what: str, **figures: Figure) -> None:
        """A row of the section's table, shown as it is found."""
        self.figures.append({"what": what, **figures})
        print(f"  {what:<44} " + "  ".join(f"{name} {show(value)}" for name, value in figures.items()), flush=True)
        self.save()

    def leave_out(self, what: str, why: str) -> None:
        self.skipped.append({"what": what, "why": why})
        print(f"  {what:<44} left out: {why}", flush=True)
        self.save()

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """What fails in here is recorded, and the section goes on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is: the steps that follow are to be measured
            self.errors.append({"what": what, "error": last_line(error), "where": place_of(error)})
            print(f"  {what:<44} FAILED: {last_line(error)} ({place_of(error)})", flush=True)
        finally:
            release()
            self.save()

    def steps(self, cases: dict[str, Callable[[], None]], reserve: float = 0.0) -> None:
        """Each case as a step, in this order, while there is time; `reserve` are seconds that one needs at least."""
        for what, measure in cases.items():
            if self.left <= reserve:
                self.leave_out(what, f"{self.seconds:.0f} s were over")
                continue
            with self.step(what):
                measure()

    def as_dict(self) -> dict[str, Any]:
        return {
            "ok": not self.errors and all(bound.ok is not False for bound in self.bounds),
            "seconds": round(time.monotonic() - self.started, 2),
            "figures": self.figures,
            "bounds": [bound.as_dict() for bound in self.bounds],
            "errors": self.errors,
            "skipped": self.skipped,
        }

    def save(self) -> None:
        if self.file is not None:
            write(self.file, {"machine": self.machine, "section": self.as_dict()})


def write(path: Path, told: Any) -> None:
    """Renamed into place, so that whoever is killed meanwhile leaves the one before."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    beside.rename(path)


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def place_of(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def release() -> None:
    """Gives back what a step held on the device; a step that failed leaves cycles behind."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # after an illegal access every call fails; the next step says so
            torch.cuda.empty_cache()


def show(value: Figure) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e9):
        return f"{value:.2e}"
    return f"{value:,.3g}" if size < 1000 else f"{value:,.0f}"
