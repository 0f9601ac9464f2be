"""What ranks do together beside learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.errors import OaplError

Made = TypeVar("Made")


def from_rank_0(make: Callable[[], Made]) -> Made:
    """What rank 0 makes, on every rank, or the OaplError that it raised. Each rank calls it."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            made = [make()]
        except OaplError as error:  # the other ranks wait for the answer
            made = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(made)
    if isinstance(made[0], OaplError):
        raise made[0]
    found: Made = made[0]
    return found
