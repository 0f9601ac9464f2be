"""Programs against tests, in sandboxes; what is expected stays out of them.

Three forms of `tests` (see the README of `oapl verify`): standard input and output, a function called with JSON
arguments, and test code that defines `check(candidate)`. The first two run each test in a fresh process of one
sandbox and compare outside. The third runs the test code in a sandbox of its own, from which it calls the
candidate across a typed boundary (values.py), so the candidate never shares a process with a test.

Comparison follows LiveCodeBench's `testing_util.py`: outputs line by line, stripped, as decimal numbers where
both lines are; results of functions by value, a tuple as a list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from pipeline.errors import WorkError
from pipeline.verifiers.cases import Alive, BadReference, Case, Outcome, Share, Verifier, after_thinking, shorten
from pipeline.verifiers.inside.values import CantCross, dumps, loads
from pipeline.verifiers.sandbox import (
    GRACE_S,
    START_S,
    Ended,
    Limits,
    OverLimit,
    Sandbox,
    SandboxDied,
    shares_safely,
    why_refused,
)

if TYPE_CHECKING:
    from pipeline.recipe import Verification

VERSION = 1
"""Rises with every change of what is judged how."""
COMPARE_S = 10.0
"""Seconds that reading the tests or comparing one output may take."""


@dataclass(frozen=True, slots=True)
class Tests:
    """`inputs[i]` gives `outputs[i]`: texts, or with `fn_name` lists of arguments and values."""

    inputs: list[Any]
    outputs: list[Any]
    fn_name: str | None = None
    wrapped: bool = False
    """APPS and TACO give the expected value of a function as a list of one."""


@dataclass(frozen=True, slots=True)
class Check:
    """`test` defines `check(candidate)`."""

    entry_point: str
    test: str


def version() -> str:
    """Our version and that of the Python that runs candidates."""
    import sys

    return f"{VERSION}+python-{sys.version_info.major}.{sys.version_info.minor}"


def program(response: str) -> tuple[str, bool] | None:
    """(the program, whether it was fenced): the last complete fenced block after the thinking, or the whole text
    where nothing is fenced. None where there is no program."""
    text = after_thinking(response)
    if text is None or not text.strip():
        return None
    last: list[str] | None = None
    block: list[str] | None = None
    fences = 0
    for line in text.split("\n"):
        stripped = line.strip()
        if block is None and stripped.startswith("```"):
            if len(stripped) > 6 and stripped.endswith("```"):
                continue  # a fenced span in one line is prose
            block, fences = [], fences + 1
        elif block is not None and stripped == "```":
            last, block = block, None
        elif block is not None:
            block.append(line)
    if fences == 0:
        return text, False
    if last is None or not "".join(last).strip():
        return None
    return "\n".join(last) + "\n", True


def read_tests(tests: str | dict[str, Any] | None) -> Tests | Check:
    """The tests of a case. Raises BadReference with what is wrong."""
    if tests is None:
        raise BadReference("the case has no tests")
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise BadReference(f"tests: not JSON ({shorten(str(error), 100)})") from None
    if not isinstance(tests, dict):
        raise BadReference("tests: expected an object")
    if "test" in tests:
        return _read_check(tests)
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise BadReference("tests: expected lists `inputs` and `outputs`, or `entry_point` and `test`")
    if not inputs or len(inputs) != len(outputs):
        raise BadReference(f"tests: {len(inputs)} inputs and {len(outputs)} outputs")
    name = tests.get("fn_name")
    if name is None:
        return Tests([_as_text(item) for item in inputs], [_as_text(item) for item in outputs])
    if not isinstance(name, str) or not name.isidentifier():
        raise BadReference("tests: fn_name is no name of a function")
    return _read_calls(name, inputs, outputs)


def _read_check(tests: dict[str, Any]) -> Check:
    name, test = tests.get("entry_point"), tests["test"]
    if not isinstance(name, str) or not name.isidentifier() or not isinstance(test, str):
        raise BadReference("tests: expected `entry_point` (a name) and `test` (code)")
    return Check(name, test)


def _as_text(item: Any) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, list) and all(isinstance(line, str) for line in item):
        return "\n".join(item)
    raise BadReference("tests: inputs and outputs on standard input and output must be texts")


def _read_calls(name: str, inputs: list[Any], outputs: list[Any]) -> Tests:
    """Arguments as a list, or as LiveCodeBench's text with a JSON value a line; its outputs are JSON texts then."""
    calls, values, wrapped = [], [], True
    for given, expected in zip(inputs, outputs, strict=True):
        arguments, value = given, expected
        try:
            if isinstance(given, str):
                arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
                value = json.loads(expected) if isinstance(expected, str) else expected
                wrapped = False
        except (ValueError, RecursionError):
            raise BadReference("tests: inputs with fn_name must be lists, or JSON values a line") from None
        if not isinstance(arguments, list):
            raise BadReference("tests: inputs with fn_name must be lists of arguments")
        calls.append(arguments)
        values.append(value)
    return Tests(calls, values, name, wrapped and all(isinstance(value, list) and len(value) == 1 for value in values))


