from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from assets.running.instance import instance_config, prepare_home

REPOSITORY = Path(__file__).parents[3]

KEEP_SOMETHING = """
import dagster as dg
@dg.asset
def something() -> None: ...
with dg.DagsterInstance.get() as instance:
    assert dg.materialize([something], instance=instance).success
    assert instance.telemetry_enabled is False
    print(instance.get_runs_count())
"""


def test_the_top_level_file_says_what_the_commands_write() -> None:
    assert yaml.safe_load((REPOSITORY / "dagster.yaml").read_text()) == instance_config("data/dagster")


def test_with_home_at_the_repository_all_is_kept_below_data(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    environment = dict(os.environ) | {"DAGSTER_HOME": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", KEEP_SOMETHING],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dagster.yaml", "data"]


def test_commands_and_the_top_level_file_share_one_database(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "dagster.yaml", tmp_path)
    home = prepare_home(tmp_path / "data")
    counts = [
        subprocess.run(
            [sys.executable, "-c", KEEP_SOMETHING],
            cwd=tmp_path,
            env=dict(os.environ) | {"DAGSTER_HOME": str(place)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for place in (tmp_path, home)
    ]
    assert counts == ["1\n", "2\n"]


def test_a_changed_file_stays(tmp_path: Path) -> None:
    home = prepare_home(tmp_path)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    assert prepare_home(tmp_path) == home
    assert (home / "dagster.yaml").read_text() == "telemetry: {enabled: false}\n"


def test_a_moved_folder_is_told_where_it_is(tmp_path: Path) -> None:
    prepare_home(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    home = prepare_home(tmp_path / "new")
    assert yaml.safe_load((home / "dagster.yaml").read_text()) == instance_config(str(tmp_path / "new" / "dagster"))
