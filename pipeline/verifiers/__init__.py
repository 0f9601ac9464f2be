"""Verifiers: is a completion right? The only thing the policy learns from.

`judge` takes cases and gives verdicts; it starts its own worker processes, and ends them when the generator ends.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pipeline.errors import RequestError
from pipeline.verifiers.cases import Case, Completion, Outcome, Reference, Verdict, Verifier
from pipeline.verifiers.code import CODE
from pipeline.verifiers.custom import load_custom
from pipeline.verifiers.math import MATH

if TYPE_CHECKING:
    from pipeline.recipe import Verification

__all__ = ["VERIFIERS", "Case", "Completion", "Outcome", "Reference", "Verdict", "Verifier", "find_verifier", "judge"]

VERIFIERS: dict[str, Verifier] = {"math": MATH, "code": CODE}
"""The built-in verifiers, by the task they judge."""


@functools.lru_cache(maxsize=64)
def find_verifier(task: str) -> Verifier:
    """The verifier of a task: a key of VERIFIERS, or one's own as `module:function` (see custom.py).

    Raises RequestError for any other.
    """
    if task in VERIFIERS:
        return VERIFIERS[task]
    if ":" in task:
        return load_custom(task)
    known = ", ".join(VERIFIERS)
    raise RequestError(f"no verifier {task!r}; known: {known}; one's own is named module:function")


def judge(cases: Iterable[Case], settings: Verification) -> Iterator[Verdict]:
    """A verdict for each case, in the order in which they are ready.

    Cases are taken from the iterable as workers become free, so it may be endless; memory does not grow with it.
    Closing the generator ends all workers and sandboxes. Raises RequestError for a task nobody judges; a bad
    reference, a dead worker or missing isolation is a verdict, not an error.
    """
    from pipeline.verifiers.pool import run_pool

    return run_pool(cases, settings, find_verifier)
