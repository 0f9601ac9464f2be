"""A round of learning whose snapshot is published at a URL: learned in the cache, then sent, snapshot.json last."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.errors import RequestError
from pipeline.policies import snapshots
from pipeline.recipe import Learning
from pipeline.rollouts.store import read_manifest
from pipeline.rollouts.tables import verdict_files
from pipeline.storage.durable import sha256_file
from pipeline.storage.places import local_path
from pipeline.storage.working_copy import Copy, copy_of
from trainer.kept import wanted
from trainer.learner import learn
from trainer.ranks import from_rank_0, patient
from trainer.work import Round

SNAPSHOT = "snapshot"
MARKS = replace(snapshots.MARKS, records=(*snapshots.MARKS.records, "learning*.json"))
"""Of what a round of learning leaves below `--out`."""


def bring_kept(out: str, policy: Path, settings: Learning) -> None:
    """Brings what was kept with the policy for learning to go on with, where `out` is a URL and has some.

    Before the ranks meet: they would take a long download for a loss.
    """
    if local_path(out) is None and wanted(settings):
        copy = copy_of(out, MARKS)
        folder = f"{snapshots.MOMENTS}/{snapshots.load_record(policy).snapshot_id}"
        copy.bring_folder(folder)
        base = snapshots.kept_base(copy.folder / folder)
        if base is not None:
            copy.bring_folder(base)


def learn_for(out: str, work: Round) -> dict[str, Any]:
    """Learns the round (see `learn`); `work.out` is the working folder of `out`, a folder or a URL. Each rank calls it.

    Where an earlier call learned this very round and could not send it to the URL, nothing is learned again. Raises
    RequestError where ranks on several machines have no working folder in common.
    """
    if local_path(out) is not None:
        _refuse_apart(
            work.out, f"--out {out} is not one folder on all nodes; give one on a file system that they share"
        )
        return learn(work)
    copy = copy_of(out, MARKS)
    _refuse_apart(copy.folder, APART)
    task, learned = from_rank_0(lambda: _learned(copy, work))
    if learned is not None:
        return learned
    summary = learn(work)
    if dist.get_rank() == 0:
        copy.hold(SNAPSHOT, task, summary=json.dumps(summary))
    return summary


def send(out: str, snapshot_id: str) -> None:
    """Sends what the round made to `out`, where that is a URL. Raises WorkError where the store refuses."""
    if local_path(out) is not None:
        return
    copy = copy_of(out, MARKS)
    made = (f"{snapshot_id}/", f"{snapshots.MOMENTS}/{snapshot_id}/", "learning.", "learning/")
    copy.send(lambda name: name.startswith(made))
    copy.release(SNAPSHOT)


def _learned(copy: Copy, work: Round) -> tuple[str, dict[str, Any] | None]:
    """What the round is made from, as a hash; and its summary, where it waits to be sent."""
    parent = snapshots.load_record(work.policy)
    behaviour = snapshots.load_record(work.behaviour).sha256 if work.behaviour else None
    verdicts = {path.name: sha256_file(path) for path in verdict_files(work.data.verdicts)}
    settings = work.recipe.model_dump(mode="json", include={"seed", "learning"})
    digest = read_manifest(work.data.rollouts).digest
    told = [digest, verdicts, parent.sha256, behaviour, work.number, dist.get_world_size(), settings]
    task = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    held = copy.held(SNAPSHOT, task)
    summary = json.loads(held["summary"]) if held is not None else None
    whole = summary is not None and (copy.folder / summary["snapshot_id"] / snapshots.RECORD).exists()
    return task, summary if whole else None


APART = "--out is a URL and the ranks are on several machines; set OAPL_CACHE to a folder that all of them share"


def _refuse_apart(folder: Path, why: str) -> None:
    """DeepSpeed's state is written by all ranks, and read back by others: they must see one folder."""
    probe = from_rank_0(lambda: _probe(folder))
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, (folder / probe).exists(), group=patient())
    if dist.get_rank() == 0:
        (folder / probe).unlink()
    if not all(seen):
        raise RequestError(why)


def _probe(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".probe-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    (folder / name).touch()
    return name
