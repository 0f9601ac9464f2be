"""Checkpoints within a round: written whole or not at all, and read only where everything they depend on is the same.

folder/
  step-000020/     DeepSpeed's own: weights, master weights, moments
  position.json    renamed into place when that is on the disk; a folder it does not name does not exist
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pipeline.recipe import Learning
from pipeline.storage import durable
from trainer import engine as engines
from trainer.ranks import wait

POSITION = "position.json"


def save(engine: Any, folder: Path, identity: dict[str, Any], state: dict[str, Any], settings: Learning) -> None:
    """Keeps the engine and `state` (with its `steps`) as the round's only checkpoint. Each rank calls it."""
    tag = f"step-{state['steps']:06d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    engines.save_state(engine, folder, tag, settings)
    if dist.get_rank() == 0:
        position = {"tag": tag, "identity": identity, "state": state}
        durable.write_durably(folder / POSITION, json.dumps(position, indent=1).encode())
        for old in folder.iterdir():
            if old.is_dir() and old.name != tag:
                shutil.rmtree(old)
    wait()


def load(engine: Any, folder: Path, identity: dict[str, Any], settings: Learning) -> dict[str, Any] | None:
    """Puts the engine where the checkpoint left off and returns its `state`.

    None where there is none, or where data, settings or policy are not those that it was made under: the round
    then starts anew.
    """
    try:
        position = json.loads((folder / POSITION).read_bytes())
    except FileNotFoundError:
        return None
    if position["identity"] != identity:
        return None
    engine.load_checkpoint(
        str(folder),
        tag=position["tag"],
        load_lr_scheduler_states=False,
        load_module_strict=not settings.lora_rank,
    )
    state: dict[str, Any] = position["state"]
    return state


def delete(folder: Path) -> None:
    """Frees the disk once the snapshot is published."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
