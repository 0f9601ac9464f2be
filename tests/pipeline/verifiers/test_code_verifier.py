"""Programs and functions through the public face: what is right, what is wrong, and what is no answer."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from pipeline.recipe import Verification
from pipeline.verifiers import Case, Verdict, judge
from pipeline.verifiers.cases import BadReference
from pipeline.verifiers.code import in_runs, program, read_tests, same_output, same_value
from pipeline.verifiers.inside.values import CantCross, dumps, loads

SUM = {"inputs": ["1 2\n", "40 2\n", "5 5\n"], "outputs": ["3\n", "42\n", "10\n"]}
ADD = {"fn_name": "add", "inputs": [[1, 2], [40, 2]], "outputs": [3, 42]}
CHECK = {
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(40, b=2) == 42\n",
}
READS = "a, b = map(int, input().split())\n"
QUICK = Verification(workers=2, code_timeout_s=0.8, code_output_kib=64)


def fenced(code: str) -> str:
    return f"I add them.\n```python\n{code}\n```\nDone."


def verdicts(cases: dict[str, tuple[str, Any]], settings: Verification = QUICK) -> dict[str, Verdict]:
    made = [Case(name, "code", response, tests=tests) for name, (response, tests) in cases.items()]
    return {verdict.id: verdict for verdict in judge(made, settings)}


def statuses(cases: dict[str, tuple[str, Any]], settings: Verification = QUICK) -> dict[str, str]:
    return {name: verdict.status for name, verdict in verdicts(cases, settings).items()}


def test_each_form_tells_right_wrong_empty_endless_and_network_apart() -> None:
    network = "import socket\nsocket.create_connection(('127.0.0.1', 9), timeout=1)\n"
    forms = {
        "stdin": (SUM, READS + "print(a + b)", READS + "print(a * b)"),
        "call": (ADD, "def add(a, b): return a + b", "def add(a, b): return a * b"),
        "check": (json.dumps(CHECK), "def add(a, b): return a + b", "def add(a, b): return a * b"),
    }
    cases, expected = {}, {}
    for form, (tests, right, wrong) in forms.items():
        kinds = {
            "right": (fenced(right), "correct"),
            "wrong": (fenced(wrong), "wrong"),
            "empty": ("", "no_answer"),
            "endless": (fenced("while True: pass\n" + right), "timeout"),
            "network": (fenced(network + right), "wrong"),
            "unfenced": (right, "correct"),
            "prose": ("I don't know.", "no_answer"),
            "thinking": ("<think>" + fenced(right), "no_answer"),
            "broken": (fenced("def add(:"), "wrong"),
        }
        for kind, (response, status) in kinds.items():
            cases[f"{form} {kind}"], expected[f"{form} {kind}"] = (response, tests), status
    found = verdicts(cases)
    assert {name: verdict.status for name, verdict in found.items()} == expected
    ran = [verdict for verdict in found.values() if verdict.status in ("correct", "timeout")]
    assert {verdict.isolation for verdict in ran} == {"bubblewrap"}
    assert {verdict.reward for verdict in found.values() if verdict.status == "correct"} == {1.0}
    assert {verdict.reward for verdict in found.values() if verdict.status != "correct"} == {0.0}


def test_honest_programs_run_as_they_would_outside() -> None:
    """What people write: main guards, exit(), buffered reading, threads, recursion, files in /tmp, every module."""
    one = {"inputs": ["1 2\n"], "outputs": ["3\n"]}
    ways = {
        "guard": "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__': main()",
        "exit": READS + "print(a + b)\nexit()",
        "sys exit": "import sys\n" + READS + "print(a + b)\nsys.exit(0)",
        "buffer": "import sys\na, b = map(int, sys.stdin.buffer.read().split())\nsys.stdout.write(str(a + b))",
        "open": "print(sum(map(int, open(0).read().split())))",
        "lines": "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))",
        "thread": (
            "import sys, threading\nthreading.stack_size(1 << 26)\nsys.setrecursionlimit(10 ** 6)\n"
            "def f(n): return 0 if n == 0 else 1 + f(n - 1)\n"
            "def main():\n    f(50000)\n    print(sum(map(int, input().split())))\n"
            "threading.Thread(target=main).start()"
        ),
        "file": READS + "open('/tmp/x', 'w').write(str(a + b))\nprint(open('/tmp/x').read())",
        "atexit": "import atexit\n" + READS + "atexit.register(print, a + b)",
        "generator left open": READS + "g = (i for i in range(3))\nnext(g)\nprint(a + b)",
        "pool": ("from multiprocessing import Pool\n" + READS + "with Pool(2) as p: print(sum(p.map(int, [a, b])))"),
        "dataclass": (
            "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    y: int\n"
            + READS
            + "p = P(a, b)\nprint(p.x + p.y)"
        ),
        "unicode": READS + "print('ü' and a + b)",
        "modules": (
            "import asyncio, bz2, ctypes, csv, decimal, hashlib, lzma, sqlite3, ssl, uuid, zlib, zoneinfo, unittest\n"
            + READS
            + "print(a + b)"
        ),
    }
    # Under the limit that people have: processes of a pool start slowly on a busy machine.
    patient = QUICK.model_copy(update={"code_timeout_s": Verification().code_timeout_s})
    found = statuses({name: (fenced(code), one) for name, code in ways.items()}, patient)
    assert found == dict.fromkeys(ways, "correct")


def test_functions_are_found_as_methods_and_take_their_imports_for_granted() -> None:
    """LiveCodeBench's starter code: `class Solution`, `List` never imported, arguments a JSON value a line."""
    tests = {"fn_name": "pairs", "inputs": ["[3, 1, 2]\n2", "[]\n1"], "outputs": ["[[1, 2], 2]", "[[], 1]"]}
    code = (
        "class Solution:\n    def pairs(self, xs: List[int], k: int) -> List[int]:\n"
        "        heap = list(xs)\n        heapq.heapify(heap)\n        return (heapq.nsmallest(k, heap), k)"
    )
    wrapped = {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}
    found = statuses({"method": (fenced(code), tests), "APPS": (fenced("def add(a, b): return a + b"), wrapped)})
    assert found == {"method": "correct", "APPS": "correct"}


