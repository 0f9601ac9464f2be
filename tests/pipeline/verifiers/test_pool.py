"""The pool: workers that die, verifiers of one's own, refused isolation, flat memory, any thread."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.errors import RequestError
from pipeline.recipe import Verification
from pipeline.verifiers import VERIFIERS, Case, Verdict, find_verifier, judge

SUM = {"inputs": ["1 2\n", "40 2\n"], "outputs": ["3\n", "42\n"]}
ADDS = "```\nimport time\ntime.sleep(0.05)\nprint(sum(map(int, input().split())))\n```"
SETTINGS = Verification(workers=2)
ROOT = Path(__file__).parents[3]


def workers() -> list[psutil.Process]:
    """Worker processes of this one: children of the first process it started."""
    first = [child for child in psutil.Process().children() if "pipeline.verifiers.worker" in " ".join(child.cmdline())]
    return [child for parent in first for child in parent.children()]


def mixed(count: int) -> tuple[list[Case], dict[str, str]]:
    """Cases of both kinds and the statuses they must get."""
    cases, expected = [], {}
    for number in range(count):
        kind, right = number % 2, number % 3 != 0
        name = f"{number}"
        if kind:
            cases.append(
                Case(name, "math", rf"\boxed{{\frac{{{2 * number + (not right)}}}{{2}}}}", answer=f"{number}.0")
            )
        else:
            adds = ADDS.replace("import time", f"import time  # {number}")  # equal programs would be run once
            cases.append(Case(name, "code", adds if right else adds.replace("sum", "max"), tests=SUM))
        expected[name] = "correct" if right else "wrong"
    return cases, expected


def test_equal_programs_under_equal_tests_are_run_once() -> None:
    """What a program prints at random is told in the verdict's detail."""
    text = "```\nimport os\nprint(os.urandom(9).hex())\n```"
    tests = [{"inputs": ["1\n"], "outputs": ["0\n"]}, {"inputs": ["2\n"], "outputs": ["0\n"]}]
    cases = [Case(f"{number}", "code", text, tests=tests[0]) for number in range(5)]
    cases += [
        Case("other tests", "code", text, tests=tests[1]),
        Case("other text", "code", text.replace("os\n", "os #\n"), tests=tests[0]),
    ]
    details = {verdict.id: verdict.detail for verdict in judge(cases, SETTINGS)}
    assert all("got" in detail for detail in details.values())
    assert len({details[f"{number}"] for number in range(5)}) == 1
    assert len(set(details.values())) == 3


def test_killed_workers_cost_no_verdict() -> None:
    """Every 20th verdict a worker is killed from outside, and once the process that forks them."""
    cases, expected = mixed(120)
    found: dict[str, str] = {}
    killed = 0
    for verdict in judge(iter(cases), SETTINGS):
        assert verdict.id not in found
        found[verdict.id] = verdict.status
        if len(found) % 20 == 0:
            for worker in workers()[:1]:
                worker.kill()
                killed += 1
        if len(found) == 50:
            for child in psutil.Process().children():
                if "pipeline.verifiers.worker" in " ".join(child.cmdline()):
                    child.kill()
    assert killed >= 3
    assert found == expected


