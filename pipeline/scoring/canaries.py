"""Cases whose verdict is known, judged with every round: one that flips says that the verifier is broken.

Among the wrong ones are those that a careless verifier takes for right.
"""

from __future__ import annotations

from typing import Any

from pipeline.verifiers.cases import Case


def _math(name: str, answer: str, response: str) -> Case:
    return Case(f"canary-math-{name}", "math", response, answer=answer)


_SUM: dict[str, Any] = {"inputs": ["1 2\n", "40 2\n"], "outputs": ["3\n", "42\n"]}
_ADD: dict[str, Any] = {"fn_name": "add", "inputs": [[1, 2], [40, 2]], "outputs": [3, 42]}
_CHECK: dict[str, Any] = {
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(40, 2) == 42\n",
}
_EQUAL = "class Equal:\n    def __eq__(self, other): return True\ndef add(a, b): return Equal()\n"


def _code(name: str, tests: dict[str, Any], program: str) -> Case:
    return Case(f"canary-code-{name}", "code", f"```python\n{program}\n```", tests=tests)


CANARIES: tuple[tuple[Case, str], ...] = (
    (_math("integer", "42", r"So it is \boxed{42}."), "correct"),
    (_math("fraction", r"\frac{1}{2}", r"\boxed{0.5}"), "correct"),
    (_math("root", r"$2\sqrt{2}$", r"\boxed{\sqrt{8}}"), "correct"),
    (_math("last-box", "7", r"\boxed{6}, no, \boxed{7}"), "correct"),
    (_math("integer-wrong", "42", r"\boxed{43}"), "wrong"),
    (_math("fraction-wrong", r"\frac{1}{2}", r"\boxed{\frac{1}{3}}"), "wrong"),
    (_math("first-box", "6", r"\boxed{6}, no, \boxed{7}"), "wrong"),
    (_math("no-box", "42", "The answer is 42."), "no_answer"),
    (_math("still-thinking", "42", r"<think>perhaps \boxed{42}"), "no_answer"),
    (_code("stdin", _SUM, "a, b = map(int, input().split())\nprint(a + b)"), "correct"),
    (_code("stdin-wrong", _SUM, "a, b = map(int, input().split())\nprint(a * b + 1)"), "wrong"),
    (_code("call", _ADD, "def add(a, b): return a + b"), "correct"),
    (_code("call-equal", _ADD, _EQUAL), "wrong"),
    (_code("check", _CHECK, "def add(a, b): return a + b"), "correct"),
    (_code("check-equal", _CHECK, _EQUAL), "wrong"),
    (_code("check-early-exit", _CHECK, "import os\ndef add(a, b): os._exit(0)"), "wrong"),
)
"""(case, the status it must get)"""
