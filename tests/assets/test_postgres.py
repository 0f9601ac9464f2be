"""The PostgreSQL variant of deploy/, on a real server of Debian's packages, started by the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from asset_world import REPOSITORY, World

pytestmark = pytest.mark.system

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of an empty database. The server refuses to run as root, so root starts it as `postgres`."""
    assert BINARIES, "install PostgreSQL: apt-get install postgresql"
    user = "postgres" if os.geteuid() == 0 else None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = Path(tempfile.mkdtemp(prefix="oapl-postgres-"))
    if user:
        shutil.chown(folder, user)
    data = folder / "data"

    def call(name: str, *words: str) -> None:
        command = [str(BINARIES[-1] / name), *words]
        subprocess.run(command, check=True, cwd=folder, user=user, stdout=subprocess.DEVNULL)

    call("initdb", "-D", str(data), "-U", "oapl", "--auth=trust", "--no-sync")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    call("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        call("createdb", "-h", "127.0.0.1", "-p", port, "-U", "oapl", "rounds")
        yield f"postgresql+psycopg2://oapl@127.0.0.1:{port}/rounds"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore:Found version mismatch")
def test_a_round_through_postgresql(world: World, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from assets.definitions import ASSETS, defs
    from assets.rounds import open_rounds

    monkeypatch.setenv("OAPL_POSTGRES_URL", server)
    monkeypatch.setenv("OAPL_DAGSTER_LOGS", str(tmp_path / "logs"))
    shutil.copy(REPOSITORY / "deploy" / "postgres" / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        open_rounds(instance, 0)
        result = defs.resolve_job_def("whole_round").execute_in_process(
            instance=instance, partition_key="0000", run_config={"loggers": {"terminal": {}}}
        )
        assert result.success
    # Another connection, as the webserver has: what was recorded lies in the database.
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        (run,) = instance.get_runs()
        assert run.status is dg.DagsterRunStatus.SUCCESS
        for asset in ASSETS:
            assert instance.get_latest_materialization_event(asset.key) is not None
        assert instance.get_dynamic_partitions("rounds") == ["0000", "0001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dagster.yaml", "logs"]
