"""Folders that stand for URLs: what is sent and brought, on a real S3-compatible server that spoils requests."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from faulty_proxy import FAULTS, FaultyProxy, asked_for

from pipeline.errors import WorkError
from pipeline.policies import snapshots
from pipeline.policies.fetch import fetch_policy
from pipeline.runs.at_url import MARKS
from pipeline.storage import objects
from pipeline.storage.working_copy import Copy, Marks


def published(random_policy: Path, url: str, folder: Path) -> Copy:
    """What stands for the URL of snapshots, with one in it."""
    copy = Copy(url, folder, snapshots.MARKS)
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


def test_marks_say_what_is_sent_when() -> None:
    names = [
        "report/rounds.png",
        "stages/round=0000.json",
        "stages/round=0000.learn.yaml",
        "learning/round=0000.json",
        "learning/round=0000.jsonl",
        "verdicts/round=0000/scoring.json",
        "verdicts/round=0000/math-1.parquet",
        "snapshots/000001-ab/snapshot.json",
        "snapshots/000001-ab/model.safetensors",
        "datasets/round=0000/SHA256SUMS",
    ]
    assert {name: MARKS.rank(name) for name in names} == dict(zip(names, (3, 2, 0, 1, 0, 1, 0, 1, 0, 1), strict=True))
    assert not MARKS.hides("snapshots/.optimizer/000001-ab/moments.pt")
    assert MARKS.hides("snapshots/.partial-1/model.safetensors") and MARKS.hides(".lease.json")
    plain = Marks()
    assert {plain.rank(name) for name in names} == {0} and plain.hides("snapshots/.optimizer/x")


def test_a_record_is_announced_before_what_it_is_of(bucket: str, proxy: FaultyProxy, tmp_path: Path) -> None:
    copy = Copy(bucket, tmp_path / "here", Marks(records=("whole.json",), unfinished={"whole.json": ".begun"}))
    for name in ("a/whole.json", "a/data", "data"):
        (copy.folder / name).parent.mkdir(exist_ok=True)
        (copy.folder / name).write_text(name)
    asked = asked_for(proxy, "PUT")
    copy.send(lambda name: True)
    order = [path.rpartition(f"/{bucket.rpartition('/')[2]}/")[2] for path in asked]
    assert order == ["a/.begun", "a/data", "data", "a/whole.json"]