def same_output(output: str, expected: str) -> bool:
    """LiveCodeBench's comparison of standard output."""
    lines, wanted = output.strip().split("\n"), expected.strip().split("\n")
    if len(lines) != len(wanted):
        return False
    return all(_same_line(line.strip(), want.strip()) for line, want in zip(lines, wanted, strict=True))


def _same_line(line: str, want: str) -> bool:
    if line == want:
        return True
    words, wanted = line.split(), want.split()
    if len(words) != len(wanted):
        return False
    try:
        return all(Decimal(word) == Decimal(other) for word, other in zip(words, wanted, strict=True))
    except InvalidOperation:
        return False


def same_value(value: Any, expected: Any) -> bool:
    """Plain values by type and value: a tuple counts as a list, an int as the float of the same number, a bool as
    a bool only. Both are plain, so no `==` of the candidate's is ever called."""
    if isinstance(value, list | tuple):
        if not isinstance(expected, list | tuple) or len(value) != len(expected):
            return False
        return all(same_value(one, other) for one, other in zip(value, expected, strict=True))
    if isinstance(value, dict):
        if not isinstance(expected, dict) or len(value) != len(expected):
            return False
        # JSON knows text keys only.
        mine = {key if isinstance(key, str) else json.dumps(key, default=repr): item for key, item in value.items()}
        return mine.keys() == expected.keys() and all(same_value(mine[key], expected[key]) for key in expected)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return value == expected
    return type(value) is type(expected) and bool(value == expected)


def glance(case: Case) -> Outcome | Share:
    """Equal programs under equal tests are run once: a policy that grows sure writes most of its programs again."""
    if case.tests is None:
        return Outcome("bad_reference", "the case has no tests", "none")
    found = program(case.response)
    if found is None:
        return Outcome("no_answer", "no complete fenced block after the thinking", "none")
    tests = case.tests if isinstance(case.tests, str) else json.dumps(case.tests)
    both = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in (repr(found), tests))
    return Share(":".join(both), case)


def judge(case: Case, settings: Verification, alive: Alive) -> Outcome:
    """In a worker. The isolation the settings ask for, or the outcome `refused`."""
    alive(COMPARE_S)
    try:
        tests = read_tests(case.tests)
    except BadReference as error:
        return Outcome("bad_reference", str(error))
    found = program(case.response)
    assert found is not None, "glance lets no case without a program through"
    alive(2 * START_S + COMPARE_S)
    try:
        return judge_at("bubblewrap", found, tests, settings, alive)
    except (SandboxDied, OSError, WorkError):
        # Either this sandbox ended before it answered, or none can be had here: the probe tells.
        alive(2 * START_S + COMPARE_S)
        missing = why_refused()
    if missing is None:
        return judge_again(found, tests, settings, alive)
    if settings.isolation == "bubblewrap":
        return Outcome("refused", missing)
    return judge_at("process", found, tests, settings, alive)


def judge_again(found: tuple[str, bool], tests: Tests | Check, settings: Verification, alive: Alive) -> Outcome:
    """After a sandbox that was ended from outside, or by the candidate: only the second time tells."""
    try:
        return judge_at("bubblewrap", found, tests, settings, alive)
    except SandboxDied as error:
        return Outcome("crashed", f"the sandbox ended: {shorten(str(error), 200)}", "bubblewrap")


