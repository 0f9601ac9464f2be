"""What a child does: run a program, call its function, answer calls of it, or run the test that calls.

A candidate and the test that calls it may live in one sandbox: each work takes the next channel, and the candidate is
forked before the test is heard of.
"""

# ruff: noqa: BLE001  (candidates raise anything at all)
from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # `signal` itself would import enum
import os
import sys

if False:  # typing alone costs 8 ms
    from typing import Any

    from pipeline.verifiers.inside.values import CantCross, dumps, loads
    from pipeline.verifiers.inside.wire import read_frame, write_frame


def load_values() -> None:
    space = globals()
    exec(space["_VALUES"], space)


_NAME = "solution.py"


def prepare_main(code: str) -> tuple[Any, dict[str, Any]]:
    """The compiled program and the fresh `__main__` it runs in."""
    module = type(sys)("__main__")
    module.__dict__.update(__file__=_NAME, __builtins__=sys.modules["builtins"])
    sys.modules["__main__"] = module
    sys.argv[:] = [_NAME]
    return compile(code, _NAME, "exec", dont_inherit=True), module.__dict__


def find_function(space: dict[str, Any], name: str) -> Any:
    if name in space:
        return space[name]
    solution = space.get("Solution")
    if solution is not None and hasattr(solution, name):
        return getattr(solution(), name)
    raise NameError(f"no function {name!r} in the answer")


_LENT = {
    "typing": "List Dict Set Tuple Optional Any Union Deque DefaultDict Iterable Iterator Callable",
    "collections": "defaultdict deque Counter OrderedDict namedtuple",
    "heapq": "heappush heappop heapify heapreplace heappushpop nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort",
    "functools": "cache lru_cache reduce cmp_to_key",
    "itertools": "accumulate chain combinations permutations product groupby pairwise zip_longest",
    "math": "inf gcd lcm sqrt ceil floor comb log2 isqrt",
}


_LENT_MODULES = {
    "math",
    "heapq",
    "bisect",
    "itertools",
    "functools",
    "collections",
    "random",
    "re",
    "string",
    "operator",
}


def lend_imports(program: Any, space: dict[str, Any]) -> None:
    """Starter code with `List` and friends takes their imports for granted, as LiveCodeBench's harness does."""
    names, todo = set(), [program]
    while todo:
        code = todo.pop()
        names.update(code.co_names)
        todo.extend(item for item in code.co_consts if isinstance(item, type(program)))
    for module, lent in _LENT.items():
        wanted = names.intersection(lent.split()) - {module}
        if wanted:
            __import__(module)
            space.update((name, getattr(sys.modules[module], name)) for name in wanted)
    for module in names & _LENT_MODULES:
        if module not in space:
            space[module] = __import__(module)


def describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:
        return "an exception that can't be printed"


def call_once(function: Any, frame: bytes) -> bytes:
    """One answer of the candidate's: `=` and the value, `!` and the exception, `?` and why it can't cross."""
    try:
        arguments, named = loads(frame.decode())
        value = function(*arguments, **named)
    except BaseException as error:
        return f"!{type(error).__name__}\n{describe(error)}".encode("utf-8", "replace")
    try:
        return b"=" + dumps(value).encode()
    except BaseException as error:
        return b"?" + describe(error).encode("utf-8", "replace")


def serve(space: dict[str, Any], name: str) -> None:
    function = find_function(space, name)
    while True:
        try:
            frame = read_frame(4)
        except EOFError:
            return
        write_frame(4, call_once(function, frame))


class Remote(Exception):
    """What the candidate raised and has no name among the built-in exceptions."""


def remote_candidate(raised: list[BaseException], heard: list[int]) -> Any:
    import builtins

    def candidate(*arguments: Any, **named: Any) -> Any:
        write_frame(4, b"c", dumps([arguments, named]).encode())
        answer = read_frame(4)
        heard.append(len(answer))
        kind, text = answer[:1], answer[1:].decode("utf-8", "replace")
        if kind == b"=":
            return loads(text)
        name, _, said = text.partition("\n")
        known = getattr(builtins, name, None) if kind == b"!" else None
        if not (isinstance(known, type) and issubclass(known, Exception)):
            known = Remote
        try:
            error = known(said.partition(": ")[2] if known is not Remote else (said or text))
        except Exception:
            error = Remote(said)
        raised.append(error)
        raise error

    return candidate


def check(test: str, name: str) -> None:
    """Runs the test code; its last frame is `p` (passed), `f` (failed) or `b` (the test is at fault)."""
    load_values()
    raised: list[BaseException] = []
    heard: list[int] = []
    try:
        program, space = prepare_main(test)
        space["candidate"] = space[name] = candidate = remote_candidate(raised, heard)
        exec(program, space)
        function = space["check"]
    except BaseException as error:
        write_frame(4, b"b", describe(error).encode("utf-8", "replace"))
        return
    try:
        function(candidate)
    except AssertionError as error:
        line = _failing_line(error, test)
        write_frame(4, b"f", f"{describe(error)}{line}".encode("utf-8", "replace"))
    except BaseException as error:
        # A value that can't cross is the test's own only before the candidate has had a say.
        mine = isinstance(error, NameError | ImportError) or (isinstance(error, CantCross) and not heard)
        mine = mine and not any(error is other for other in raised)
        write_frame(
            4, b"b" if mine else b"f", (describe(error) + _failing_line(error, test)).encode("utf-8", "replace")
        )
    else:
        write_frame(4, b"p")


def _failing_line(error: BaseException, test: str) -> str:
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _NAME:
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = test.split("\n")
    return f" (test line {number}: {lines[number - 1].strip()[:160]})" if 0 < number <= len(lines) else ""


def run_child(work: tuple[Any, ...]) -> None:
    """In the child. Returns or raises like a program would, so that Python ends as it always does."""
    if work[0] == "check":
        # SIGINT stays ignored: what shares the sandbox shall not interrupt a test at a place of its choice.
        return check(work[1], work[2])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        program, space = prepare_main(work[1])
    except BaseException as error:
        os.write(3, b"s" + describe(error).encode("utf-8", "replace"))
        raise SystemExit(1) from None
    if work[0] == "stdin":
        os.close(3)
        exec(program, space)
        return None
    load_values()
    lend_imports(program, space)
    space["__name__"] = "solution"
    sys.modules["solution"] = sys.modules["__main__"]
    exec(program, space)
    if work[0] == "serve":
        return serve(space, work[2])
    answer = call_once(find_function(space, work[2]), work[3].encode())
    result = os.dup(3)
    write_frame(result, answer)
    return None


_COMMON = (
    "typing", "collections", "re", "itertools", "functools", "heapq", "bisect", "math", "string", "random", "copy",
    "operator", "datetime", "decimal", "fractions", "statistics", "hashlib", "json",
)  # fmt: skip


def import_ahead(text: str) -> None:
    """Imports what the text names of the common modules, so that each forked child finds it there: `typing` alone
    costs as much as starting Python."""
    if "import" in text or text.startswith("class Solution"):
        for module in _COMMON:
            if module in text and module not in sys.modules:
                __import__(module)
