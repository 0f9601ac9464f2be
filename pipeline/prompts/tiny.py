"""The embedded tasks: problems that a policy of a million parameters can half do, with their traces.

Two families. Arithmetic in the manner of reasoning-gym's `chain_sum`, answered
with a short worked line and a box; and small programs, described in words, that read two integers from
standard input. The problems of a seed are one endless stream without repeats, cut into held-out, training and
cold-start parts, so that no part shares a problem with another.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Literal

Split = Literal["heldout", "train", "cold_start"]

LARGEST_SPLIT = 1536
"""Problems that a split can give without repeats; a quarter of what the program family holds."""

_TEST_INPUTS = ((3, 5), (12, 7), (-4, 9), (20, -6))
_NUMBERS = ("", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem, what judges it, and how a correct and a wrong completion read."""

    task: str
    source: str
    text: str
    answer: str | None
    tests: str | None
    right: str
    wrong: str


def problems(seed: int, split: Split, count: int) -> list[Problem]:
    """The first `count` (at most LARGEST_SPLIT) problems of a split, the same for the same seed.

    Held-out problems are arithmetic and programs in turn; of others two in three are arithmetic, which is harder.
    Splits are kept apart by the problem's own text, which decides where it belongs.
    """
    sums, programs = (_unique(_stream(make, f"{seed}/{split}", split)) for make in (_arithmetic, _program))
    turns = cycle((sums, programs) if split == "heldout" else (sums, sums, programs))
    return [next(family) for family in islice(turns, min(count, LARGEST_SPLIT))]


def traces(seed: int, wrong_sums: float, wrong_programs: float) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs for the cold start, of which these shares are wrong."""
    rng = random.Random(f"{seed}/traces")
    sums, programs = (_stream(make, f"{seed}/cold_start", "cold_start") for make in (_arithmetic, _program))
    for family in cycle((sums, sums, sums, programs)):
        problem = next(family)
        wrong_share = wrong_sums if family is sums else wrong_programs
        yield problem.text, problem.wrong if rng.random() < wrong_share else problem.right


def _stream(make: Callable[[random.Random], Problem], key: str, split: Split) -> Iterator[Problem]:
    rng = random.Random(f"{key}/{make.__name__}")
    while True:
        problem = make(rng)
        if _split_of(problem.text) == split:
            yield problem


def _unique(stream: Iterator[Problem]) -> Iterator[Problem]:
    seen: set[str] = set()
    for problem in stream:
        if problem.text not in seen:
            seen.add(problem.text)
            yield problem


def _split_of(text: str) -> Split:
    bucket = random.Random(text).randrange(10)
    return "heldout" if bucket == 0 else "train" if bucket < 5 else "cold_start"


def _arithmetic(rng: random.Random) -> Problem:
    terms = [rng.randint(2, 9) for _ in range(rng.choice((2, 3, 3, 4)))]
    signs: list[str] = []
    for term in terms[1:]:
        # No sum goes below zero on its way: signs are one thing less to learn.
        signs.append("+" if _total(terms[: len(signs) + 1], signs) < term else rng.choice("+-"))
    expression = str(terms[0]) + "".join(f" {sign} {term}" for sign, term in zip(signs, terms[1:], strict=True))
    return Problem(
        task="math",
        source="tiny-arithmetic",
        text=f"What is {expression}?",
        answer=str(_total(terms, signs)),
        tests=None,
        right=_worked(terms, signs),
        wrong=_worked(terms[:-1], signs[:-1]),
    )


def _total(terms: list[int], signs: list[str]) -> int:
    return terms[0] + sum(term if sign == "+" else -term for sign, term in zip(signs, terms[1:], strict=True))


def _worked(terms: list[int], signs: list[str]) -> str:
    """The sum done step by step and boxed. A wrong trace forgets the last term: it computes rightly and stops early."""
    total, lines = terms[0], []
    for sign, term in zip(signs, terms[1:], strict=True):
        result = total + term if sign == "+" else total - term
        lines.append(f"{total} {sign} {term} = {result}")
        total = result
    return "\n".join([", ".join(lines), f"\\boxed{{{total}}}"]).lstrip()


@dataclass(frozen=True, slots=True)
class _Linear:
    """p*a + q*b + r, in words and in Python."""

    p: int
    q: int
    r: int

    def words(self) -> str:
        return f"{_times(self.p, 'a')} {_signed_words(self.q, 'b')} {'plus' if self.r > 0 else 'minus'} {abs(self.r)}"

    def python(self) -> str:
        return f"{self.p}*a{self.q:+d}*b{self.r:+d}"

    def value(self, a: int, b: int) -> int:
        return self.p * a + self.q * b + self.r

    def slipped(self, rng: random.Random) -> _Linear:
        part, slip = rng.choice("pqr"), rng.choice((-1, 1))
        values = {"p": self.p, "q": self.q, "r": self.r}
        # A slip keeps the sign, so that a wrong program looks like a right one.
        moved = (
            values[part] + slip
            if values[part] * (values[part] + slip) > 0
            else values[part] + (1 if values[part] > 0 else -1)
        )
        return replace(self, **{part: moved})


def _times(factor: int, name: str) -> str:
    return f"{_NUMBERS[factor]} times {name}"


def _signed_words(factor: int, name: str) -> str:
    return ("plus " if factor > 0 else "minus ") + _times(abs(factor), name)


def _program(rng: random.Random) -> Problem:
    line = _Linear(rng.randint(2, 9), rng.choice((-1, 1)) * rng.randint(2, 9), rng.choice((-1, 1)) * rng.randint(1, 99))
    outputs = [f"{line.value(a, b)}\n" for a, b in _TEST_INPUTS]
    return Problem(
        task="code",
        source="tiny-programs",
        text=f"Read two integers a and b. Print {line.words()}.",
        answer=None,
        tests=json.dumps({"inputs": [f"{a} {b}\n" for a, b in _TEST_INPUTS], "outputs": outputs}),
        right=_program_text(line),
        wrong=_program_text(line.slipped(rng)),
    )


def _program_text(line: _Linear) -> str:
    return f"```python\na, b = map(int, input().split())\nprint({line.python()})\n```"