def judge_at(
    level: str, found: tuple[str, bool], tests: Tests | Check, settings: Verification, alive: Alive
) -> Outcome:
    """Judges at that level of isolation. `found` is what `program` returned."""
    code, fenced = found
    limits = Limits(settings.code_timeout_s, settings.code_memory_mib << 20, settings.code_output_kib << 10)
    if isinstance(tests, Check):
        status, detail, unreadable = _Conversation(level, limits, alive).judge(code, tests)
    else:
        status, detail, unreadable = _judge_tests(level, limits, code, tests, settings.run_all_tests, alive)
    if unreadable and not fenced:
        return Outcome("no_answer", f"no fenced block, and the text is no program: {detail}", level)
    return Outcome(status, shorten(detail), level)


def _judge_tests(
    level: str, limits: Limits, code: str, tests: Tests, run_all: bool, alive: Alive
) -> tuple[str, str, bool]:
    """(status, detail, whether the program could not even be compiled)."""
    statuses: list[str] = []
    first = ""
    alive(limits.seconds + 2 * GRACE_S + START_S + COMPARE_S)
    sandbox = Sandbox(level, limits)
    try:
        for index, given in enumerate(tests.inputs):
            alive(limits.seconds + 2 * GRACE_S + START_S + COMPARE_S)
            status, said = _one_test(sandbox, code, tests, index, given)
            statuses.append(status)
            if status == "unreadable":
                return "wrong", said, True
            if status != "correct" and not first:
                first = f"test {index + 1} {said}"
            if status != "correct" and not run_all:
                break
            if sandbox.closed:  # it took the sandbox down with it; the next test gets a fresh one
                sandbox = Sandbox(level, limits)
    finally:
        sandbox.close()
    passed = statuses.count("correct")
    statuses += ["not run"] * (len(tests.inputs) - len(statuses))
    status = next((status for status in statuses if status not in ("correct", "not run")), "correct")
    summary = f"{passed} of {len(statuses)} tests passed ({in_runs(statuses)})"
    return status, f"{summary}; {first}" if first else summary, False


def in_runs(statuses: list[str]) -> str:
    """`correct x3, wrong, not run x2`: the status of each test, in order."""
    runs: list[tuple[str, int]] = []
    for status in statuses:
        if runs and runs[-1][0] == status:
            runs[-1] = status, runs[-1][1] + 1
        else:
            runs.append((status, 1))
    return ", ".join(status if count == 1 else f"{status} x{count}" for status, count in runs)


def _one_test(sandbox: Sandbox, code: str, tests: Tests, index: int, given: Any) -> tuple[str, str]:
    """(status, what to say of it); `unreadable` where the program does not compile."""
    try:
        if tests.fn_name is None:
            ended = sandbox.run(("stdin", code, given))
        else:
            ended = sandbox.run(("call", code, tests.fn_name, dumps([given, {}])))
    except OverLimit as over:
        sandbox.close()
        return _OVER[str(over)], f"took too much {over}"
    if ended.code is None:
        return "timeout", f"took more than {sandbox.limits.seconds:g} s"
    if ended.result.startswith(b"s"):
        return "unreadable", _text(ended.result[1:])
    if ended.code < 0:
        return "crashed", f"was ended by signal {-ended.code}"
    if tests.fn_name is None:
        return _compare_output(ended, tests.outputs[index], sandbox.limits)
    return _compare_result(ended, tests, index, sandbox.limits)


_OVER = {"time": "timeout", "memory": "crashed", "output": "wrong"}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _last_line(error: bytes) -> str:
    lines = _text(error).strip().splitlines()
    return lines[-1] if lines else "no message"


def _compare_output(ended: Ended, expected: str, limits: Limits) -> tuple[str, str]:
    if len(ended.output) > limits.output_bytes:
        return "wrong", f"printed more than {limits.output_bytes >> 10} KiB"
    if ended.code != 0:
        return "wrong", f"exited with {ended.code}: {_last_line(ended.error)}"
    output = _text(ended.output)
    if same_output(output, expected):
        return "correct", ""
    return "wrong", f"expected {shorten(expected, 100)!r}, got {shorten(output, 100)!r}"


