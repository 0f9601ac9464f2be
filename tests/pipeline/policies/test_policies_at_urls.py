"""Policies at URLs, on a real S3-compatible server behind a proxy that spoils requests."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_proxy import FaultyProxy, asked_for

from pipeline.errors import RequestError, WorkError
from pipeline.policies import snapshots
from pipeline.policies.fetch import fetch_policy
from pipeline.storage import objects
from pipeline.storage.working_copy import Copy


def put_folder(url: str, folder: Path, names: list[str] | None = None) -> None:
    place = objects.Objects(url)
    for path in folder.iterdir():
        if names is None or path.name in names:
            place.write(path.name, path.read_bytes())


@pytest.mark.parametrize("url", ["s3", "memory://bucket/policy"])
def test_a_snapshot_is_brought_once_and_is_the_same(
    bucket: str, proxy: FaultyProxy, random_policy: Path, url: str
) -> None:
    url = bucket if url == "s3" else url
    put_folder(url, random_policy)
    asked = asked_for(proxy, "GET")
    with ThreadPoolExecutor(4) as threads:
        (folder,) = set(threads.map(fetch_policy, [url, f"{url}/", url, url]))
    assert snapshots.verify(folder) == snapshots.verify(random_policy)
    weights = [path for path in asked if path.endswith("model.safetensors")]
    assert len(weights) == (1 if url == bucket else 0)
    assert fetch_policy(url) == folder
    assert fetch_policy(f"file://{random_policy}") == random_policy


def test_a_plain_folder_has_the_identity_that_it_has_on_a_disk(
    bucket: str, random_policy: Path, tmp_path: Path
) -> None:
    shutil.copytree(random_policy, tmp_path / "plain", ignore=shutil.ignore_patterns(snapshots.RECORD))
    put_folder(bucket, tmp_path / "plain")
    first = fetch_policy(bucket)
    assert snapshots.load_record(first) == snapshots.load_record(tmp_path / "plain")
    objects.Objects(bucket).write("generation_config.json", b'{"eos_token_id": 1}')
    assert fetch_policy(bucket) != first


def test_what_is_not_whole_is_not_taken(bucket: str, random_policy: Path) -> None:
    with pytest.raises(RequestError, match=f"^no policy at {bucket}: expected snapshot.json"):
        fetch_policy(bucket)
    put_folder(bucket, random_policy)
    weights = objects.Objects(bucket).read("model.safetensors")
    objects.Objects(bucket).write("model.safetensors", weights[:-1] + b"x")
    with pytest.raises(WorkError, match=r"model\.safetensors: is not what was published"):
        fetch_policy(bucket)
    objects.Objects(bucket).delete(["model.safetensors"])
    with pytest.raises(WorkError, match=r"model\.safetensors: is missing in the store"):
        fetch_policy(bucket)
    objects.Objects(bucket).write("model.safetensors", weights)
    record = objects.Objects(bucket).read(snapshots.RECORD)
    objects.Objects(bucket).write(snapshots.RECORD, record.replace(b'"config.json"', b'"../config.json"'))
    with pytest.raises(RequestError, match=r"'\.\./config\.json' is no plain file name"):
        fetch_policy(bucket)
    objects.Objects(bucket).write(snapshots.RECORD, record)
    assert snapshots.verify(fetch_policy(bucket)) == snapshots.load_record(random_policy)


def published(random_policy: Path, url: str, folder: Path) -> Copy:
    """What stands for the URL of snapshots, with one in it."""
    copy = Copy(url, folder, snapshots.MARKS)
    shutil.copytree(random_policy, folder / random_policy.name)
    return copy


def test_wrong_credentials_and_a_missing_bucket_are_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, random_policy: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(objects, "PAUSE_S", 100.0)
    with pytest.raises(WorkError, match=r"^s3://nobody/x: .*bucket does not exist; check the address") as caught:
        published(random_policy, "s3://nobody/x", tmp_path / "here").send(lambda name: True)
    assert "\n" not in str(caught.value)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(WorkError, match=f"^{bucket}: .*[Cc]redentials") as caught:
            fetch_policy(bucket)
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    assert "\n" not in str(caught.value)
