"""Snapshots: named by content, never half there, checked by hash."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import OaplError, RequestError, WorkError
from pipeline.layout import Run
from pipeline.policies import snapshots
from pipeline.policies.fetch import find_policy


def _fill(text: str, weights: bytes = b"weights") -> object:
    def fill(folder: Path) -> None:
        (folder / "config.json").write_text(text)
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "tokenizer.json").write_text("{}")

    return fill


def _publish(folder: Path, text: str = "{}", **facts: object) -> snapshots.Snapshot:
    given = {"parent": None, "round": None, "step": 0, "recipe_sha256": None, **facts}
    return snapshots.publish(folder, _fill(text), **given)  # type: ignore[arg-type]


def test_the_same_content_has_the_same_name_and_another_content_another(tmp_path: Path) -> None:
    first, again, other = _publish(tmp_path), _publish(tmp_path), _publish(tmp_path, text='{"x": 1}')
    assert first == again
    assert first.sha256 != other.sha256
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([first.snapshot_id, other.snapshot_id])


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        snapshots.publish(tmp_path, fill, parent=None, round=None, step=0, recipe_sha256=None)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    made = _publish(tmp_path)
    folder = tmp_path / made.snapshot_id
    assert snapshots.verify(folder) == made
    (folder / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(WorkError, match=r"model\.safetensors is not what was published"):
        snapshots.verify(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WorkError, match=r"model\.safetensors is missing"):
        snapshots.verify(folder)


def test_folders_without_a_policy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"config\.json"):
        snapshots.load_record(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="no weights"):
        snapshots.load_record(tmp_path)
    with pytest.raises(OaplError, match="neither a folder nor"):
        snapshots.adopt(find_policy("no/such/model/here"), tmp_path / "out")


def test_a_round_keeps_the_snapshot_it_was_frozen_with(tmp_path: Path) -> None:
    run = Run(tmp_path, "r")
    with pytest.raises(RequestError, match="no start"):
        snapshots.frozen_for(run, 0, 0)
    start = _publish(run.snapshots)
    assert snapshots.frozen_for(run, 0, 0) == start
    with pytest.raises(RequestError, match="round 0 has published no snapshot"):
        snapshots.frozen_for(run, 1, 0)
    first = _publish(run.snapshots, text='{"a": 1}', parent=start.snapshot_id, round=0, step=10)
    assert snapshots.frozen_for(run, 1, 0) == first
    # Training round 0 again publishes another; round 1 has begun with the first and stays with it.
    second = _publish(run.snapshots, text='{"a": 2}', parent=start.snapshot_id, round=0, step=10)
    assert snapshots.frozen_for(run, 1, 0) == first
    assert snapshots.newest(run, 0) == second


def test_what_a_killed_publisher_left_is_no_snapshot_and_goes_in_time(tmp_path: Path) -> None:
    run = Run(tmp_path, "r")
    start = _publish(run.snapshots)
    left = [run.snapshots / ".partial-1", run.snapshots / ".partial-2"]
    for place in left:
        shutil.copytree(run.snapshot(start.snapshot_id), place)
        (place / "snapshot.json").write_text(start.model_copy(update={"round": 0}).model_dump_json())
    assert snapshots.newest(run, 0) is None
    os.utime(left[0], (0, 0))
    _publish(run.snapshots, text='{"a": 1}', parent=start.snapshot_id, round=0, step=10)
    assert [place.exists() for place in left] == [False, True]


def test_a_lagging_round_takes_an_older_snapshot(tmp_path: Path) -> None:
    run = Run(tmp_path, "r")
    start = _publish(run.snapshots)
    assert snapshots.frozen_for(run, 1, 1) == snapshots.frozen_for(run, 0, 1) == start
    with pytest.raises(RequestError, match="round 2 has no policy to freeze: run r: round 0 has published no snapshot"):
        snapshots.frozen_for(run, 2, 1)
    first = _publish(run.snapshots, text='{"a": 1}', parent=start.snapshot_id, round=0, step=10)
    second = _publish(run.snapshots, text='{"a": 2}', parent=first.snapshot_id, round=1, step=20)
    assert snapshots.frozen_for(run, 2, 1) == first
    assert snapshots.published_before(run, 2) == second


def test_adopting_copies_the_model_and_nothing_else(tmp_path: Path, random_policy: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(random_policy, source)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    made = snapshots.adopt(source, tmp_path / "out")
    copied = tmp_path / "out" / made.snapshot_id
    assert not (copied / "pytorch_model.bin").exists()
    assert made.tokenizer_sha256 == snapshots.load_record(random_policy).tokenizer_sha256
    assert snapshots.verify(copied) == made
