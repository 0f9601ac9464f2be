"""The machine that is measured on: what it is, how fast it could be, clocks that wait for it, memory at its peak."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from trainer.peaks import of_card

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "flash-attn", "numpy", "pyarrow", "pydantic", "safetensors")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def peak_rate(name: str) -> float | None:
    """Dense bfloat16 operations a second, as the learner knows them; null for a card without a data sheet."""
    found = of_card(name, "bfloat16")
    return None if found is None else found.flops


def describe(small: bool) -> dict[str, Any]:
    """What the numbers were measured on."""
    found: dict[str, Any] = {
        "small": small,
        "device": "cpu",
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "host_memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in PACKAGES},
    }
    if torch.cuda.is_available():
        told = torch.cuda.get_device_properties(device())
        found |= {
            "device": told.name,
            "memory": told.total_memory,
            "capability": f"{told.major}.{told.minor}",
            "multiprocessors": told.multi_processor_count,
            "peak_bfloat16": peak_rate(told.name),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def median(work: Callable[[], Any], repeat: int) -> float:
    """The median second of so many calls, after one that warms up."""
    timed(work)
    return statistics.median(timed(work) for _ in range(repeat))


def reset_peak() -> None:
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()


def held() -> int:
    """Bytes that tensors hold on the device now; 0 on a CPU, whose allocator does not count."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def peak() -> int | None:
    """Bytes that tensors held at most since `reset_peak`; null on a CPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None


def peak_above(work: Callable[[], Any]) -> int | None:
    """Bytes that a call holds at its peak above what was held before; null on a CPU."""
    before = held()
    reset_peak()
    work()
    synchronize()
    most = peak()
    return None if most is None else most - before
