"""What ranks do together beside learning."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.errors import OaplError

Made = TypeVar("Made")
PATIENCE = timedelta(hours=24)
"""That ranks wait for one of them, which reads or writes a model. NCCL's watchdog ends everything after ten minutes."""
_patient: tuple[Any, Any] = (None, None)


def patient() -> Any:
    """All ranks in a gloo group that waits for `PATIENCE`; made once. Each rank calls it."""
    global _patient
    if _patient[0] is not dist.group.WORLD:
        _patient = dist.group.WORLD, dist.new_group(backend="gloo", timeout=PATIENCE)
    return _patient[1]


def wait() -> None:
    """Until all ranks are here, however long one of them takes."""
    if dist.get_world_size() > 1:
        dist.barrier(group=patient())


def from_rank_0(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on every rank, or the OaplError that it raised. Each rank calls it."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = [make()]
        except OaplError as error:  # the other ranks wait for the answer
            made = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(made, group=patient())
    if isinstance(made[0], OaplError):
        raise made[0]
    found: Made = made[0]
    return found