def test_a_case_that_kills_its_worker_crashes_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "suicidal.py").write_text(
        "import os, signal\ndef judge(completion, reference):\n"
        "    if completion.response == 'die': os.kill(os.getpid(), signal.SIGKILL)\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cases = [Case(str(number), "suicidal:judge", "die" if number == 3 else "live") for number in range(8)]
    found = {verdict.id: verdict for verdict in judge(cases, SETTINGS)}
    assert {name for name, verdict in found.items() if verdict.status == "crashed"} == {"3"}
    assert found["3"].reward == 0.0
    assert len(found) == 8


def test_killing_the_caller_ends_every_process_it_started() -> None:
    script = textwrap.dedent(
        """
        import sys
        from pipeline.recipe import Verification
        from pipeline.verifiers import Case, judge
        tests = {"inputs": ["1"], "outputs": ["1"]}
        cases = [Case(str(n), "code", "```\\nwhile True: pass\\n```", tests=tests) for n in range(4)]
        cases.insert(0, Case("first", "code", "```\\nprint(1)\\n```", tests=tests))
        for verdict in judge(cases, Verification(workers=2, code_timeout_s=60)):
            print(verdict.id, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == "first\n"
    time.sleep(0.5)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 5
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    process.stdout.close()


def test_judging_works_from_any_thread() -> None:
    cases, expected = mixed(12)
    found: dict[str, str] = {}
    thread = threading.Thread(target=lambda: found.update((v.id, v.status) for v in judge(cases, SETTINGS)))
    thread.start()
    thread.join(60)
    assert found == expected


def test_memory_stays_flat_and_cases_are_taken_lazily() -> None:
    taken = 0

    def endless() -> Iterator[Case]:
        nonlocal taken
        while True:
            taken += 1
            yield Case(str(taken), "math", rf"\boxed{{\frac{{{taken % 500}}}{{7}}}}" + " " * 1000, answer="1/7")

    found = judge(endless(), SETTINGS)
    process, sizes = psutil.Process(), []
    for number, _ in enumerate(found):
        if number in (5_000, 20_000):
            sizes.append(process.memory_info().rss)
            assert taken - number < 20_000
        if number == 20_000:
            break
    found.close()  # type: ignore[attr-defined]
    assert sizes[1] - sizes[0] < 16 << 20


def test_refused_without_isolation_and_weaker_only_where_asked(tmp_path: Path) -> None:
    """On a machine without bwrap, and on one whose bwrap does not work."""
    script = textwrap.dedent(
        """
        import json, sys
        from pipeline.recipe import Verification
        from pipeline.verifiers import Case, judge
        case = Case("x", "code", "```\\nprint(sum(map(int, input().split())))\\n```", tests=json.loads(sys.argv[2]))
        for verdict in judge([case], Verification(workers=1, isolation=sys.argv[1])):
            print(json.dumps([verdict.status, verdict.reward, verdict.isolation, verdict.detail]))
        """
    )
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho no namespaces here >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    import json

    def run(isolation: str) -> list[object]:
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        command = [sys.executable, "-c", script, isolation, json.dumps(SUM)]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
        )
        return list(json.loads(done.stdout))

    status, reward, isolation, detail = run("bubblewrap")
    assert (status, reward, isolation) == ("refused", None, "none")
    assert re.search(r"bwrap does not work here \(.*namespaces.*\).*install bubblewrap.*isolation=process", str(detail))
    assert run("process")[:3] == ["correct", 1.0, "process"]


def test_the_documented_verifier_runs_as_documented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "verifiers.md").read_text(encoding="utf-8")
    (tmp_path / "words.py").write_text(text.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    cases = [
        Case("half", "words:judge", "a red house", answer="red fox"),
        Case("full", "words:judge", "the red fox", answer="red fox"),
        Case("none", "words:judge", "x", answer=None),
    ]
    found = {verdict.id: verdict for verdict in judge(cases, SETTINGS)}
    assert {name: (v.status, v.reward) for name, v in found.items()} == {
        "half": ("wrong", 0.5), "full": ("correct", 1.0), "none": ("bad_reference", None),
    }  # fmt: skip
    assert {(v.verifier, v.verifier_version, v.isolation) for v in found.values()} == {("words:judge", "1", "none")}


def test_scorers_of_reasoning_gym_give_their_own_rewards() -> None:
    import json

    import reasoning_gym

    cases, expected = [], {}
    for name in ("chain_sum", "letter_counting", "word_sorting", "fraction_simplification"):
        data = reasoning_gym.create_dataset(name, size=3, seed=3)
        for place, entry in enumerate(data):
            for kind, answer in (("right", entry["answer"]), ("wrong", "12 rabbits")):
                key = f"{name} {place} {kind}"
                cases.append(
                    Case(key, "pipeline.verifiers.gym:judge", rf"\boxed{{{answer}}}", answer=json.dumps(entry))
                )
                expected[key] = data.score_answer(answer, entry)
    found = {verdict.id: verdict.reward for verdict in judge(cases, SETTINGS)}
    assert found == pytest.approx(expected)
    assert {found[key] for key in found if key.endswith("right")} == {1.0}


def test_a_verifier_that_is_late_or_raises_is_a_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(
        "import time\ndef sleep(c, r): time.sleep(100)\n"
        "def fail(c, r): raise ValueError('so')\ndef odd(c, r): return 'x'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cases = [Case(name, f"faulty:{name}", "") for name in ("sleep", "fail", "odd")]
    found = {verdict.id: verdict for verdict in judge(cases, SETTINGS.model_copy(update={"code_timeout_s": 0.5}))}
    assert {name: verdict.status for name, verdict in found.items()} == {
        "sleep": "timeout", "fail": "crashed", "odd": "crashed",
    }  # fmt: skip
    assert "ValueError: so" in found["fail"].detail
    for task in ("nothing", "no_such_module:judge", "faulty:missing"):
        with pytest.raises(RequestError, match="no verifier"):
            find_verifier(task)


def test_equal_pairs_are_judged_once_and_share_their_verdict() -> None:
    """A pair that takes its whole time limit does so once, for all two hundred cases that have it."""
    cases = [Case(str(number), "math", r"\boxed{9^{9^{9^{9^9}}}}", answer="3") for number in range(200)]
    began = time.monotonic()
    found: list[Verdict] = list(judge(cases, SETTINGS.model_copy(update={"math_timeout_s": 1.0})))
    assert time.monotonic() - began < 15
    assert [verdict.status for verdict in found] == ["timeout"] * 200
    assert sorted(VERIFIERS) == ["code", "math"]
