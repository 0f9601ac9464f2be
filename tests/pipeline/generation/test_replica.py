"""A replica on another machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from rollout_data import provenance

from pipeline.errors import RequestError
from pipeline.generation.batch import Work
from pipeline.generation.replica import Replica
from pipeline.policies.fetch import fetch_policy
from pipeline.recipe import load_recipe
from pipeline.storage import objects


def put_folder(url: str, folder: Path, names: list[str] | None = None) -> None:
    place = objects.Objects(url)
    for path in folder.iterdir():
        if names is None or path.name in names:
            place.write(path.name, path.read_bytes())


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
