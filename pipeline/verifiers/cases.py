"""What a verifier is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.recipe import Verification

REWARDS: dict[str, float | None] = {
    "correct": 1.0,
    "wrong": 0.0,
    "no_answer": 0.0,
    "timeout": 0.0,
    "crashed": 0.0,
    "bad_reference": None,
    "refused": None,
}
"""Reward of each status; null where the data or the machine is at fault, not the completion."""

DETAIL_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Case:
    """One completion to judge. `tests` is the JSON text of a form of tests, or its object."""

    id: str
    task: str
    response: str
    answer: str | None = None
    tests: str | dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One judgement; the fields of the verdicts table, with the case's id."""

    id: str
    verifier: str
    verifier_version: str
    status: str
    reward: float | None
    detail: str
    wall_ms: float
    isolation: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verifier says of a case; the pool makes a Verdict of it."""

    status: str
    detail: str = ""
    isolation: str = "none"
    reward: float | None = None
    """Only where it is not the status's own (partial rewards of a custom verifier)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a verifier of one's own judges."""

    id: str
    response: str


@dataclass(frozen=True, slots=True)
class Reference:
    """What it is judged by, as the prompt file has it."""

    answer: str | None
    tests: str | dict[str, Any] | None


@dataclass(frozen=True, slots=True)
class Share:
    """Cases with one key get one verdict: what is handed to the worker in place of the whole case."""

    key: str
    case: Case


Alive = Callable[[float], None]
"""A verifier calls it to say: if I am silent for more than so many seconds from now, end me."""


@dataclass(frozen=True, slots=True)
class Verifier:
    """How cases of one task are judged.

    `glance` runs in the caller's process, in time linear in the case: an Outcome where no work is needed, a
    Share where equal cases can be judged once, or the case. `judge` runs in a worker that may be killed at any
    time.
    """

    name: str
    version: Callable[[], str]
    glance: Callable[[Case], Outcome | Share | Case]
    judge: Callable[[Case, Verification, Alive], Outcome]
    memory_bytes: int | None = None
    """Address space of the worker while it judges."""
    batch: int = 1
    """Cases handed to a worker at once."""
    preload: tuple[str, ...] = ()
    """Modules imported once, before workers are forked."""
    blame: Callable[[Case], Case | None] = lambda case: None
    """After a timeout: the case whose timeout would show that the reference is at fault."""


class BadReference(ValueError):
    """The answer or the tests can't be read; the message says why."""


def after_thinking(response: str) -> str | None:
    """The text after the last thinking block; None where a thinking block is still open."""
    closed = response.rfind("</think>")
    if response.rfind("<think>") > closed:
        return None
    return response if closed < 0 else response[closed + len("</think>") :]


def shorten(text: str, length: int = DETAIL_CHARACTERS) -> str:
    """One line of at most `length` characters, for a detail."""
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length else line[: length - 3] + "..."
