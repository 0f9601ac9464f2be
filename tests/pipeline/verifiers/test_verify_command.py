"""`verify_file`: a file of cases in, verdicts in its order out, or one line that says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars
import pytest

from pipeline.errors import RequestError
from pipeline.recipe import Verification
from pipeline.verifiers.command import verify_file

SETTINGS = Verification(workers=2, code_timeout_s=0.8, math_timeout_s=1.5)
SUM = {"inputs": ["1 2\n"], "outputs": ["3\n"]}


def write(path: Path, cases: list[Any]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return path


def case(name: Any, response: str, **rest: Any) -> dict[str, Any]:
    return {"id": name, "task": "math" if "answer" in rest else "code", "response": response, **rest}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_verdicts_come_in_the_files_order_however_long_each_takes(tmp_path: Path) -> None:
    cases = [
        case("late", "```\nwhile True: pass\n```", tests=SUM),
        case("late too", r"\boxed{9^{9^{9^{9^9}}}}", answer="3"),
    ]
    cases += [case(number, rf"\boxed{{{number}}}", answer=number if number % 2 else "0") for number in range(1, 300)]
    cases += [case("same", "```\nprint(sum(map(int, input().split())))\n```", tests=json.dumps(SUM))] * 2
    file = write(tmp_path / "cases.jsonl", cases)
    seen: list[tuple[int, int]] = []
    counts = verify_file(file, tmp_path / "out.jsonl", SETTINGS, lambda done, total: seen.append((done, total)))
    found = lines(tmp_path / "out.jsonl")
    assert [verdict["id"] for verdict in found] == [str(one["id"]) for one in cases]
    assert [verdict["status"] for verdict in found[:4]] == ["timeout", "timeout", "correct", "wrong"]
    assert [verdict["status"] for verdict in found[-2:]] == ["correct"] * 2
    assert list(found[0]) == ["id", "status", "reward", "detail", "wall_ms", "verifier", "isolation"]
    assert found[0]["wall_ms"] > 700
    assert (found[0]["isolation"], found[1]["isolation"]) == ("bubblewrap", "none")
    assert counts == {"timeout": 2, "correct": 152, "wrong": 149}
    assert seen[-1] == (len(cases), len(cases))

    verify_file(file, tmp_path / "out.parquet", SETTINGS)
    table = polars.read_parquet(tmp_path / "out.parquet")
    timeless = ["id", "status", "reward", "detail", "verifier", "isolation"]
    assert table.select(timeless).rows()[2:] == [tuple(verdict[name] for name in timeless) for verdict in found[2:]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cases.jsonl", "out.jsonl", "out.parquet"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"id": "x", "task": "math", "answer": "3"}', "line 2: no 'response'"),
        ('{"id": "x", "task": "art", "response": "", "answer": "3"}', "line 2: no verifier 'art'; known: math, code"),
        ('{"id": "x", "task": "math", "response": ""}', "line 2: no 'answer', which math needs"),
        ('{"id": "x", "task": "code", "response": "", "answer": "3"}', "line 2: no 'tests', which code needs"),
        ('{"id": "x", "task": "code", "response": "", "tests": 3}', "line 2: tests must be"),
        ('{"id": [], "task": "math", "response": "", "answer": "3"}', "line 2: id must be"),
        ('{"id": "x", "task": "math", "response": 7, "answer": "3"}', "line 2: response must be"),
        ("\xff", "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(line: str, said: str, tmp_path: Path) -> None:
    good = json.dumps(case("a", r"\boxed{3}", answer="3"))
    file = tmp_path / "cases.jsonl"
    file.write_bytes(f"{good}\n".encode() + line.encode("latin-1") + f"\n{good}\n".encode())
    (tmp_path / "out.jsonl").write_text("what was here before\n")
    with pytest.raises(RequestError) as told:
        verify_file(file, tmp_path / "out.jsonl", SETTINGS)
    assert said in str(told.value)
    assert "\n" not in str(told.value)
    assert told.value.exit_code == 2
    assert (tmp_path / "out.jsonl").read_text() == "what was here before\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_places_are_told_before_anything_is_judged(tmp_path: Path) -> None:
    file = write(tmp_path / "cases.jsonl", [case("a", "x", answer="3")])
    for source, out in (
        (tmp_path / "none.jsonl", "o.jsonl"),
        (file, "o.csv"),
        (file, "no/o.jsonl"),
        (tmp_path, "o.jsonl"),
    ):
        with pytest.raises(RequestError) as told:
            verify_file(source, tmp_path / out, SETTINGS)
        assert "\n" not in str(told.value)


def test_an_empty_file_gives_an_empty_one(tmp_path: Path) -> None:
    file = write(tmp_path / "cases.jsonl", [])
    assert verify_file(file, tmp_path / "out.parquet", SETTINGS) == {}
    assert polars.read_parquet(tmp_path / "out.parquet").height == 0
