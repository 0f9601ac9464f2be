"""The wheel, installed into an empty environment and used in a folder that has files named as our modules are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from persons_folder import fill

REPOSITORY = Path(__file__).parents[2]


def alone() -> dict[str, str]:
    """No other path than the environment's own."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture(scope="module")
def oapl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment that holds the wheel, and finds what it needs where these tests do."""
    folder = tmp_path_factory.mktemp("installed")
    # A copy of the sources: building leaves files beside them.
    tree = folder / "tree"
    for name in ("assets", "pipeline", "trainer"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, tree)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    built = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(tree)]
    subprocess.run(built, env=alone(), check=True)
    (wheel,) = folder.glob("oapl-*.whl")
    python = folder / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], env=alone(), check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    # Packages only: what is installed there as editable is not seen through a .pth file of another environment.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.with_name("oapl")


def run(command: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(command), *words], cwd=folder, env=alone(), capture_output=True, text=True, timeout=300)


def test_it_is_the_wheel_that_runs(oapl: Path, tmp_path: Path) -> None:
    code = "import assets, pipeline.sharing.browse as browse, trainer; print(browse.__file__)"
    done = run(oapl.with_name("python"), fill(tmp_path), "-P", "-c", code)
    assert done.stdout.startswith(str(oapl.parents[1])), done.stderr
    assert (Path(done.stdout.strip()).parent / "browse.html").is_file()


def test_answers_and_programs_are_judged(oapl: Path, tmp_path: Path) -> None:
    program = "```python\nn = int(input())\nprint(n * n)\n```"
    cases = [
        {"id": "sum", "task": "math", "response": r"\boxed{5}", "answer": "5"},
        {"id": "square", "task": "code", "response": program, "tests": {"inputs": ["3\n"], "outputs": ["9\n"]}},
        {"id": "cube", "task": "code", "response": program, "tests": {"inputs": ["3\n"], "outputs": ["27\n"]}},
        {"id": "own", "task": "mine:judge", "response": "a red house", "answer": "red"},
    ]
    (fill(tmp_path) / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    (tmp_path / "mine.py").write_text(
        "def judge(completion, reference):\n    return reference.answer in completion.response\n"
    )
    done = run(oapl, tmp_path, "verify", "cases.jsonl", "--out", "verdicts.jsonl")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(one["id"], one["status"]) for one in found] == [
        ("sum", "correct"),
        ("square", "correct"),
        ("cube", "wrong"),
        ("own", "correct"),
    ]


@pytest.mark.parametrize("command", ["run", "ui", "train"])
def test_each_command_says_what_it_does(oapl: Path, tmp_path: Path, command: str) -> None:
    done = run(oapl, fill(tmp_path), command, "--help")
    assert done.returncode == 0 and f"oapl {command}" in done.stdout, done.stderr


def test_the_learner_is_ours(oapl: Path, tmp_path: Path, random_policy: Path) -> None:
    """It comes as far as to look for the rollouts."""
    words = ["--rollouts", "nothing-here", "--policy", str(random_policy), "--out", "out"]
    done = run(oapl, fill(tmp_path), "train", *words)
    assert (done.returncode, done.stderr.splitlines()[-1][:36]) == (2, "oapl: nothing-here: no such folder; ")
    python = oapl.with_name("python")
    command = run(python, oapl.parent, "-c", "from pipeline.modules import python; print(*python('trainer'))").stdout
    said = run(python, tmp_path, *command.split()[1:], "--help")
    assert said.returncode == 0 and "python -m trainer" in said.stdout, said.stderr