def test_values_keep_their_types_across_the_boundary() -> None:
    test = (
        "import math\ndef check(candidate):\n"
        "    for value in (None, True, 1, 10 ** 400, -0.0, 1.5, float('inf'), 'ü\\ud800', b'x', 2j, range(3),\n"
        "                  [1, [2]], (1, (2,)), {1, 2}, frozenset([3]), {'a': 1, (1, 2): [3]}, {}):\n"
        "        back = candidate(value)\n"
        "        assert type(back) is type(value) and back == value, value\n"
        "    assert math.isnan(candidate(math.nan))\n"
        "    assert list(candidate(iter([1, 2]))) == [1, 2]\n"
        "    try:\n        candidate(ValueError)\n        assert False\n    except ValueError as error:\n"
        "        assert str(error) == 'as asked'\n"
    )
    echo = "def echo(value):\n    return value\n"
    passing = "def check(candidate):\n    assert candidate(len) is len\n"
    raising = test.replace("candidate(ValueError)", "candidate('raise')")
    code = "def echo(value):\n    if value == 'raise': raise ValueError('as asked')\n    return value\n"
    found = verdicts(
        {
            "echo": (fenced(code), {"entry_point": "echo", "test": raising}),
            "function passed": (fenced(echo), {"entry_point": "echo", "test": passing}),
        }
    )
    assert found["echo"].status == "correct", found["echo"].detail
    # A test that passes what can't cross is at fault itself, and not the candidate.
    assert found["function passed"].status == "bad_reference"
    for bad in ('{"q":[1]}', '{"s":[[1]]}', "[1", "[1] 2", '{"i":"x"}', "[" * 100_000, '{"t":1,"d":2}', "{}"):
        with pytest.raises(CantCross):
            loads(bad)
    assert loads(dumps({"k": [(1, 2.5), {3}]})) == {"k": [(1, 2.5), {3}]}


