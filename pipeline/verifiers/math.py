"""Math answers: the last complete box against the reference, judged by math-verify.

math-verify parses both into sympy and compares; nothing is ever evaluated as Python. Its own time limit is a
signal that only the main thread can take and that C code ignores: it is switched off here, and the worker is
killed from outside instead. Where we decide otherwise than math-verify does: docs/verifiers.md.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline.verifiers.cases import Alive, Case, Outcome, Share, Verifier, after_thinking, shorten

if TYPE_CHECKING:
    from pipeline.recipe import Verification

VERSION = 1
"""Rises with every change of what is judged how."""
LONGEST_ANSWER = 10_000
"""Characters; no reference is that long, and parsing it would only cost time."""

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})")


def version() -> str:
    """Our version and that of the libraries whose change could flip a verdict."""
    from importlib.metadata import version as installed

    parts = (f"{name}-{installed(name)}" for name in ("math-verify", "latex2sympy2_extended", "sympy"))
    return "+".join((str(VERSION), *parts))


def final_answer(response: str) -> str | None:
    r"""What stands in the last complete `\boxed{}` after the thinking; None where there is none.

    One pass, linear in the text. A box in a box counts as the outer one; `\fbox` as `\boxed`.
    """
    text = after_thinking(response)
    if text is None:
        return None
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    last: tuple[int, int] | None = None
    for found in _BRACES.finditer(text):
        token = found.group()
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                last = start, found.start()
        elif token.endswith("{") and len(token) > 2:
            open_braces.append(found.end())
    if last is None:
        return None
    content = text[slice(*last)].strip()
    inner = final_answer(content) if "boxed" in content or "fbox" in content else None
    return content if inner is None else inner


def glance(case: Case) -> Outcome | Share | Case:
    """No box: no answer. Two plain integers: equal or not, as math-verify says of them too."""
    if case.answer is None or not case.answer.strip():
        return Outcome("bad_reference", "the case has no answer")
    answer = final_answer(case.response)
    if answer is None:
        return Outcome("no_answer", "no complete \\boxed{} after the thinking")
    if not answer:
        return Outcome("no_answer", "the box is empty")
    if len(answer) > LONGEST_ANSWER:
        return Outcome("wrong", f"an answer of {len(answer)} characters")
    reference = bare(case.answer)
    if _INTEGER.fullmatch(reference) and _INTEGER.fullmatch(answer):
        return _outcome(int(reference) == int(answer), answer, reference)
    return Share(f"{len(reference)}:{reference}{answer}", replace(case, response=answer, answer=reference))


def bare(reference: str) -> str:
    r"""The reference without what encloses it: `$...$`, `\(...\)`, `\[...\]`, a box."""
    text = reference.strip()
    boxed = final_answer(text) if "\\boxed" in text or "\\fbox" in text else None
    if boxed:
        return boxed
    for start, end in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inside = text[len(start) : -len(end)]
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end) and "$" not in inside:
            return inside.strip()
    return text


def _outcome(equal: bool, answer: str, reference: str) -> Outcome:
    if equal:
        return Outcome("correct", shorten(answer, 200))
    return Outcome("wrong", f"{shorten(answer, 200)} is not {shorten(reference, 200)}")


def judge(case: Case, settings: Verification, alive: Alive) -> Outcome:
    """In a worker. `case.response` is the extracted answer, `case.answer` the bare reference."""
    assert case.answer is not None
    alive(settings.math_timeout_s)
    if not balanced(case.answer) or not parse(case.answer):
        return Outcome("bad_reference", f"can't read the reference {shorten(case.answer, 200)!r}")
    if case.id == _PROBE:
        return Outcome("correct")
    return _outcome(equal(case.answer, case.response), case.response, case.answer)


def equal(reference: str, answer: str) -> bool:
    """Whether the answer is the reference: by our own rules where they have a say, else by math-verify."""
    ours = by_our_rules(reference, answer)
    if ours is not None:
        return ours
    from math_verify import verify

    return bool(verify(list(parse(reference)), list(parse(answer)), timeout_seconds=None))


_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")
_SHORT_WORDS = frozenset({"yes", "no", "odd", "even", "all", "one", "two", "red"})
_CHOICE = re.compile(r"\(?([A-J])\)?")
_CHOSEN = re.compile(r"\(?([A-Ja-j])\)?(?:[).:]\s*.*)?", re.DOTALL)
_BASE = re.compile(r"-?[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?_\{?([0-9]{1,2})\}?")


def by_our_rules(reference: str, answer: str) -> bool | None:
    """Where math-verify would read letters as factors, or drop what matters (docs/verifiers.md has the cases)."""
    plain, given = _TEXT.sub(r"\1", reference).strip(), _TEXT.sub(r"\1", answer).strip(" .$")
    if _WORDS.fullmatch(plain) and (len(plain) >= 4 or plain.lower() in _SHORT_WORDS or plain != reference.strip()):
        return plain.lower().split() == given.lower().split()
    choice = _CHOICE.fullmatch(plain)
    if choice:
        chosen = _CHOSEN.fullmatch(given)
        return chosen is not None and chosen.group(1).upper() == choice.group(1)
    base, other = _BASE.fullmatch(plain), _BASE.fullmatch(given)
    if base and other and base.group(1) != other.group(1):
        return False
    return None


def balanced(text: str) -> bool:
    """Whether its braces are: a reference cut off in the middle can't be read, though math-verify would try."""
    depth = 0
    for found in _BRACES.finditer(text):
        token = found.group()
        depth += (token == "}" and -1) or (token.endswith("{") and (len(token) == 1 or len(token) > 2))
        if depth < 0:
            return False
    return depth == 0


_SCIENTIFIC = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?)[eE]([+-]?[0-9]{1,3})")
_MIXED = re.compile(r"(-?)([0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_MONEY = re.compile(r"(.*[0-9])\s*(?:dollars?|cents?|euros?|pounds?|yen|rupees?)", re.IGNORECASE)


def normalise(text: str) -> str:
    """The text as math-verify reads it right: see the table in docs/verifiers.md."""
    text = text.strip().replace("\\varnothing", "\\emptyset")
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for pattern, written in ((_SCIENTIFIC, r"\1 \\cdot 10^{\2}"), (_MIXED, r"\1\2\\frac{\3}{\4}"), (_MONEY, r"\1")):
        found = pattern.fullmatch(text)
        if found:
            return found.expand(written)
    return text


_PROBE = "\0reference"


def blame(case: Case) -> Case:
    """The case that only reads the reference: where it is late too, the reference is at fault."""
    return replace(case, id=_PROBE, response="0")


@functools.lru_cache(maxsize=512)
def parse(text: str) -> tuple[Any, ...]:
    """What math-verify makes of the normalised text; empty where it can't be read."""
    extraction = _extraction()
    from math_verify import parse as math_verify_parse

    boxed = f"\\boxed{{{normalise(text)}}}"
    return tuple(math_verify_parse(boxed, extraction_config=extraction, parsing_timeout=None))


@functools.cache
def _extraction() -> tuple[Any, ...]:
    import logging

    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns once for each answer it can't read
    return LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()


MATH = Verifier(
    name="math",
    version=version,
    glance=glance,
    judge=judge,
    memory_bytes=2 << 30,
    batch=16,
    preload=("math_verify",),
    blame=blame,
)
