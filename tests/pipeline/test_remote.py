"""Policies, verdicts and snapshots at URLs, on a real S3-compatible server behind a proxy that spoils requests."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from faulty_proxy import FAULTS, FaultyProxy, asked_for
from typer.testing import CliRunner

from pipeline import scoring, snapshots
from pipeline.cli import app
from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.generation.groups import Work
from pipeline.generation.replica import Replica
from pipeline.prompts import make_prompt
from pipeline.recipe import load_recipe
from pipeline.remote import fetch_policy, fetch_prompts, put_prompts
from pipeline.rollouts import objects
from pipeline.rollouts.locate import locate
from pipeline.rollouts.store import RolloutWriter
from pipeline.working_copy import Copy

sys.path.append(str(Path(__file__).parent / "rollouts"))
from rollout_data import group, prompt_name, provenance


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


def test_a_replica_brings_the_policy_to_its_own_machine(
    bucket: str, random_policy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    put_folder(bucket, random_policy)
    work = Work(fetch_policy(bucket), load_recipe("tiny").generation, 0, 0, origin=bucket)
    assert work.policy.is_dir()
    monkeypatch.setenv("OAPL_CACHE", str(tmp_path / "of-another-node"))
    replica = Replica(work, lambda: None, f"{bucket}/rollouts", provenance(), "one")  # type: ignore[arg-type,return-value]
    with pytest.raises(RequestError, match=r"keeps the policy in .*; set OAPL_CACHE to the same path on all nodes"):
        replica.start()


def published(random_policy: Path, url: str, folder: Path) -> Copy:
    """What stands for the URL of snapshots, with one in it."""
    copy = Copy(url, folder)
    shutil.copytree(random_policy, folder / random_policy.name)
    return copy


@pytest.mark.parametrize("fault", FAULTS)
def test_an_upload_that_is_spoilt_once_is_whole(
    bucket: str, proxy: FaultyProxy, random_policy: Path, tmp_path: Path, fault: str
) -> None:
    copy = published(random_policy, bucket, tmp_path / "here")
    proxy.spoil_once(fault, "PUT", "model.safetensors")
    assert copy.send(lambda name: True).files == len(list(random_policy.iterdir()))
    assert [(one[0], one[1]) for one in proxy.spoiled] == [(fault, "PUT")]
    assert snapshots.verify(fetch_policy(f"{bucket}/{random_policy.name}")) == snapshots.load_record(random_policy)


@pytest.mark.parametrize("fault", ["500", "cut"])
def test_an_upload_that_broke_off_is_not_seen_and_is_completed(
    bucket: str, proxy: FaultyProxy, random_policy: Path, tmp_path: Path, fault: str
) -> None:
    url = f"{bucket}/{random_policy.name}"
    copy = published(random_policy, bucket, tmp_path / "here")
    proxy.fault_of = lambda method, path: fault if method == "PUT" and "tokenizer.json" in path else None
    with pytest.raises(WorkError, match=f"^{bucket}: .*then run again") as caught:
        copy.send(lambda name: True)
    assert "\n" not in str(caught.value)
    there = set(objects.Objects(url).names())
    assert "model.safetensors" in there and not there & {"tokenizer.json", snapshots.RECORD}
    asked = asked_for(proxy, "PUT")
    # From a machine that knows nothing of what was sent.
    sent = published(random_policy, bucket, tmp_path / "elsewhere").send(lambda name: True)
    assert sent.files == len(asked) == len(list(random_policy.iterdir())) - len(there)
    assert asked[-1].endswith(snapshots.RECORD)
    assert snapshots.verify(fetch_policy(url)) == snapshots.load_record(random_policy)


def test_a_copy_brings_and_sends_what_changed(bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    one, two = Copy(bucket, tmp_path / "one"), Copy(bucket, tmp_path / "two")
    (one.folder / "stages").mkdir()
    for name in ("stages/a.json", "b.txt", ".hidden"):
        (one.folder / name).write_text(f"first {name}")
    assert one.send(lambda name: True).files == 2
    two.bring(lambda name: True)
    assert (two.folder / "stages/a.json").read_text() == "first stages/a.json"
    assert not (two.folder / ".hidden").exists()
    (two.folder / "b.txt").write_text("second")
    os.utime(two.folder / "stages/a.json")  # looks new, and is not
    asked = asked_for(proxy, "PUT")
    assert two.send(lambda name: True).files == 1 and len(asked) == 1
    (one.folder / "stages/a.json").write_text("here, unsent")
    one.bring(lambda name: True)
    assert (one.folder / "b.txt").read_text() == "second"
    assert (one.folder / "stages/a.json").read_text() == "here, unsent"
    objects.Objects(f"{bucket}-other").write("c.txt", b"of another folder, whose name begins as this one's")
    assert two.bring(["b.txt", "nothing"]) == {"b.txt"}
    assert two.bring(lambda name: True) == {"b.txt", "stages/a.json"}
    (one.folder / "b.txt").write_text("third")
    one.send(lambda name: True)
    os.utime(two.folder / "b.txt")  # as it was sent: nobody's third is overwritten
    assert two.send(lambda name: True).files == 0
    two.bring(["b.txt"])
    assert (two.folder / "b.txt").read_text() == "third"


def test_prompts_are_brought_anew_when_they_changed(bucket: str) -> None:
    place = objects.Objects(bucket)
    place.write("some.jsonl", b"first")
    assert fetch_prompts(f"{bucket}/some.jsonl").read_bytes() == b"first"
    place.write("some.jsonl", b"second")
    path = fetch_prompts(f"{bucket}/some.jsonl")
    assert path.name == "some.jsonl" and path.read_bytes() == b"second"
    with pytest.raises(RequestError, match=f"no prompt file {bucket}/none.jsonl"):
        fetch_prompts(f"{bucket}/none.jsonl")
    place.delete(["some.jsonl"])
    with pytest.raises(RequestError, match=f"no prompt file {bucket}/some.jsonl"):
        fetch_prompts(f"{bucket}/some.jsonl")


def write_rollouts(place: str | Path) -> None:
    with RolloutWriter(place, provenance(), samples=4) as writer:
        for number in range(3):
            writer.add_group(group(number))
    prompts = [make_prompt("math", (("user", f"question {n}"),), answer=str(n)) for n in range(3)]
    named = [replace(one, prompt_id=prompt_name(number)) for number, one in enumerate(prompts)]
    put_prompts(place, named)


def verify(place: str | Path) -> OaplError | None:
    found = CliRunner().invoke(app, ["verify", str(place)]).exception
    assert found is None or isinstance(found, OaplError), repr(found)
    return found


def test_verdicts_go_to_the_url_and_half_of_them_are_not_seen(
    bucket: str, proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rollouts(bucket)
    write_rollouts(tmp_path / "disk")
    assert verify(tmp_path / "disk") is None
    proxy.fault_of = lambda method, path: "500" if method == "PUT" and "scoring.json" in path else None
    failed = verify(bucket)
    assert failed is not None and failed.exit_code == 1 and "then run again" in str(failed)
    assert [name for name in objects.Objects(bucket).names("verdicts") if name.endswith(".parquet")]
    assert locate(bucket).verdicts is None
    proxy.fault_of = lambda method, path: None

    def judged_again(*_: object) -> None:
        raise AssertionError("what was judged waits to be sent")

    monkeypatch.setattr(scoring, "judge", judged_again)
    assert verify(bucket) is None
    found = locate(bucket).verdicts
    assert found is not None
    tables = [pl.read_parquet(folder / "*.parquet") for folder in (found, tmp_path / "disk" / "verdicts")]
    assert tables[0].drop("wall_ms").equals(tables[1].drop("wall_ms")) and len(tables[0]) == 12
    asked = asked_for(proxy, "PUT")
    shutil.rmtree(tmp_path / "cache")
    assert verify(bucket) is None  # on another machine, which has nothing to do
    assert asked == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["verify", "s3://bucket/nothing/there"], 2, "s3://bucket/nothing/there"),
        (["verify", "nonsense://x/y"], 2, "nonsense://x/y: Protocol not known"),
        (["train", "--policy", "s3://nobody/p", "--rollouts", "r", "--out", "s3://nobody/o"], 2, "no policy at s3://n"),
        (["evaluate", "--policy", "nonsense://p", "--prompts", "p", "--out", "o"], 2, "nonsense://p: Protocol not kno"),
        (["generate", "--policy", "p", "--prompts", "s3://nobody/p.jsonl", "--out", "o"], 2, "no prompt file s3://nob"),
    ],
)
def test_a_wrong_url_is_one_line(
    bucket: str, monkeypatch: pytest.MonkeyPatch, words: list[str], code: int, said: str
) -> None:
    monkeypatch.setattr(objects, "PAUSE_S", 100.0)  # no second try
    found = CliRunner().invoke(app, words).exception
    assert isinstance(found, OaplError), repr(found)
    assert found.exit_code == code and said in str(found) and "\n" not in str(found)


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