def test_the_fault_of_a_test_is_not_the_candidates() -> None:
    code = fenced("def add(a, b): return a + b")
    tests: dict[str, Any] = {
        "no JSON": "{",
        "no object": "[1]",
        "no tests": {"inputs": [], "outputs": []},
        "uneven": {"inputs": ["1"], "outputs": []},
        "numbers": {"inputs": [1], "outputs": [2]},
        "bad name": {"fn_name": "a b", "inputs": [[1]], "outputs": [1]},
        "bad lines": {"fn_name": "add", "inputs": ["1\nx"], "outputs": ["2"]},
        "does not compile": {"entry_point": "add", "test": "def check(:"},
        "no check": {"entry_point": "add", "test": "x = 1"},
        "unknown name": {"entry_point": "add", "test": "def check(candidate):\n    assert candidate(1, 2) == THREE"},
    }
    found = verdicts({name: (code, given) for name, given in tests.items()})
    assert {name: verdict.status for name, verdict in found.items()} == dict.fromkeys(tests, "bad_reference")
    assert {verdict.reward for verdict in found.values()} == {None}
    # A candidate that raises NameError itself can't pass its fault off as the test's.
    raising = fenced("def add(a, b): return missing")
    assert statuses({"raises": (raising, CHECK)}) == {"raises": "wrong"}


def test_detail_names_each_tests_status_and_all_run_where_asked() -> None:
    code = fenced(READS + "print(a + b if a < 40 else 0)")
    stopped = verdicts({"x": (code, SUM)})["x"]
    everything = verdicts({"x": (code, SUM)}, QUICK.model_copy(update={"run_all_tests": True}))["x"]
    assert "1 of 3 tests passed (correct, wrong, not run); test 2" in stopped.detail
    assert "2 of 3 tests passed (correct, wrong, correct); test 2" in everything.detail
    assert (stopped.status, everything.status) == ("wrong", "wrong")
    assert in_runs(["correct"] * 3 + ["wrong"]) == "correct x3, wrong"


def test_one_slow_case_does_not_hold_back_the_others() -> None:
    cases = [Case("slow", "code", fenced("while True: pass"), tests=SUM)]
    cases += [Case(str(number), "code", fenced(READS + "print(a + b)"), tests=SUM) for number in range(12)]
    order = [verdict.id for verdict in judge(iter(cases), QUICK.model_copy(update={"code_timeout_s": 2.0}))]
    assert order[-1] == "slow"


def test_comparison_of_outputs_follows_livecodebench() -> None:
    assert same_output(" 1 2 \n3\n\n", "1 2\n3")
    assert same_output("0.50\n1e2", "0.5\n100")
    assert same_output("Yes", "Yes")
    assert not same_output("yes", "Yes")
    assert not same_output("1\n2", "1 2")
    assert not same_output("0.333", "0.3333")
    assert not same_output("1 2", "1 2 3")
    assert not same_output("nan", "NaN")
    assert not same_output("", "0")


def test_comparison_of_values_is_by_type_and_value() -> None:
    assert same_value((1, (2.0,)), [1, [2]])
    assert same_value({"a": [1]}, {"a": [1]})
    assert same_value({1: 2}, {"1": 2})
    assert not same_value(True, 1)
    assert not same_value(1, True)
    assert not same_value("1", 1)
    assert not same_value([1], [1, 2])
    assert not same_value(None, 0)
    assert not same_value(float("nan"), float("nan"))


def test_the_last_complete_block_is_the_program() -> None:
    assert program("```python\nold\n```\n```py\nnew\n```\n") == ("new\n", True)
    assert program("```\nkept\n```\n```python\ncut off") == ("kept\n", True)
    assert program("```python\ncut off") is None
    assert program("<think>```\nx\n```</think>\n```\ny\n```") == ("y\n", True)
    assert program("<think>```\nx\n```") is None
    assert program("```\n\n```") is None
    assert program("print(1)") == ("print(1)", False)
    assert program("  ") is None


def test_unreadable_tests_are_told_in_a_line() -> None:
    for given in (None, "nonsense", {"inputs": "x", "outputs": []}, {"entry_point": "f", "test": 3}):
        with pytest.raises(BadReference) as told:
            read_tests(given)  # type: ignore[arg-type]
        assert "\n" not in str(told.value)


def test_a_closed_generator_leaves_nothing_running() -> None:
    """Closing it in the middle of an endless case ends at once, not at the case's time limit."""
    cases = (Case(str(number), "code", fenced("while True: pass"), tests=SUM) for number in range(1000))
    quick = Case("quick", "code", fenced("print(1)"), tests=SUM)
    found = judge((case for many in ([quick], cases) for case in many), QUICK.model_copy(update={"code_timeout_s": 60}))
    assert next(iter(found)).id == "quick"
    began = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - began < 3
