from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from asset_world import World, child_environment, run_rounds, write_recipe


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    # While one works on these tests: a folder that is kept, so that the round is not made anew each time.
    kept = os.environ.get("OAPL_TEST_WORLD")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("world")
    folder.mkdir(exist_ok=True)
    recipe, said = folder / "small.yaml", folder / "said.txt"
    if not said.exists():
        write_recipe(folder)
        made = run_rounds("--root", str(folder / "data"), "--recipe", str(recipe))
        assert made.returncode == 0, made.stderr
        said.write_text(made.stderr)
    before = dict(os.environ)
    os.environ |= child_environment() | {"OAPL_ROOT": str(folder / "data"), "OAPL_RECIPE": str(recipe)}
    yield World(folder / "data", recipe, said.read_text())
    os.environ.clear()
    os.environ |= before
