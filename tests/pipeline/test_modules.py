"""Which module a name stands for, beside files of a person's that bear the same names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from persons_folder import fill

from pipeline import modules
from pipeline.errors import RequestError

REPOSITORY = Path(__file__).parents[2]


def run(folder: Path, *command: str, **environment: str) -> str:
    told = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    done = subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True)
    return f"{done.returncode} {done.stdout}{done.stderr}".strip()


@pytest.mark.parametrize("module", ["trainer", "assets.run_rounds", "assets.running.web", "pipeline.cli"])
def test_children_are_ours(tmp_path: Path, module: str) -> None:
    taken = run(fill(tmp_path), sys.executable, "-m", module, "--help")
    assert "of a person was imported" in taken  # what is held off here is real
    assert run(tmp_path, *modules.python(module, "--help")).startswith("0 ")


def test_what_children_start_in_turn_is_ours(tmp_path: Path) -> None:
    code = "from pipeline import modules; modules.settle(); import subprocess, sys; "
    code += "subprocess.run([sys.executable, '-m', 'trainer', '--help'], check=True)"
    assert run(fill(tmp_path), sys.executable, "-P", "-c", code).startswith("0 ")


OWN = "from pipeline.modules import import_own; print(import_own('yaml').__name__, import_own('mine').WHERE)"


def test_ones_own_modules_come_behind_what_is_installed(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"import beside\nWHERE = '{name}' + beside.TEXT")
        (tmp_path / name / "beside.py").write_text(f"TEXT = ' beside {name}'")
        (tmp_path / name / "yaml.py").write_text("raise SystemExit('a person\\'s yaml was imported')")
    here, there = tmp_path / "here", tmp_path / "there"
    begun = f"from pipeline import modules; modules.settle(); {OWN}"
    assert run(here, sys.executable, "-P", "-c", begun) == "0 yaml here beside here"
    told = run(here, sys.executable, "-P", "-c", begun, OAPL_MODULES=f"{there}{os.pathsep}{here}")
    assert told == "0 yaml there beside there"
    # What a person put on PYTHONPATH is as good as installed.
    wished = run(
        there, sys.executable, "-P", "-c", begun, PYTHONPATH=f"{REPOSITORY}{os.pathsep}{here}", OAPL_MODULES=""
    )
    assert wished.startswith("1 a person's yaml")


def test_another_distribution_of_our_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI has a `trainer`, too. Where it is found first, it would be run with our words."""
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trainer", raising=False)
    with pytest.raises(RequestError, match=rf"'trainer' is another package here \({tmp_path}") as caught:
        modules.python("trainer")
    assert "an environment of its own" in str(caught.value)
