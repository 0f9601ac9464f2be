"""The block of deploy/s3, on an S3-compatible server: what steps write is kept there, and read from there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import dagster as dg
import pytest
import yaml
from asset_world import REPOSITORY
from moto.server import ThreadedMotoServer

from assets.running.instance import instance_config


@dg.asset
def loud() -> None:
    sys.stdout.write("on standard output\n")
    sys.stderr.write("on standard error\n")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dg.DagsterInstance:
    """The data folder's instance with the block in place, on a machine that has a log folder of its own."""
    monkeypatch.setenv("OAPL_DAGSTER_LOGS", str(folder))
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    block = yaml.safe_load((REPOSITORY / "deploy" / "s3" / "compute-logs.yaml").read_text())
    (home / "dagster.yaml").write_text(yaml.safe_dump(instance_config(str(home)) | block))
    return dg.DagsterInstance.from_config(str(home))


@pytest.mark.filterwarnings("ignore:Found version mismatch", "ignore:datetime.datetime.utcnow")
def test_logs_of_steps_lie_in_the_bucket(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OAPL_LOGS_BUCKET", "rounds")
    monkeypatch.setenv("OAPL_S3_ENDPOINT", endpoint)
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="rounds")
    with opened(tmp_path / "here", monkeypatch) as instance:
        result = dg.materialize([loud], instance=instance)
        (captured,) = (
            event.logs_captured_data for event in result.all_events if event.event_type_value == "LOGS_CAPTURED"
        )
    keys = [found["Key"] for found in client.list_objects_v2(Bucket="rounds")["Contents"]]
    place = f"dagster/logs/storage/{result.run_id}/compute_logs/{captured.file_key}"
    assert sorted(keys) == [f"{place}.err", f"{place}.out"]
    # The webserver of another machine has none of it but what lies there.
    with opened(tmp_path / "elsewhere", monkeypatch) as instance:
        read = instance.compute_log_manager.get_log_data([result.run_id, "compute_logs", captured.file_key])
    assert read.stdout == b"on standard output\n" and b"\non standard error\n" in (read.stderr or b"")
