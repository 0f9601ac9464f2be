"""Parts that tests of several rooms share: a small random policy, and a real S3-compatible server (moto)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy

# Test processes share the cores: threads that spin while they wait would take them from the others.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def random_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of some thousand weights with the embedded tokenizer, untrained: `snapshots/<id>`."""
    import torch

    from pipeline.policies import snapshots
    from pipeline.prompts import tiny
    from pipeline.recipe import ColdStart
    from trainer.policy import make_model, make_tokenizer

    torch.manual_seed(0)
    settings = ColdStart(vocabulary=320, hidden=32, layers=2, heads=2, kv_heads=1, head_dim=32, mlp=64)
    texts = [text for pair in islice(tiny.traces(0, 0.5, 0.5), 200) for text in pair]
    tokenizer = make_tokenizer(["user", "assistant", *texts], settings.vocabulary)
    model = make_model(settings, tokenizer)
    folder = tmp_path_factory.mktemp("policy") / "snapshots"

    def fill(partial: Path) -> None:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    made = snapshots.publish(folder, fill, parent=None, round=None, step=0, recipe_sha256=None)
    return folder / made.snapshot_id


def oapl(
    *words: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a person does."""
    return subprocess.run(
        [sys.executable, "-m", "pipeline.cli", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd or Path(__file__).parents[1],
        env={**os.environ, **(env or {})},
        timeout=300,
        check=False,
    )


@pytest.fixture(name="oapl", scope="session")
def _oapl() -> object:
    return oapl


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the server, which has a bucket named `bucket`."""
    import boto3

    log = tmp_path_factory.mktemp("s3") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out) as server:
        try:
            for _ in range(600):
                found = re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())
                if found:
                    break
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            assert found, log.read_text()
            words = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
            boto3.client("s3", endpoint_url=found[0], **words).create_bucket(Bucket="bucket")
            yield found[0]
        finally:
            server.kill()


@pytest.fixture
def credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL", s3)):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def proxy(s3: str) -> Iterator[FaultyProxy]:
    """Before the server, and where s3fs is told that S3 is, for all tests here: a new client takes a second."""
    import fsspec.config
    import s3fs

    made = FaultyProxy(s3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("ENDPOINT_URL", made.url)):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 1}})
        s3fs.S3FileSystem.clear_instance_cache()
        yield made
    s3fs.S3FileSystem.clear_instance_cache()
    made.close()


@pytest.fixture
def bucket(proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a folder that is this test's own, reached through the proxy."""
    from pipeline.storage import objects

    monkeypatch.setenv("OAPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "PAUSE_S", 0.01)
    proxy.fault_of, proxy.spoiled = (lambda method, path: None), []
    yield f"s3://bucket/{uuid.uuid4().hex[:8]}"
    proxy.fault_of = lambda method, path: None
