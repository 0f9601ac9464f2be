"""The contracts of the house catch what is against them, wherever an import stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PLANTED = {
    "pipeline: rooms on floors": (
        "pipeline/storage/durable.py",
        "def upwards() -> None:\n    from pipeline.policies.snapshots import load_record\n",
    ),
    "trainer: from the process down to the losses": ("trainer/losses.py", "from trainer import packing\n"),
    "assets: from the command down to what runs it": (
        "assets/running/terminal.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from assets.rounds import rounds\n",
    ),
    "No circle anywhere": (
        "pipeline/planning/terms.py",
        "def circle() -> None:\n    from pipeline.planning.arithmetic import plan\n",
    ),
    "assets and trainer stand on pipeline, beside each other": ("assets/checks.py", "import trainer.losses\n"),
    "dagster is known in assets only, deepspeed in trainer only": ("pipeline/ending.py", "import deepspeed\n"),
    "assets start the trainer and the engine, and import neither deepspeed nor vllm": (
        "assets/config.py",
        "def engine() -> None:\n    import vllm\n",
    ),
    "trainer knows neither Dagster nor the engine": ("trainer/schedule.py", "import dagster\n"),
    "vllm is imported in one module": ("pipeline/generation/fleet.py", "import vllm\n"),
}


def lint(folder: Path) -> str:
    tool = Path(sys.executable).with_name("lint-imports")
    told = {**os.environ, "PYTHONPATH": str(folder), "COLUMNS": "200"}
    done = subprocess.run([tool, "--no-cache"], cwd=folder, env=told, capture_output=True, text=True)
    return f"{done.returncode}\n{done.stdout}{done.stderr}"


def test_planted_imports_are_found(tmp_path: Path) -> None:
    for name in ("assets", "pipeline", "trainer"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    said = lint(tmp_path)
    assert said.startswith("0\n") and "0 broken" in said, said
    for file, text in PLANTED.values():
        with (tmp_path / file).open("a", encoding="utf-8") as opened:
            opened.write(text)
    (tmp_path / "pipeline" / "attic").mkdir()  # a room on no floor
    (tmp_path / "pipeline" / "attic" / "__init__.py").touch()
    said = lint(tmp_path)
    assert said.startswith("1\n"), said
    for contract in PLANTED:
        assert f"{contract} BROKEN" in said, said
    assert "pipeline.storage.durable -> pipeline.policies.snapshots" in said
    assert "attic" in said