def _compare_result(ended: Ended, tests: Tests, index: int, limits: Limits) -> tuple[str, str]:
    size, answer = int.from_bytes(ended.result[:4], "big"), ended.result[4:]
    if len(ended.result) > limits.output_bytes:
        return "wrong", f"returned more than {limits.output_bytes >> 10} KiB"
    if not answer or len(answer) != size:
        return "wrong", f"gave no result: {_last_line(ended.error)}"
    if answer[:1] != b"=":
        return "wrong", _raised(answer)
    try:
        value = loads(_text(answer[1:]))
    except CantCross as error:
        return "wrong", str(error)
    expected = tests.outputs[index]
    if same_value(value, expected) or (tests.wrapped and same_value(value, expected[0])):
        return "correct", ""
    return "wrong", f"expected {shorten(repr(expected), 100)}, got {shorten(repr(value), 100)}"


def _raised(answer: bytes) -> str:
    """The candidate's exception, or why its value could not cross."""
    text = _text(answer[1:])
    return f"raised {text.partition(chr(10))[2] or text}" if answer[:1] == b"!" else f"returned {text}"


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two that talk: its sandbox, its channel there, and its work."""

    sandbox: Sandbox
    channel: socket.socket
    work: str

    def say(self, frame: bytes, end: float) -> None:
        self.sandbox.say(self.channel, frame, end)

    def hear(self, end: float, largest: int) -> bytes | None:
        return self.sandbox.hear(self.channel, end, largest)

    def ended(self) -> Ended:
        return self.sandbox.finish(self.work)


class _Conversation:
    """`check(candidate)`: the test code in one process calls the candidate in another, through us.

    The two have a sandbox each, or share one where neither can reach into the other. What passes are frames of
    bounded size; this side reads only their first byte.
    """

    def __init__(self, level: str, limits: Limits, alive: Alive) -> None:
        self.level, self.limits, self.alive = level, limits, alive
        self.calls = 0

    def judge(self, code: str, check: Check) -> tuple[str, str, bool]:
        self.alive(2 * START_S + self.limits.seconds + 4 * GRACE_S + COMPARE_S)
        with contextlib.ExitStack() as stack:
            one = self.level == "bubblewrap" and shares_safely()
            first = stack.enter_context(Sandbox(self.level, self.limits, channels=2 if one else 1))
            second = first if one else stack.enter_context(Sandbox(self.level, self.limits, channels=1))
            candidate = _Side(first, first.channels[0], "serve")
            tester = _Side(second, second.channels[-1], "check")
            # The candidate is forked before its sandbox hears of the test.
            first.send(("serve", code, check.entry_point))
            second.send(("check", check.test, check.entry_point))
            first.ready()
            second.ready()
            try:
                return self._relay(tester, candidate)
            except OverLimit as over:
                return _OVER[str(over)], f"call {self.calls} took too much {over}", False

    def _relay(self, tester: _Side, candidate: _Side) -> tuple[str, str, bool]:
        end = time.monotonic() + self.limits.seconds + GRACE_S
        largest = self.limits.output_bytes
        while True:
            frame = tester.hear(end, largest)
            if frame is None:
                return self._tester_ended(tester.ended())
            if frame[:1] != b"c":
                return self._verdict(frame)
            self.calls += 1
            candidate.say(frame[1:], end)
            answer = candidate.hear(end, largest)
            if answer is None:
                return self._candidate_ended(candidate.ended())
            tester.say(answer, end)

    def _verdict(self, frame: bytes) -> tuple[str, str, bool]:
        text = _text(frame[1:])
        if frame[:1] == b"p":
            return "correct", f"the check passed after {self.calls} calls", False
        if frame[:1] == b"f":
            return "wrong", f"call {self.calls}: {text}", False
        return "bad_reference", f"tests: {text}", False

    def _tester_ended(self, ended: Ended) -> tuple[str, str, bool]:
        if ended.code is None:
            return "timeout", f"the check took more than {self.limits.seconds:g} s", False
        return "crashed", f"the check ended with {ended.code}: {_last_line(ended.error)}", False

    def _candidate_ended(self, ended: Ended) -> tuple[str, str, bool]:
        if ended.code is None:
            return "timeout", f"took more than {self.limits.seconds:g} s", False
        if ended.result.startswith(b"s"):
            return "wrong", _text(ended.result[1:]), True
        if ended.code < 0:
            return "crashed", f"was ended by signal {-ended.code}", False
        return "wrong", f"call {self.calls}: the program ended with {ended.code}: {_last_line(ended.error)}", False


CODE = Verifier(name="code", version=version, glance=glance, judge=judge)
