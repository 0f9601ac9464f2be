"""What is kept beside a snapshot for the round that goes on from it, readable by any number of ranks and ZeRO stage.

    .optimizer/<snapshot_id>/
      master*.safetensors       float32 weights that the snapshot holds rounded, or the adapters that it holds merged
      exp_avg*, exp_avg_sq*     Adam's moments, float32, under the weights' names
      kept.json                 what there is; the folder is renamed into place with it

A snapshot in bfloat16 rounds away most of what some dozens of small steps change. With the masters kept, a round goes
on from what the one before learned, not from what could be published of it.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipeline.policies import snapshots
from pipeline.policies.snapshots import KEPT_RECORD, MOMENTS, Snapshot
from pipeline.policies.tensors import Planned, Stored, Writer, stored
from pipeline.recipe import Learning
from trainer import wholes

MASTER = "master"
_EARLIER = "sharing.json"
"""Stands in folders of earlier versions, beside DeepSpeed's own files: how the ranks shared them."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What was kept beside a snapshot. Nothing is read before it is asked for."""

    folder: Path
    record: dict[str, Any]
    base: Path | None
    """The policy whose weights the kept adapters belong to; null where whole weights were learned."""

    def tensors(self, key: str) -> dict[str, Stored]:
        """By weight: `MASTER`, or one of `wholes.MOMENTS`; empty where it was not kept."""
        return stored(self.folder, key)


def wanted(settings: Learning) -> tuple[str, ...]:
    """What a round with these settings keeps."""
    masters = (MASTER,) if settings.dtype == "bfloat16" or settings.lora_rank else ()
    return (*masters, *(wholes.MOMENTS if settings.keep_optimizer else ()))


def find(out: Path, policy: Path, snapshot: Snapshot, settings: Learning) -> Kept | None:
    """What can be gone on with from `policy`; null where nothing is there, or all of it is of other settings."""
    folder = out / MOMENTS / snapshot.snapshot_id
    if not wanted(settings) or not (folder / KEPT_RECORD).exists():
        return None
    record = snapshots.kept_record(folder)
    if record["adapters"] != _adapters(settings):
        return None
    base = None
    if record["adapters"] is not None:
        base = _base(record["base"], (out, policy.parent))
        if base is None:
            return None  # deleted meanwhile: the snapshot holds the adapters merged, and new ones start from it
    return Kept(folder, record, base)


def _adapters(settings: Learning) -> dict[str, int] | None:
    return {"rank": settings.lora_rank, "alpha": settings.lora_alpha} if settings.lora_rank else None


def based_on(policy: Path, snapshot: Snapshot) -> dict[str, str]:
    """How a record names the policy whose weights adapters belong to."""
    return {"snapshot_id": snapshot.snapshot_id, "sha256": snapshot.sha256, "folder": str(policy.absolute())}


def _base(told: dict[str, str], folders: tuple[Path, ...]) -> Path | None:
    places = [*(folder / told["snapshot_id"] for folder in folders), Path(told["folder"])]
    for place in places:
        if (place / "config.json").exists() and snapshots.load_record(place).sha256 == told["sha256"]:
            return place
    return None


def take_up(engine: Any, kept: Kept, settings: Learning) -> None:
    """Sets the optimizer to what was kept: masters, and moments where the settings carry them. Each rank calls it."""
    named = [pair for pair in wholes.parameters(engine.module.model) if pair[1].requires_grad]
    if settings.dtype == "bfloat16" or kept.base is not None:
        masters = kept.tensors(MASTER)
        for name, parameter in named:
            wholes.put_master(parameter, wholes.as_tensor(masters[name]))
    moments = {key: kept.tensors(key) for key in wholes.MOMENTS}
    if settings.keep_optimizer and all(moments.values()):
        wholes.make_moments(engine, kept.record["optimizer_steps"])
        for name, parameter in named:
            for key, tensors in moments.items():
                wholes.put_moment(engine, parameter, key, wholes.as_tensor(tensors[name]))


def take_up_earlier(engine: Any, out: Path, snapshot_id: str, settings: Learning) -> None:
    """The same with what an earlier version kept, in DeepSpeed's form; where it can't be, moments start anew."""
    folder = out / MOMENTS / snapshot_id
    if not settings.keep_optimizer or settings.lora_rank or not (folder / _EARLIER).exists():
        return
    shared = {"ranks": dist.get_world_size(), "zero_stage": settings.zero_stage, "dtype": "float32"}
    if json.loads((folder / _EARLIER).read_bytes()) == shared:
        engine.load_checkpoint(str(folder.parent), tag=snapshot_id, load_lr_scheduler_states=False)
    elif dist.get_rank() == 0:
        sys.stderr.write(f"{folder}: moments of an earlier version, shared in another way; they start anew\n")


class Keeping:
    """Writes what is kept of a round, beside a snapshot whose name is known at the end. Of rank 0 alone."""

    def __init__(self, out: Path, named: list[tuple[str, Any]], settings: Learning) -> None:
        self._out, self._settings = out / MOMENTS, settings
        self._partial = self._out / ".partial"
        shutil.rmtree(self._partial, ignore_errors=True)
        self._writers: dict[str, Writer] = {}
        if wanted(settings):
            self._partial.mkdir(parents=True)
            plan = [Planned(name, "F32", wholes.shape(parameter)) for name, parameter in named]
            self._writers = {key: Writer(self._partial, key, plan) for key in wanted(settings)}

    def write(self, key: str, name: str, value: Tensor) -> None:
        """The next weight's float32 master or moment, in the order of the names."""
        if key in self._writers:
            self._writers[key].write(name, wholes.as_bytes(value.float().cpu()))

    def finish(self, snapshot_id: str, parent: str, optimizer_steps: int, base: dict[str, str] | None) -> None:
        """Lets it be found, and deletes what older snapshots than the parent have."""
        if not self._writers:
            return
        for writer in self._writers.values():
            writer.close()
        record = {"adapters": _adapters(self._settings), "optimizer_steps": optimizer_steps, "base": base}
        (self._partial / KEPT_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        snapshots.put_kept(self._partial, self._out, snapshot_id, parent)

    def give_up(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
